"""Another run is refused; a bad row may be fixed, skipped or taken out as far as that changes no step before."""

import json
import re
import shutil
from pathlib import Path

import pytest
from resume_runs import BASE, batches_of, history, order, printed


def copied_clips(folder, name):
    """The rows of clips of their own, which a test may damage."""
    shutil.copytree(folder / "clips", folder / name)
    (folder / f"{name}.jsonl").write_text((folder / "clips.jsonl").read_text().replace("/clips/", f"/{name}/"))
    return folder / f"{name}.jsonl"


# --- what is refused, and what is said ------------------------------------------------------------------------------


def test_another_run_is_refused_and_a_longer_one_is_not(runs, straight):
    runs.finish("other", max_steps=2, logging_steps=1)
    codes, text = runs("other", max_steps=2, per_device_train_batch_size=5, lora_r=4, method="dpo")
    assert codes == [1]
    differences = text[text.rindex("CheckpointError: ") :]
    for line in ("method: rrpo when it was saved, dpo now", "lora_r: 2 ", "per_device_train_batch_size: 2 "):
        assert f"\n  - {line}" in differences
    codes, text = runs("other", max_steps=2, logging_steps=1, processes=2)
    assert codes == [1, 1]
    assert "\n  - processes: 1 when it was saved, 2 now" in text
    codes, text = runs("other", max_steps=2, logging_steps=1, env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert codes == [1] and "\n  - mixed precision: no when it was saved, bf16 now" in text
    text = runs.finish("other", max_steps=4, logging_steps=1)
    assert printed(text) == [f"Continuing from {runs.folder}/other/checkpoint-2, although"]
    assert "\n  - max_steps: 2 when it was saved, 4 now. The linear schedule of the learning rate follows" in text
    logged = history(runs.folder / "other" / "checkpoint-4")
    assert [logs["step"] for logs in logged] == [1, 2, 3, 4]
    assert [logs["learning_rate"] for logs in logged] == [1e-2, 5e-3, 5e-3, 2.5e-3]  # the last two: of four steps


@pytest.mark.parametrize("option", ["save_only_model", "sync_ref_model"])
def test_a_run_that_cannot_be_continued(runs, option):
    """It says so before it starts, if it is to be continued, and when it is stopped."""
    options = {option: True, "method": "dpo", "use_peft": False, "freeze_vision": True, "learning_rate": 1e-3}
    codes, text = runs(option, **options)
    assert codes == [1] and f"cannot continue from a checkpoint of this run: {option} " in text
    codes, text = runs(option, ("SIGTERM", 1, "checkpoint-2"), **options, resume_from_checkpoint=None)
    assert codes == [143]
    last = f"The last complete checkpoint is {runs.folder}/{option}/checkpoint-3. Training cannot continue from it: "
    assert f"{last}{option} " in printed(text)[-1] and printed(text)[-1].endswith("The same command starts a new run.")
    codes, text = runs(option, **options | {option: None})
    assert codes == [1] and f"checkpoint-3: {option} " in text


def test_another_base_and_other_clips_are_refused(runs):
    """One byte of a weight, the chat template, and a clip that was trained on, each under its old name."""
    base, data = runs.folder / "base", copied_clips(runs.folder, "clips-2")
    shutil.copytree(BASE, base)
    options = {"model_name_or_path": base, "dataset_name": data, "max_steps": 4}
    runs.finish("changed", **options | {"max_steps": 2})
    trained = {name for names in batches_of(runs.folder / "changed.log").values() for name in next(iter(names))}
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with (base / "chat_template.jinja").open("a") as file:
        file.write(" ")
    number = int(re.match(r"row (\d+)", sorted(trained)[0]).group(1))
    row = json.loads(data.read_text().splitlines()[number])
    with Path(row["videos"][0]).open("ab") as file:
        file.write(b"more")
    codes, text = runs("changed", **options)
    assert codes == [1]
    assert f"\n  - model: chat_template.jinja, model.safetensors of {base} are not those that the run was " in text
    assert f"\n  - rows: 1 of 10 rows were changed (counted from 0: {number}), and 1 of them were trained on" in text


def test_a_chat_template_with_a_date(runs):
    """Exact within the day; afterwards it is said, as the run would be lost at midnight otherwise."""
    base = runs.folder / "dated"
    shutil.copytree(BASE, base)
    template = base / "chat_template.jinja"
    template.write_text("Today: {{ strftime_now('%d %b') }}\n" + template.read_text())
    options = {"model_name_or_path": base, "method": "dpo"}
    runs.finish("day", **options, max_steps=2, env={"DAY": "1"})
    text = runs.finish("day", **options, max_steps=2, env={"DAY": "1"})
    assert printed(text) == [f"Continuing from {runs.folder}/day/checkpoint-2."]
    text = runs.finish("day", **options, max_steps=2, env={"DAY": "2"})
    assert re.search(r"\n  - the chat template wrote 'Today: 01 Dec.* and writes 'Today: 02 Dec.* other prompts", text)


def test_other_rows_to_evaluate_on(runs):
    """Under the same name. By whose loss would the best checkpoint be the best?"""
    folder = runs.folder / "splits"
    folder.mkdir()
    lines = (runs.folder / "clips.jsonl").read_text().splitlines()
    for split, part in (("train", lines[:7]), ("test", lines[7:])):
        (folder / f"{split}.jsonl").write_text("\n".join(part))
    options = {"dataset_name": folder, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "method": "dpo"}
    best = {"load_best_model_at_end": True}
    runs.finish("evaluated", **options, **best)
    (folder / "test.jsonl").write_text("\n".join(lines[8:]))
    codes, text = runs("evaluated", **options, **best)
    assert codes == [1] and "\n  - rows to evaluate on: not those" in text and "which checkpoint-2 is the best" in text
    text = runs.finish("evaluated", **options)
    assert "\n  - rows to evaluate on: not those that the run was evaluated on until now. Losses" in text


# --- a bad row that was found in the middle -------------------------------------------------------------------------


def test_a_damaged_clip_is_skipped(runs, straight):
    """The remedy that the error names: the run goes on with all other rows, in the order that they had."""
    data = copied_clips(runs.folder, "clips-3")
    whole = order(runs.folder / f"{straight}.log")
    rows = {row["id"]: row for row in map(json.loads, data.read_text().splitlines())}
    Path(rows[whole[7]]["videos"][0]).write_bytes(b"damaged")  # of the fourth step
    codes, text = runs("damaged", dataset_name=data, check_media="off")
    assert codes == [1] and "MediaError" in text
    left = f"interrupted after step 2. The last complete checkpoint is {runs.folder}/damaged/checkpoint-2."
    assert left in text  # rows are loaded ahead
    text = runs.finish("damaged", dataset_name=data, on_bad_media="skip")
    assert "on_bad_media: its default when it was saved, 'skip' now. It changes no row that was trained on." in text
    assert order(runs.folder / "damaged.log")[:9] == [row for row in whole[:10] if row != whole[7]]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_row_is_taken_out(runs, straight, processes):
    """All rows before it stay trained, all after it come in their order, and none twice; also when killed again."""
    name = f"taken-{processes}"
    data = runs.folder / f"{name}.jsonl"
    options = {"processes": processes, "per_device_train_batch_size": 2 // processes}
    lines = (runs.folder / "clips.jsonl").read_text().splitlines()
    data.write_text("\n".join(lines))
    codes, text = runs(name, ("SIGKILL", 9, "checkpoint-4"), dataset_name=data, **options)
    assert -9 in codes, text
    whole = order(runs.folder / f"{straight}.log")
    first, taken_out = whole[0], whole[7]  # of the first and the fourth step
    for taken, message in ((first, "row"), (taken_out, None)):
        data.write_text("\n".join(line for line in lines if json.loads(line)["id"] != taken))
        codes, text = runs(name, message is None and ("SIGKILL", 9, "checkpoint-6"), dataset_name=data, **options)
        assert ("and 1 of them were trained on before" in text) == (message is not None), text
    assert "1 of 10 rows were taken out" in text and -9 in codes
    text = runs.finish(name, dataset_name=data, **options)
    assert printed(text)[-1] == f"Continuing from {runs.folder}/{name}/checkpoint-4."
    kept = [row for row in whole[:10] if row != taken_out]
    assert order(runs.folder / f"{name}.log")[:9] == kept
    assert taken_out not in order(runs.folder / f"{name}.log")


def test_a_row_of_a_stream_is_mended(runs):
    """Its file says which rows the run was on: one behind them may change, one of them may not."""
    data = runs.folder / "streamed.jsonl"
    options = {"dataset_name": data, "dataset_streaming": True, "max_steps": 5}
    lines = (runs.folder / "clips.jsonl").read_text().splitlines()
    data.write_text("\n".join(lines))
    codes, text = runs("streamed", ("SIGKILL", 9, "checkpoint-4"), **options)
    assert codes == [-9], text
    rows = list(map(json.loads, lines))
    swapped = [json.dumps(row | {"chosen": row["rejected"], "rejected": row["chosen"]}) for row in rows]
    data.write_text("\n".join([swapped[0], *lines[2:]]))
    codes, text = runs("streamed", **options)
    assert codes == [1] and "\n  - rows: 10 when it was saved, 9 now, and more has changed than that" in text
    data.write_text("\n".join([*lines[:3], swapped[3], *lines[4:]]))
    codes, text = runs("streamed", **options)
    assert codes == [1] and "and 1 of them were trained on before, for example row 3" in text
    data.write_text("\n".join([*lines[:5], *lines[6:]]))
    assert "1 of 10 rows were taken out (counted from 0: 5). None" in runs.finish("streamed", **options)
    ids = [row["id"] for row in rows]
    assert order(runs.folder / "streamed.log")[:9] == ids[:5] + ids[6:]


def test_a_new_run_in_the_folder_of_an_older_one(runs, straight):
    """Killed before it wrote over all of the older one's checkpoints, it goes on from its own."""
    runs.finish("stale", learning_rate=5e-3)
    codes, text = runs("stale", ("SIGKILL", 9, "checkpoint-6"), resume_from_checkpoint=None)
    assert codes == [-9], text
    folder = runs.folder / "stale"
    text = runs.finish("stale")
    assert printed(text)[0].startswith(f"{folder}/checkpoint-6 is not complete"), text  # half of it was written over
    assert printed(text)[1].startswith(f"checkpoint-8 of an earlier run in {folder}"), text
    assert f"Continuing from {folder}/checkpoint-4." in printed(text)
    got, want = (f / "adapter_model.safetensors" for f in (folder, runs.folder / straight))
    assert got.read_bytes() == want.read_bytes()


def test_a_path_and_no_flag(runs, straight):
    folder = runs.folder / straight
    codes, text = runs("path", resume_from_checkpoint=folder / "checkpoint-5")
    assert codes == [1] and f"cannot continue from {folder}/checkpoint-5: there is no such folder" in text
    runs.finish("path", resume_from_checkpoint=folder / "checkpoint-4")
    assert not (runs.folder / "path" / "checkpoint-2").exists()
    got, want = (runs.folder / name / "adapter_model.safetensors" for name in ("path", straight))
    assert got.read_bytes() == want.read_bytes()
    text = runs.finish("path", max_steps=1, resume_from_checkpoint=None)
    assert "has checkpoints of an earlier run, the last one checkpoint-8. This run starts" in printed(text)[0]
