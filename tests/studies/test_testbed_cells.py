"""The shipped base of the small world, and a run of the comparison on it from pairs to rows."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from studies.testbed import cells, command, made, plan, pretraining
from studies.testbed.mass import TrueCaption
from trl_vpo.testbed import language, world
from trl_vpo.testbed.tiny_vlm import BASE


@pytest.fixture(scope="module")
def base():
    model = AutoModelForImageTextToText.from_pretrained(BASE)
    return model.eval(), AutoProcessor.from_pretrained(BASE)


def documented() -> dict[tuple[str, str], dict[str, float]]:
    """The table in the docstring of the pretraining: (kind, split) -> shares."""
    lines = [line.split() for line in pretraining.__doc__.splitlines()]
    names = next(words for words in lines if words[:1] == ["true"])
    rows = [words for words in lines if words and words[0] in ("clips,", "scenes,")]
    return {(kind.strip("s,"), split): dict(zip(names, map(float, shares))) for kind, split, *shares in rows}


def test_the_base_is_small_and_as_good_as_documented(base):
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 8e6
    expected = documented()["clip", "balanced"]
    assert pretraining.measure_base(*base, "clip", **pretraining.SPLITS["balanced"]) == pytest.approx(
        expected, abs=0.04
    )


def test_the_base_knows_the_grammar_and_says_what_is_false(base):
    model, processor = base
    samples = world.draw_samples("clip", 6, 4, habits=False)
    found = [TrueCaption(processor, sample, (0, 1, 2, 0, 1)).measure(model) for sample in samples]
    assert np.mean([mass.outside.mean() for mass in found]) < 0.02  # it knows the grammar
    assert max(mass.false.max() for mass in found) > 0.2
    for sample, mass in zip(samples, found):
        assert mass.log_true < 0 and len(mass.true) == len(language.true_sentences(sample.things)) + 1


@pytest.fixture
def tiny(monkeypatch):
    """Runs of a few pairs and samples."""
    threads = torch.get_num_threads()
    for name, value in (("ROWS", 8), ("BATCH", 4), ("TEST", 3)):
        monkeypatch.setattr(plan, name, value)
    for name in ("_TRUE", "_BASES"):
        monkeypatch.setattr(cells, name, {})
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_shorter_run_is_the_beginning_of_a_longer_one(tiny, tmp_path, capsys, monkeypatch):
    run = plan.Run("dpo", "near", 3e-3, 0, (1, 2))
    monkeypatch.setattr(plan, "full_runs", lambda: [run])
    rows = cells.run_cells(run, tmp_path)
    assert [row["steps"] for row in rows] == [1, 2] and rows[0]["margin"] != rows[1]["margin"]
    for row in rows:
        masses = [row[f"{name}_mass"] for name in ("true", "false", "outside")]
        assert sum(masses) == pytest.approx(1, abs=1e-4) and row["kl"] > 0
        assert {len(values) for values in row["samples"].values()} == {3}
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["cell", "--method", "dpo", "--rate", "3e-3", "--steps", "1", "--seed", "0"]
    command.main(["--results", str(results), "--out", str(tmp_path), *words])
    assert "are those of the stored row" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_scenes_has_what_clips_have_and_more(tiny, tmp_path):
    (clips,) = cells.run_cells(plan.Run("lpoi_clip", "near", 3e-3, 0, (1,)), tmp_path)
    (row,) = cells.run_cells(plan.Run("lpoi_3", "scenes", 3e-3, 0, (1,)), tmp_path)
    names = {name.replace("scene_", "clip_") for name in clips}
    of_scenes = {"visibility", "habit_objects", "absent_yes", "present_yes", "other_yes"}
    assert set(row) - names == of_scenes and names < set(row) and row["base"] != clips["base"]
    assert {len(values) for values in row["samples"].values()} == {3}
    assert -1 <= row["visibility"] <= 1 and row["kl"] > 0
    (before,) = cells.run_cells(plan.BASE_ON_SCENES, tmp_path)
    assert before["kl"] == 0 and before["margin"] == pytest.approx(
        row["margin"] - row["chosen_change"] + row["rejected_change"], abs=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["leanpo", "rrpo"])
def test_the_base_makes_pairs_in_two_rounds(method, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(made, "FIRST_STEPS", 1)
    (row,) = cells.run_cells(plan.Run(method, "made_again", 3e-3, 0, (1,)), tmp_path)
    assert 4 <= row["pairs_made"] <= 8 and 0 <= row["rejected_true"] < 1
    assert row["chosen_true"] == 1 or method == "leanpo"
    assert len(list((tmp_path / "data").glob("made*.jsonl"))) == 2 and not list((tmp_path / "runs").iterdir())
