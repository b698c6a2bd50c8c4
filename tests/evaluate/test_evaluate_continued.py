"""Runs of `trl-vpo evaluate` that are continued, and what such a run refuses."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from held_out_kit import assert_same_record, evaluate, records, write_adapter, write_held_out
from helpers import write_clip

from trl_vpo.errors import EvaluateError, MediaError, ModelError, RecipeError, RunError, UserError
from trl_vpo.evaluate import probes
from trl_vpo.evaluate import run as module
from trl_vpo.evaluate.candidates import candidate_names
from trl_vpo.evaluate.command import evaluate as run_command
from trl_vpo.evaluate.config import EvaluateConfig
from trl_vpo.evaluate.run import parse, run_evaluation, run_settings
from trl_vpo.runs.store import Run
from trl_vpo.testbed import tiny_vlm
from trl_vpo.testbed.rows import write_jsonl


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return write_held_out(tmp_path_factory.mktemp("evaluate"))


def test_a_killed_run_continues(held_out, monkeypatch, tmp_path):
    """With the settings that may change, and no others."""
    folder, adapter = tmp_path / "run", write_adapter(tmp_path / "words", seed=1)
    options = {"batch_size": 4, "answer_preferences": True}
    evaluate(held_out, tmp_path / "whole", adapter, **options)
    write, evaluate_batch, written, worked = Run.write, module.evaluate_batch, [], []

    def until_killed(self, outcome):
        if len(written) == 6:
            raise RuntimeError("killed")
        written.append(outcome.id)
        write(self, outcome)

    def counted(candidates, batch, config):
        worked.extend(row.id for row, *_ in batch)
        return evaluate_batch(candidates, batch, config)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write", until_killed)
        with pytest.raises(RuntimeError, match="killed"):
            evaluate(held_out, folder, adapter, **options)
    assert not (folder / "results.json").exists()
    monkeypatch.setattr(module, "evaluate_batch", counted)
    first = evaluate(held_out, folder, adapter, **options)
    assert worked == list(held_out.rows)[6:]
    whole = records(tmp_path / "whole")
    for key, record in records(folder).items():
        assert_same_record(record, whole[key])
    # the answers stay, the way to read them may change
    strict = evaluate(held_out, folder, adapter, yes_no_rule="strict", level=0.5, **options)
    assert len(worked) == 11 and strict["settings"]["yes_no_rule"] == "strict"
    wide, narrow = (r["contestants"]["base"]["measures"]["logps/chosen"] for r in (first, strict))
    assert wide["value"] == narrow["value"] and wide["low"] < narrow["low"]
    with pytest.raises(RunError, match="max_new_tokens: was 16, is 9"):
        evaluate(held_out, folder, adapter, **options, max_new_tokens=9)
    write_adapter(tmp_path / "words", seed=7)  # another adapter in the same place
    with pytest.raises(RunError, match=r"adapters\.words: was"):
        evaluate(held_out, folder, adapter, **options)


def test_a_limit_measures_no_pair_or_set_that_it_cuts(held_out, tmp_path, capsys):
    """Of two rows without a pair and one pair, the limit leaves three: set 1 and the pair are not whole."""
    asked = [{"id": f"q{i}", "task": "yes_no", "question": "Does the square move?", "answer": "yes"} for i in range(4)]
    asked[0]["sets"], asked[1]["sets"], asked[3]["sets"] = {"figure": "0"}, {"figure": "1"}, {"figure": "1"}
    asked[2]["pair"], asked[3]["pair"], asked[3]["answer"] = "p", "p", "no"
    data = write_jsonl(asked, tmp_path / "rows.jsonl")
    results = evaluate(held_out, tmp_path / "run", data=data, sensitivity="none", limit=3)
    counts = {key: results["data"][key] for key in ("rows", "incomplete_pairs", "incomplete_sets")}
    assert counts == {"rows": 3, "incomplete_pairs": 1, "incomplete_sets": 1}
    text = "2 pairs and sets of questions are not measured: they lack rows behind limit 3, or that were left out."
    assert text in capsys.readouterr().out
    measures = results["contestants"]["base"]["measures"]
    assert measures["sets/figure"]["n"] == 1 and not any(name.startswith("yes_no") for name in measures)
    whole = evaluate(held_out, tmp_path / "run", data=data, sensitivity="none")  # and goes on with the last row
    assert whole["contestants"]["base"]["measures"]["sets/figure"]["n"] == 2
    assert "not measured" not in capsys.readouterr().out
    assert whole["data"]["incomplete_pairs"] == whole["data"]["incomplete_sets"] == 0


def test_bad_media_stop_the_run_unless_skipped(held_out, tmp_path):
    rows = [json.loads(line) for line in held_out.path.read_text().splitlines()[:5]]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows[1]["videos"] = [str(tmp_path / "broken.mp4")]
    data, folder = write_jsonl(rows, tmp_path / "rows.jsonl"), tmp_path / "run"
    with pytest.raises(EvaluateError, match=rf"row 1 \(id '{rows[1]['id']}'\).*broken\.mp4.*(?s:.)*on_bad=skip"):
        evaluate(held_out, folder, data=data, sensitivity="none")
    results = evaluate(held_out, folder, data=data, sensitivity="none", on_bad="skip")
    assert [results["data"][key] for key in ("rows", "skipped", "incomplete_pairs")] == [4, 1, 1]
    measures = results["contestants"]["base"]["measures"]
    assert not any(name.startswith(("yes_no", "sensitivity")) for name in measures)
    assert measures["preference/accuracy"]["low"] is None  # one cluster says nothing about others
    (rejected,) = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    assert rejected["id"] == rows[1]["id"] and "broken.mp4" in rejected["reason"]
    with pytest.raises(EvaluateError, match="1 rows were left out with on_bad=skip"):
        evaluate(held_out, folder, data=data, sensitivity="none")
    others = [row for row in rows if row.get("pair") != rows[1]["pair"]]
    data = write_jsonl(others, tmp_path / "rows.jsonl")  # a row that is gone is not left out
    assert evaluate(held_out, folder, data=data, sensitivity="none")["data"]["rows"] == len(others) == 3


def test_a_row_that_is_corrected_continues_the_run(held_out, tmp_path, monkeypatch):
    """Damage behind the first frame shows when the row is reached. Other rows stay finished; one may not change."""
    rows = [json.loads(line) for line in held_out.path.read_text().splitlines()[:5]]
    worked, run, load, broken = [], module.evaluate_batch, module.load_media, [rows[3]["id"]]

    def go(**options):
        data = write_jsonl(rows, tmp_path / "rows.jsonl")
        return evaluate(held_out, tmp_path / "run", data=data, sensitivity="none", batch_size=1, **options)

    def damaged(source, *args):
        if source.id in broken:
            raise MediaError("damaged")
        return load(source, *args)

    monkeypatch.setattr(module, "load_media", damaged)
    with pytest.raises(EvaluateError, match="damaged\nCorrect the row or its media and start the same command again"):
        go()
    broken.clear()
    monkeypatch.setattr(module, "evaluate_batch", lambda *args: worked.extend(r[0].id for r in args[1]) or run(*args))
    assert go()["data"]["rows"] == 5 and worked == [row["id"] for row in rows[3:]]
    rows[0]["chosen"], rows[0]["rejected"], first = rows[0]["rejected"], rows[0]["chosen"], rows[0]["id"]
    with pytest.raises(RunError, match=f"1 rows, or their media, have changed after .*, the first is '{first}'"):
        go()
    assert len(worked) == 2


def test_media_are_opened_before_weights_are_loaded(held_out, tmp_path, monkeypatch):
    """All of them, each once; with a limit or `on_bad=skip` those that are not needed may be missing."""
    rows = [json.loads(line) for line in held_out.path.read_text().splitlines()]
    boxed = next(row for row in rows if row.get("critical_box"))
    boxed["critical_box"] = [0, 0, 9999, 9999]
    rows = [*(row for row in rows if row.get("videos")), boxed]
    rows[-2]["videos"] = ["gone.mp4"]
    opened, data = [], write_jsonl(rows, tmp_path / "rows.jsonl")
    check, load = probes.open_media, module.load_candidates
    monkeypatch.setattr(probes, "open_media", lambda row, how: opened.append(row.name) or check(row, how))
    monkeypatch.setattr(module, "load_candidates", None)
    one, two = f"row {len(rows) - 2} .*gone.mp4", f"row {len(rows) - 1} .*critical_box"
    with pytest.raises(
        EvaluateError, match=rf"2 of {len(rows)} held-out rows(?s:.)*{one}(?s:.)*{two}(?s:.)*on_bad=skip"
    ):
        evaluate(held_out, tmp_path / "run", data=data)
    assert len(opened) == len({str(row["videos"]) for row in rows[:-2]}) + 1
    monkeypatch.setattr(module, "load_candidates", load)
    assert evaluate(held_out, tmp_path / "run", data=data, limit=2, sensitivity="none")["data"]["rows"] == 2


def test_a_medium_that_is_replaced_is_noticed(held_out, tmp_path, monkeypatch):
    """Under the same name; its finished rows would stay. One that only moves is the same."""
    rows = [json.loads(line) for line in held_out.path.read_text().splitlines()]
    rows = [row for row in rows if row.get("task") == "yes_no"][:4]
    (tmp_path / "media").mkdir()
    for row in rows:
        shutil.copy(row["videos"][0], tmp_path / "media")
        row["videos"] = [Path(row["videos"][0]).name]
    data, options = write_jsonl(rows, tmp_path / "rows.jsonl"), {"sensitivity": "none", "limit": 2}
    evaluate(held_out, tmp_path / "run", data=data, media_root=tmp_path / "media", **options)
    shutil.copytree(tmp_path / "media", tmp_path / "moved")
    first, last = (tmp_path / "moved" / rows[place]["videos"][0] for place in (0, -1))
    last.write_bytes(first.read_bytes())  # a row that is not finished may change
    evaluate(held_out, tmp_path / "run", data=data, media_root=tmp_path / "moved", **options)
    write_clip(first, seed=9)
    remedy = "Put them back, name another output_dir, or delete this folder"
    first_of = f"the first is '{rows[0]['id']}'"
    with pytest.raises(RunError, match=f"2 rows, or their media, have changed .*, {first_of}. {remedy}"):
        evaluate(held_out, tmp_path / "run", data=data, media_root=tmp_path / "moved", **options)


def test_what_loading_raises_is_shown_in_one_line(held_out, tmp_path, monkeypatch):
    def load(*adapters, **options):
        raise ValueError("environment variable MASTER_ADDR expected, but not set")

    monkeypatch.setattr(module, "load_candidates", load)
    with pytest.raises(UserError, match="MASTER_ADDR expected"):
        evaluate(held_out, tmp_path / "run")


def test_a_run_knows_the_bases_weights(held_out, tmp_path):
    """Another model in the same folder would leave stale rows in a continued run."""
    base = tmp_path / "base"
    shutil.copytree(tiny_vlm.BASE, base)
    config = EvaluateConfig(model_name_or_path=str(base), dataset_name=str(held_out.path))
    first = run_settings(config, {})
    assert run_settings(replace(config, model_name_or_path=f"{tiny_vlm.BASE}/"), {}) == first  # under another name
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    changed = run_settings(config, {})
    assert {key for key in first if first[key] != changed[key]} == {"weights"}


# --- adapters and options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora, why",
    [
        ({"bias": "all"}, "trains the base's own biases"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"target_modules": ["lm_head"]}, "adapts the LM head by low-rank layers"),
        (None, r"^adapter .* is not an adapter: its adapter_config\.json"),
    ],
)
def test_adapters_whose_base_cannot_be_told_apart(held_out, tmp_path, lora, why):
    if lora is not None:
        write_adapter(tmp_path, **{"target_modules": ["q_proj"], **lora})
    with pytest.raises(EvaluateError, match=why):
        evaluate(held_out, tmp_path / "run", tmp_path)


def test_candidates_are_named_by_the_end_of_their_path():
    assert candidate_names(["out/rrpo", "out/lpoi/"]) == ["rrpo", "lpoi"]
    assert candidate_names(["a/rrpo/last", "b/dpo/last"]) == ["rrpo/last", "dpo/last"]
    assert candidate_names(["out/base"]) == ["out/base"]
    assert candidate_names([]) == []
    with pytest.raises(EvaluateError, match="cannot be told apart"):
        candidate_names(["out/rrpo", "out/rrpo"])


@pytest.mark.parametrize(
    "argv, error, message",
    [
        (["--adapters", "a", "--adapters", "b"], RecipeError, "--adapters is given twice"),
        (["--adapter", "a"], RecipeError, r"unknown option --adapter\. Did you mean --adapters"),
        (["--model", "m", "--data", "d"], RecipeError, "`output_dir` is not set"),
        (["--sensitivity", "masked", "sharpened"], ValueError, "'sharpened' is not one of shuffled, masked, blank"),
    ],
)
def test_options_that_would_lose_something(argv, error, message):
    with pytest.raises(error, match=message):
        run_evaluation(argv)


def test_benchmark_options_are_checked_before_all_else():
    for option in ("num_frames", "limit", "batch_size"):
        with pytest.raises(UserError, match=f"{option} is 0: give .*at least 1"):
            run_command(["--benchmark", "any", "--model", "m", "--output_dir", "o", f"--{option}", "0"])


# --- what an adapter was trained on -------------------------------------------------------------------------------


def trained(folder, **recipe):
    """A folder with the `run.json` of a training with this recipe."""
    folder.mkdir(parents=True)
    record = {"recipe": {"learning_rate": 1e-5, **recipe}}
    (folder / "run.json").write_text(json.dumps(record))
    return str(folder)


def media_settings(*adapters, model="m", **given):
    argv = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    argv += ["--adapters", *adapters] if adapters else []
    config = parse(["--model", model, "--data", "d", "--output_dir", "o", *argv])
    return [config.num_frames, config.fps, config.max_frames, config.max_pixels, config.video_end]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"settings": {', r"it cannot be read \(Expecting property name"),
        ("[1]", "it holds no JSON object"),
        ('{"contents": null}', "its recipe is None, and no JSON object"),
        ('{"recipe": {"num_frames": "4"}}', "num_frames is '4': give a whole number of at least 1"),
        ('{"recipe": {"num_frames": 4, "max_pixels": -1}}', "max_pixels is -1: give a whole number of at least 1"),
    ],
)
def test_a_damaged_record_of_the_training_is_refused(text, why, tmp_path, caplog):
    """Unless the frames are given: then its other settings are warned of."""
    adapter = trained(tmp_path / "rrpo")
    (tmp_path / "rrpo/run.json").write_text(text)
    with pytest.raises(ModelError, match=rf"rrpo/run\.json: {why}.*Correct the file, or give num_frames or fps"):
        media_settings(adapter)
    assert media_settings(adapter, num_frames=4)[0] == 4
    (warning,) = caplog.messages
    assert re.search(rf"rrpo/run\.json: {why}.*None of its settings is used", warning)


def test_a_record_of_another_tool_is_none(tmp_path):
    adapter = trained(tmp_path / "rrpo")
    (tmp_path / "rrpo/run.json").write_text('{"name": "sunny-lake-17", "config": {}}')
    assert media_settings(adapter)[0] is None  # nothing is taken, nothing refused


def test_frames_are_those_of_the_adapters_training(tmp_path, caplog, capsys):
    short = trained(tmp_path / "short", num_frames=8, max_pixels=1024)
    assert media_settings(short, num_frames=8)[3] == 1024
    assert capsys.readouterr().err == "Videos as in the training, by run.json: max_pixels 1024.\n"
    assert media_settings(short)[0] == 8
    assert capsys.readouterr().err == "Videos as in the training, by run.json: num_frames 8, max_pixels 1024.\n"
    fast = trained(tmp_path / "fast", fps=2.0, max_frames=32)
    usual = trained(tmp_path / "usual")
    assert media_settings(fast, max_frames=64)[1:3] == [2.0, 64]  # the default, but it was given
    config = tmp_path / "frames.yaml"
    config.write_text("max_frames: 64")
    assert media_settings(fast, config=config)[2] == 64
    caplog.clear()
    window = trained(tmp_path / "window", video_start=1.0, video_end=3.0)
    (tmp_path / "fast/checkpoint-5").mkdir()
    own = trained(tmp_path / "fast/checkpoint-best", num_frames=8)  # an output_dir of this name
    assert media_settings(short) == [8, None, 64, 1024, None]
    assert media_settings(fast) == media_settings(fast + "/checkpoint-5") == [None, 2.0, 32, None, None]
    assert media_settings(own) == [8, None, 64, None, None]
    assert media_settings(usual) == [16, None, 64, None, None]
    assert media_settings(window) == [16, None, 64, None, 3.0]
    assert media_settings(short, num_frames=8) == [8, None, 64, 1024, None] and not caplog.messages
    unknown = str(tmp_path / "unknown")  # trained in Python
    assert media_settings(short, unknown) == [8, None, 64, 1024, None]
    assert media_settings(unknown) == [None, None, 64, None, None] or media_settings(unknown)[0] == 16
    assert [f"sampled with num_frames {n}:" in text for n, text in zip((8, 16), caplog.messages)] == [True, True]
    assert media_settings(unknown, num_frames=4)[0] == 4 and unknown in caplog.messages[0]
    assert media_settings(short, fps=1.0, max_frames=9, max_pixels=512) == [None, 1.0, 9, 512, None]
    assert f"{short} was trained with num_frames 8, and is run with fps 1.0." in caplog.messages
    assert f"{short} was trained with max_pixels 1024, and is run with max_pixels 512." in caplog.messages
    few = trained(tmp_path / "few", num_frames=8, max_frames=9)  # which does nothing without fps
    with pytest.raises(ModelError, match=r"different settings .*few: num_frames 8; .*usual: num_frames 16"):
        media_settings(few, usual)
    assert media_settings(few, usual, num_frames=4)[0] == 4


def test_frames_are_those_of_a_model_that_was_trained_whole(tmp_path, caplog, capsys):
    """Also of a merged one. The training of adapters comes after it."""
    full, adapter = trained(tmp_path / "full", num_frames=8, max_pixels=900), trained(tmp_path / "dpo", num_frames=4)
    (tmp_path / "full/checkpoint-2").mkdir()
    assert media_settings(model=full) == media_settings(model=f"{full}/checkpoint-2") == [8, None, 64, 900, None]
    text = "Videos as in the training, by run.json: num_frames 8, max_pixels 900.\n"
    assert capsys.readouterr().err == 2 * text and not caplog.messages
    assert media_settings(adapter, model=full) == [4, None, 64, None, None]
    assert media_settings(model=full, num_frames=6)[0] == 6
    assert caplog.messages == [f"{full} was trained with num_frames 8, and is run with num_frames 6."]
    untold = [16, None, 64, None, None]
    assert media_settings(model=str(tmp_path)) in (untold, [None, *untold[1:]]) and len(caplog.messages) == 1
    (tmp_path / "full/run.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"full/run\.json: it holds no JSON object"):
        media_settings(model=full)
