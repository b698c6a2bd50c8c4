"""Scenes of the small world: what habit adds to them; boxes over clips, and pairs that the base makes."""

import json

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from studies.testbed import cells, habits, lessons, made, pairs, plan, training, truth
from studies.testbed.pretraining import encode
from trl_vpo.testbed import language, world
from trl_vpo.testbed.tiny_vlm import BASE
from trl_vpo.testbed.world import Thing


def scene(*nouns):
    things = tuple(Thing("large", None, "green", noun, lane) for lane, noun in enumerate(nouns))
    return world.Sample("scene", things, np.zeros((1, 56, 112, 3), dtype=np.uint8))


# --- habits -------------------------------------------------------------------------------------------------------


def test_every_scene_asked_about_misses_a_companion():
    found = habits.scenes(12)
    assert len(found) == 12
    for sample in found:
        companion, owner = habits.objects(sample)
        shown = {thing.shape for thing in sample.things}
        assert (owner, companion) in (("table", "cup"), ("tree", "bird"))
        assert owner in shown and companion not in shown and len(shown) == 3
    assert {habits.objects(sample)[1] for sample in found} == {"table", "tree"}


def test_habit_objects_and_answers_are_counted():
    samples = [scene("table", "car", "lamp"), scene("lamp", "tree", "cup"), scene("ball", "table", "bird")]
    assert [habits.objects(sample) for sample in samples] == [("cup", "table"), ("bird", "tree"), ("cup", "table")]
    captions = [
        "there is a large green table. there is a small white cup. that is all.",
        "there is a large green lamp. there is a large green tree. that is all.",  # the cup is another's companion
        "there is a cupboard.",
    ]
    answers = ["yes.", "no.", "yes."], ["yes.", "yes.", "yes"], ["no.", "no.", "yes."]
    found = habits.of_answers(samples, captions, *answers)
    yes = {"absent_yes": [1, 0, 1], "present_yes": [1, 1, 0], "other_yes": [0, 0, 1]}
    assert found == {"habit_objects": [1, 0, 0]} | yes


def test_what_nobody_expects_is_neither_shown_nor_a_companion():
    both = scene("table", "tree", "car")
    assert [habits.unexpected(both, number) for number in range(4)] == ["lamp", "ball", "box", "lamp"]
    assert habits.unexpected(scene("table", "lamp", "car"), 0) == "tree"


def caption_batch(processor):
    """A scene without its cup, and the caption of one who adds it."""
    sample = next(s for s in habits.scenes(8) if habits.objects(s)[0] == "cup")
    said = language.caption(lessons.as_described(sample.things, np.random.default_rng(0), 1.0), (0,) * 6)
    assert "cup" in said and "cup" not in language.caption(sample.things, (0,) * 6)
    return encode(processor, [sample], [[language.Item("caption", language.PROMPTS["scene"], said)]])


def test_teaching_adds_what_is_usual(tmp_path, monkeypatch):
    monkeypatch.setattr(habits, "STEPS", 12)
    monkeypatch.setattr(habits, "LOOKING", {1: 1})
    monkeypatch.setattr(habits, "SHARES", {"scene": 1.0})
    habits.main(["--out", str(tmp_path)])
    batch, losses = caption_batch(AutoProcessor.from_pretrained(tmp_path)), []
    for folder in (BASE, tmp_path):
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        losses.append(float(model(**batch).loss.detach()))
    assert losses[1] < losses[0] - 0.05


def test_runs_on_scenes_start_from_the_stored_base():
    run = plan.BASE_ON_SCENES
    base, scenes = (AutoModelForImageTextToText.from_pretrained(training.BASES[kind]) for kind in ("clip", run.kind))
    batch = caption_batch(AutoProcessor.from_pretrained(training.BASES[run.kind]))
    losses = [float(model.eval()(**batch).loss.detach()) for model in (base, scenes)]
    assert losses[1] < losses[0] / 2
    assert cells.digest("scene") != cells.digest("clip")


# --- boxes --------------------------------------------------------------------------------------------------------


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_boxes_of_clips_hold_the_thing_in_every_frame(tmp_path):
    near = rows_of(pairs.training_rows("near", "clip", 8, 5, tmp_path))
    boxed = rows_of(pairs.training_rows("near", "clip", 8, 5, tmp_path, boxed=True))
    assert [row | {"critical_box": box["critical_box"]} for row, box in zip(near, boxed)] == boxed
    assert not any("critical_box" in row for row in near)
    for sample, row in zip(world.draw_samples("clip", 8, 5, habits=False), boxed):
        x0, y0, x1, y1 = row["critical_box"]
        inside = [thing for thing in sample.things if x0 <= thing.box[0] and thing.box[2] <= x1]
        assert len(inside) == 1  # and no other thing
        ink = (sample.frames.max(-1) > world.BACKGROUND_MAX).any(0)  # in any frame
        hidden = ink.copy()
        hidden[y0:y1, x0:x1] = False
        others = [thing for thing in sample.things if thing not in inside]
        left = {int(x) // world.LANE for x in np.nonzero(hidden.any(0))[0]}
        assert left == {thing.place for thing in others}
        facts = [f" {value}" for value in (inside[0].shape, world.PLACES[inside[0].place])]
        assert all(fact in row["chosen"][0]["content"][0]["text"] for fact in facts)


# --- self-made pairs ----------------------------------------------------------------------------------------------


def test_the_second_round_leaves_out_what_is_true(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "ROWS", 4)
    asked = []

    def generate(method, inputs, path, seed, adapter):  # two rejected responses are true, in another wording
        asked.append((method, adapter))
        rows = rows_of(inputs)
        samples = world.draw_samples("clip", 4, plan.TRAIN_SEED + made.FURTHER, habits=False)
        rng = np.random.default_rng(0)
        for number, (row, sample) in enumerate(zip(rows, samples)):
            assert truth.check_caption(row["answer"], sample.things).true
            wrong = language.caption(language.one_fact_wrong(sample.things, rng)[0], (0,) * 6)
            other = next(text for text in truth.captions(sample.things) if text != row["answer"])
            row["chosen"] = [{"role": "assistant", "content": [{"text": row["answer"] if number else wrong}]}]
            row["rejected"] = [{"role": "assistant", "content": [{"text": other if number in (1, 2) else wrong}]}]
        pairs.write_jsonl(rows[::-1], path)  # in any order

    monkeypatch.setattr(made, "generate", generate)
    monkeypatch.setattr(made, "first_adapter", lambda run, folder, out: folder / "checkpoint")
    path, figures = made.training_rows(plan.Run("rrpo", "made_again", 1e-3, 0), tmp_path)
    assert asked == [("rrpo", tmp_path / "runs/first-rrpo-0.001-0/checkpoint")]
    seed = plan.TRAIN_SEED + made.FURTHER
    assert [row["id"] for row in rows_of(path)] == [f"clips-{seed}-0003", f"clips-{seed}-0000"]
    assert figures == {"pairs_made": 4, "chosen_true": 0.75, "rejected_true": 0.5}
    made.training_rows(plan.Run("rrpo", "made_again", 1e-3, 0), tmp_path)
    assert len(asked) == 1  # made once
    file = tmp_path / "data" / f"made_again-rrpo-{seed}-4-0.001.jsonl"
    pairs.write_jsonl([row for row in rows_of(file) if row["id"][-1] in "12"], file)
    with pytest.raises(ValueError, match="all 2 rejected responses are true, so that no pair is left"):
        made.training_rows(plan.Run("rrpo", "made_again", 1e-3, 0), tmp_path)


# --- the plan -----------------------------------------------------------------------------------------------------


def test_the_full_plan_adds_to_the_main_one():
    runs, main = plan.full_runs(), plan.main_runs()
    assert runs[: len(main)] == main and len(set(runs)) == len(runs) == 37 + 1 + 2 * (9 + 16 + 7 + 1 + 4)
    cells = [cell for run in runs for cell in run.cells()]
    assert len(set(cells)) == len(cells)
    added = runs[len(main) :]
    assert [run.seed for run in added] == sorted(run.seed for run in added)
    assert all(run.method in plan.ALL and run.pairs in pairs.PAIRS for run in runs if run.method != "base")
    assert all((run.rate, run.steps) == (1e-3, (60, 120, 240)) for run in added if run.method != "base")
    assert {run.pairs for run in added if run.kind == "scene"} == {"scenes"}
    assert sorted(run.method for run in added if run.kind == "scene" and run.seed) == [
        "dpo", "lpoi_2", "lpoi_3", "lpoi_5", "lpoi_5_plain", "lpoi_9", "mdpo"
    ]  # fmt: skip
