"""Runs that are killed, stopped, or run out of disk, and go on: the result is that of a run that nothing happened to.

All runs are forks of one process that has imported TRL, see resume_run.py. Dropout is on, and logs, saves and epochs
do not fall together, so that random numbers, half-filled sums and the place in the data all have to be right.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import KITS
from resume_run import BASE, RECIPE, ROOT

from trl_vpo.testbed.rows import write_jsonl, write_preferences

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "test_split_size": 0.4}
SPEEDS = {"runtime", "samples_per_second", "steps_per_second"}  # of the steps since the run was continued
EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "gradient_accumulation_steps": 2}
FULL = {"use_peft": False, "freeze_vision": True, "learning_rate": 1e-3}


class Runs:
    """Starts runs in the folder of a test module."""

    def __init__(self, folder):
        self.folder = folder
        for kind, name in (("clip", "clips"), ("scene", "scenes")):
            _, rows = write_preferences(kind, 10, 3, folder / name)
            write_jsonl(rows, folder / f"{name}.jsonl")
        command = [sys.executable, str(KITS / "resume_run.py")]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=env
        )
        assert self.process.stdout.readline() == '"ready"\n'

    def __call__(self, name, kill=None, *, method="rrpo", processes=1, file_limit=None, rank=0, **recipe):
        """Run once. The exit codes of the processes, and what the first one printed."""
        data = self.folder / ("scenes.jsonl" if method == "lpoi" else "clips.jsonl")
        output = self.folder / name
        recipe = RECIPE | {"model_name_or_path": BASE, "dataset_name": data, "output_dir": output} | recipe
        argv = [part for key, value in recipe.items() if value is not None for part in (f"--{key}", str(value))]
        log = self.folder / f"{name.replace('/', '_')}.log"
        job = {"method": method, "argv": argv, "log": str(log), "processes": processes, "kill": kill, "rank": rank}
        self.process.stdin.write(json.dumps(job | {"file_limit": file_limit}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["codes"], Path(f"{log}.0.txt").read_text(errors="replace")

    def finish(self, name, **options):
        codes, text = self(name, **options)
        assert set(codes) == {0}, text
        return text

    def assert_same(self, name, reference):
        """Weights, logs, final metrics and the order of the data are those of the other run."""
        got, want = self.folder / name, self.folder / reference
        weights = next(want.glob("*model.safetensors")).name
        assert (got / weights).read_bytes() == (want / weights).read_bytes()
        for last in want.glob("checkpoint-*"):
            assert history(got / last.name) == history(last)
        records = [json.loads((folder / "run.json").read_text()) for folder in (got, want)]
        assert without_speed(records[0]["metrics"]["train"]) == without_speed(records[1]["metrics"]["train"])
        order = batches(self.folder / f"{reference}.log")
        for step, names in batches(self.folder / f"{name}.log").items():
            assert names <= order[step], step


def history(checkpoint):
    return [without_speed(logs) for logs in json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]]


def without_speed(logs):
    return {key: value for key, value in logs.items() if not any(key.endswith(name) for name in SPEEDS)}


def batches(log):
    """(rank, step) -> the batches that were trained on then, in whichever attempt."""
    found = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault((entry["rank"], entry["step"]), set()).add(tuple(entry["names"]))
    return found


def order(log):
    """The ids of the rows in the order in which they were trained on, by the last attempt at each step."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    last = {(entry["step"], entry["rank"]): entry["names"] for entry in entries}
    return [re.search(r"id '([^']+)'", name).group(1) for at in sorted(last) for name in last[at]]


def said(text):
    return re.findall(r"^trl-vpo: (.*)", text, re.MULTILINE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("resume"))
    yield made
    made.process.stdin.close()
    made.process.wait(60)


@pytest.fixture(scope="module")
def straight(runs):
    """A run that nothing happened to."""
    text = runs.finish("straight")
    assert said(text) == [f"{runs.folder}/straight has no complete checkpoint: training starts from scratch."]
    logged = history(runs.folder / "straight" / "checkpoint-8")
    assert [logs["step"] for logs in logged] == [3, 6]
    return "straight"


# --- SIGKILL --------------------------------------------------------------------------------------------------------


def test_ten_kills(runs):
    """At random moments: while files are written, while a checkpoint appears, and after some time."""
    recipe = {"max_steps": 12, "save_steps": 1, "save_total_limit": 2, "gradient_accumulation_steps": 2}
    runs.finish("ten-straight", **recipe)
    dice = random.Random(0)
    moments = [("SIGKILL", dice.randint(1, 45), "") for _ in range(6)]
    moments[2:2] = [("seconds", dice.uniform(0.1, 0.4)) for _ in range(2)]
    for moment in moments:
        codes, text = runs("ten", moment, **recipe)
        assert codes == [-9], text
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        newest = max([0, *(int(f.name.split("-")[1]) for f in (runs.folder / "ten").glob("checkpoint-*"))])
        codes, text = runs("ten", ("file", f"{runs.folder}/ten/checkpoint-{newest + 1}/{name}"), **recipe)
        assert codes == [-9], text
    assert "Continuing from" in runs.finish("ten", **recipe)
    runs.assert_same("ten", "ten-straight")
    kept = sorted(f.name for f in (runs.folder / "ten").glob("checkpoint-*"))
    assert kept == ["checkpoint-11", "checkpoint-12"]


def test_two_processes(runs):
    recipe = {"processes": 2, "save_total_limit": 1}
    runs.finish("two-straight", **recipe)
    moments = [("SIGKILL", 9, "checkpoint-4"), ("SIGKILL", 1, "checkpoint-4"), ("seconds", 0.5)]
    moments += [("SIGKILL", 15, "checkpoint-6")]
    for moment, rank in zip(moments, (0, 1, 0, 0)):
        codes, text = runs("two", moment, rank=rank, **recipe)
        assert -9 in codes and 0 not in codes, text  # the other one may have failed before it was killed
    runs.finish("two", **recipe)
    runs.assert_same("two", "two-straight")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("leanpo", {"method": "leanpo"}),
        ("full", {"method": "dpo", **FULL}),
        pytest.param("lpoi", {"method": "lpoi"}, marks=pytest.mark.slow),
        pytest.param("dpo", {"method": "dpo", "precompute_ref_log_probs": True}, marks=pytest.mark.slow),
        pytest.param("stream", {"dataset_streaming": True}, marks=pytest.mark.slow),
        pytest.param("epochs", EPOCHS, marks=pytest.mark.slow),
    ],
)
def test_each_kind_of_run(runs, name, options):
    runs.finish(f"{name}-straight", **options)
    last = "checkpoint-6" if name == "epochs" else "checkpoint-4"
    codes, text = runs(name, ("SIGKILL", 9, last), **options)
    assert codes == [-9], text
    assert "Continuing from" in runs.finish(name, **options)
    runs.assert_same(name, f"{name}-straight")


@pytest.mark.parametrize(
    "kind",
    [pytest.param({}, marks=pytest.mark.slow), {"method": "leanpo", **FULL, "learning_rate": 1e-2}],
    ids=["lora", "full"],
)
def test_the_best_checkpoint_is_kept_and_loaded(runs, kind):
    """Also with full fine-tuning, whose weights transformers does not find again under their names in the file."""
    options = {**EVALUATING, **kind, "load_best_model_at_end": True, "save_total_limit": 1}
    name = f"best-{len(kind)}"
    runs.finish(f"{name}-straight", **options)
    for when in ((20, "checkpoint-4"), (9, "checkpoint-6")):
        codes, text = runs(name, ("SIGKILL", *when), **options)
        assert codes == [-9], text
    runs.finish(name, **options)
    runs.assert_same(name, f"{name}-straight")
    (best,) = (runs.folder / name).glob("checkpoint-*")
    losses = {logs["step"]: logs["eval_loss"] for logs in history(best) if "eval_loss" in logs}
    assert best.name == f"checkpoint-{min(losses, key=losses.get)}"
    (weights,) = best.glob("*model.safetensors")
    assert weights.read_bytes() == (runs.folder / name / weights.name).read_bytes()


def test_a_finished_run_takes_no_more_steps(runs, straight):
    """Killed after the last checkpoint, before the result was written; the last step is not an epoch's last."""
    runs.finish("again")
    (runs.folder / "again" / "adapter_model.safetensors").write_bytes(b"half")
    assert said(runs.finish("again")) == [f"Continuing from {runs.folder}/again/checkpoint-8."]
    runs.assert_same("again", straight)
    assert max(step for _, step in batches(runs.folder / "again.log")) == 7


# --- SIGTERM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sigterm_saves_at_the_end_of_the_step(runs, processes):
    """It comes while step 2 is saved, to the last process only; no save was due after step 3."""
    name = f"term-{processes}"
    runs.finish(f"{name}-straight", processes=processes)
    codes, text = runs(name, ("SIGTERM", 1, "checkpoint-2"), processes=processes, rank=processes - 1)
    assert codes == [143] * processes, text
    folder = runs.folder / name
    assert said(text)[-1] == (
        f"SIGTERM: stopped after step 3 of 8. The last complete checkpoint is {folder}/checkpoint-3. Continue with "
        "the same command and --resume_from_checkpoint true."
    )
    assert not list(folder.glob("adapter_model*")) and not (folder / "run.json").exists()
    assert f"Continuing from {folder}/checkpoint-3." in said(runs.finish(name, processes=processes))
    runs.assert_same(name, f"{name}-straight")


def test_ctrl_c_says_what_is_left(runs):
    codes, text = runs("interrupted", ("SIGINT", 5, "checkpoint-4"))
    assert codes == [1] and "KeyboardInterrupt" in text
    folder = runs.folder / "interrupted"
    assert f"interrupted after step 4. The last complete checkpoint is {folder}/checkpoint-2. Continue with" in text


# --- full disks -----------------------------------------------------------------------------------------------------


def test_a_full_disk(runs, straight):
    """A real one, of 260 kB: one checkpoint fits, two do not."""
    disk = runs.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=260k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        codes, text = runs("disk/out")
        assert codes == [1]
        error = text.splitlines()[-1]
        assert f"SaveError: {disk}/out/checkpoint-4 could not be written" in error
        assert "A checkpoint takes 0.1 MiB. Half of it was written and deleted again. " in error
        assert "MiB are free there. Free some space on that disk, or keep fewer checkpoints" in error
        assert f"The last complete checkpoint is {disk}/out/checkpoint-2. Continue with" in error
        assert [f.name for f in (disk / "out").glob("checkpoint-*")] == ["checkpoint-2"]
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        runs.finish("disk/out")
        got, want = (folder / "adapter_model.safetensors" for folder in (disk / "out", runs.folder / straight))
        assert got.read_bytes() == want.read_bytes()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_files_that_may_not_grow(runs):
    """A folder that was there is not deleted with what was written into it, and is no checkpoint any more."""
    folder = runs.folder / "small" / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("of the user")
    (folder / "complete.json").write_text("of an earlier run")
    codes, text = runs("small", file_limit=16_000, resume_from_checkpoint=None)
    assert codes == [1]
    assert "checkpoint-2 could not be written" in text and "deleted again" not in text
    assert "There is no complete checkpoint: the next run starts from scratch." in text
    assert (folder / "notes.txt").is_file() and not (folder / "complete.json").exists()


def test_a_folder_that_cannot_be_written_is_told_first(runs):
    codes, text = runs("unwritable", output_dir="/sys/kernel/run", dataset_name="nowhere.jsonl")
    assert codes == [1]
    assert "output_dir /sys/kernel/run cannot be written: " in text.splitlines()[-1]


def test_a_damaged_clip_is_skipped(runs, straight):
    """The remedy that the error names: the run goes on with all other rows, in the order that they had."""
    clips, data = runs.folder / "clips-3", runs.folder / "clips-3.jsonl"
    shutil.copytree(runs.folder / "clips", clips)
    data.write_text((runs.folder / "clips.jsonl").read_text().replace("/clips/", "/clips-3/"))
    whole = order(runs.folder / f"{straight}.log")
    rows = {row["id"]: row for row in map(json.loads, data.read_text().splitlines())}
    Path(rows[whole[7]]["videos"][0]).write_bytes(b"damaged")  # of the fourth step
    codes, text = runs("damaged", dataset_name=data, check_media="off")
    assert codes == [1] and "MediaError" in text
    assert (
        f"stopped after step 2. The last complete checkpoint is {runs.folder}/damaged/checkpoint-2." in text
    )  # ahead
    text = runs.finish("damaged", dataset_name=data, on_bad_media="skip")
    assert "on_bad_media: its default when it was saved, 'skip' now. It changes no row that was trained on." in text
    assert order(runs.folder / "damaged.log")[:9] == [row for row in whole[:10] if row != whole[7]]


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
    text = runs.finish("other", max_steps=4, logging_steps=1)
    assert said(text) == [f"Continuing from {runs.folder}/other/checkpoint-2, although"]
    assert "\n  - max_steps: 2 when it was saved, 4 now. The linear schedule of the learning rate is that of" in text
    logged = history(runs.folder / "other" / "checkpoint-4")
    assert [logs["step"] for logs in logged] == [1, 2, 3, 4]
    assert [logs["learning_rate"] for logs in logged] == [1e-2, 5e-3, 5e-3, 2.5e-3]  # the last two: of four steps


def test_another_base_and_other_clips_are_refused(runs):
    """One byte of a weight, the chat template, and a clip that was trained on, each under its old name."""
    base, clips, data = runs.folder / "base", runs.folder / "clips-2", runs.folder / "clips-2.jsonl"
    shutil.copytree(BASE, base)
    shutil.copytree(runs.folder / "clips", clips)
    data.write_text((runs.folder / "clips.jsonl").read_text().replace("/clips/", "/clips-2/"))
    options = {"model_name_or_path": base, "dataset_name": data, "max_steps": 4}
    runs.finish("changed", **options | {"max_steps": 2})
    trained = {name for names in batches(runs.folder / "changed.log").values() for name in next(iter(names))}
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


# --- a bad row that was found in the middle -------------------------------------------------------------------------


def test_a_higher_limit_changes_nothing(runs, straight):
    codes, text = runs("limit", ("SIGKILL", 9, "checkpoint-4"), max_length=2000)
    assert codes == [-9], text
    assert "max_length: 2000 when it was saved, 4000 now. It changes no row" in runs.finish("limit", max_length=4000)
    runs.assert_same("limit", straight)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_row_is_taken_out(runs, straight, processes):
    """All rows before it stay trained, all after it come in their order, and none twice; also when killed again."""
    name = f"taken-{processes}"
    data, options = (
        runs.folder / f"{name}.jsonl",
        {"processes": processes, "per_device_train_batch_size": 2 // processes},
    )
    lines = (runs.folder / "clips.jsonl").read_text().splitlines()
    data.write_text("\n".join(lines))
    codes, text = runs(name, ("SIGKILL", 9, "checkpoint-4"), dataset_name=data, **options)
    assert -9 in codes, text
    whole = order(runs.folder / f"{straight}.log")
    first, gone = whole[0], whole[7]  # of the first and the fourth step
    for taken, message in ((first, "row"), (gone, None)):
        data.write_text("\n".join(line for line in lines if json.loads(line)["id"] != taken))
        codes, text = runs(name, message is None and ("SIGKILL", 9, "checkpoint-6"), dataset_name=data, **options)
        assert ("and 1 of them were trained on before" in text) == (message is not None), text
    assert "1 of 10 rows were taken out" in text and -9 in codes
    text = runs.finish(name, dataset_name=data, **options)
    assert said(text)[-1] == f"Continuing from {runs.folder}/{name}/checkpoint-4."
    kept = [row for row in whole[:10] if row != gone]
    assert order(runs.folder / f"{name}.log")[:9] == kept
    assert gone not in order(runs.folder / f"{name}.log")


def test_a_new_run_in_the_folder_of_an_older_one(runs, straight):
    """Killed before it wrote over all of the older one's checkpoints, it goes on from its own."""
    runs.finish("stale", learning_rate=5e-3)
    codes, text = runs("stale", ("SIGKILL", 9, "checkpoint-6"), resume_from_checkpoint=None)
    assert codes == [-9], text
    folder = runs.folder / "stale"
    text = runs.finish("stale")
    assert said(text)[0].startswith(f"{folder}/checkpoint-6 is not complete"), text  # half of it was written over
    assert said(text)[1].startswith(f"checkpoint-8 of an earlier run in {folder}"), text
    assert f"Continuing from {folder}/checkpoint-4." in said(text)
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
    assert (
        "has checkpoints of an earlier run, the last one checkpoint-8. This run starts from scratch" in said(text)[0]
    )


def test_a_checkpoint_without_its_marker_is_passed_over(runs, straight):
    """It is another program's, or was not finished: what it is of is not known."""
    runs.finish("plain", max_steps=6, logging_steps=2)
    folder = runs.folder / "plain"
    (folder / "checkpoint-6" / "complete.json").unlink()
    text = runs.finish("plain", max_steps=6, logging_steps=2)
    assert "checkpoint-6 is not complete: complete.json, the last file, is missing" in said(text)[0]
    assert said(text)[1:] == [f"Continuing from {folder}/checkpoint-4."]
    (folder / "checkpoint-6" / "complete.json").unlink()
    codes, text = runs("plain", max_steps=6, logging_steps=2, resume_from_checkpoint=folder / "checkpoint-6")
    assert codes == [1] and f"training cannot continue from {folder}/checkpoint-6: complete.json" in text


def test_transformers_own_checkpoint_on_sigterm_is_refused(runs):
    codes, text = runs("jit", enable_jit_checkpoint=True)
    assert codes == [1] and "RecipeError: enable_jit_checkpoint: leave it out." in text
