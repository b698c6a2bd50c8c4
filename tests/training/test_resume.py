"""Runs that are killed, stopped, or run out of disk, and continue: the result is that of an undisturbed run.

Dropout is on, and logs, saves and epochs do not fall together, so that random numbers, half-filled sums and the place
in the data all have to be right.
"""

import json
import os
import random
import re
import subprocess

import pytest
from resume_runs import batches_of, history, printed

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "test_split_size": 0.4}
EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "gradient_accumulation_steps": 2}
SHARED_ROWS = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"}
FULL = {"use_peft": False, "freeze_vision": True, "learning_rate": 1e-3}


# --- SIGKILL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_kills(runs, count):
    """At random moments: while files are written, while a checkpoint appears, and after some time."""
    recipe = {"max_steps": 12, "save_steps": 1, "save_total_limit": 2, "gradient_accumulation_steps": 2}
    name = f"kills-{count}"
    runs.finish(f"{name}-straight", **recipe)
    dice = random.Random(0)
    moments = [("SIGKILL", dice.randint(1, 45), "") for _ in range(count)]
    moments[2:2] = [("seconds", dice.uniform(0.1, 0.4)) for _ in range(2)]
    for moment in moments:
        codes, text = runs(name, moment, **recipe)
        assert codes == [-9], text
    for file in ("adapter_model.safetensors", "optimizer.pt"):
        newest = max([0, *(int(f.name.split("-")[1]) for f in (runs.folder / name).glob("checkpoint-*"))])
        codes, text = runs(name, ("file", f"{runs.folder}/{name}/checkpoint-{newest + 1}/{file}"), **recipe)
        assert codes == [-9], text
    assert "Continuing from" in runs.finish(name, **recipe)
    runs.assert_same(name, f"{name}-straight")
    kept = sorted(f.name for f in (runs.folder / name).glob("checkpoint-*"))
    assert kept == ["checkpoint-11", "checkpoint-12"]


@pytest.mark.parametrize(("name", "env"), [("two", None), pytest.param("shared", SHARED_ROWS, marks=pytest.mark.slow)])
def test_two_processes(runs, name, env):
    recipe = {"processes": 2, "save_total_limit": 1, "env": env}
    runs.finish(f"{name}-straight", **recipe)
    moments = [("SIGKILL", 9, "checkpoint-4"), ("SIGKILL", 1, "checkpoint-4"), ("seconds", 0.5)]
    moments += [("SIGKILL", 15, "checkpoint-6")]
    for moment, rank in zip(moments, (0, 1, 0, 0)):
        codes, text = runs(name, moment, rank=rank, **recipe)
        assert -9 in codes and 0 not in codes, text  # the other one may have failed before it was killed
    runs.finish(name, **recipe)
    runs.assert_same(name, f"{name}-straight")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("leanpo", {"method": "leanpo"}),
        ("full", {"method": "dpo", **FULL}),
        pytest.param("lpoi", {"method": "lpoi"}, marks=pytest.mark.slow),
        pytest.param("dpo", {"method": "dpo", "precompute_ref_log_probs": True}, marks=pytest.mark.slow),
        ("stream", {"dataset_streaming": True}),
        ("start", {"method": "dpo", **EVALUATING, "eval_on_start": True}),
        pytest.param("epochs", EPOCHS, marks=pytest.mark.slow),
    ],
)
def test_each_kind_of_run(runs, name, options):
    runs.finish(f"{name}-straight", **options)
    last = {"epochs": "checkpoint-6", "stream": "checkpoint-8"}.get(name, "checkpoint-4")  # in the second pass
    codes, text = runs(name, ("SIGKILL", 9, last), **options)
    assert codes == [-9], text
    begun = int(re.search(r"Continuing from .*checkpoint-(\d+)", runs.finish(name, **options))[1])
    runs.assert_same(name, f"{name}-straight")
    record = json.loads((runs.folder / name / "run.json").read_text())
    speed = record["metrics"]["train"]["train_steps_per_second"] * record["metrics"]["train"]["train_runtime"]
    assert speed == pytest.approx(record["steps"] - begun, rel=0.1)


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


def test_the_best_checkpoint_moves_with_its_folder(runs):
    """Before the result was written: no further save looks for the best one, which is an early one here."""
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "load_best_model_at_end": True}
    options = {**EVALUATING, **best, "method": "dpo", "learning_rate": 0.1}
    runs.finish("here", **options)
    (runs.folder / "here" / "adapter_model.safetensors").unlink()
    state = json.loads((runs.folder / "here" / "checkpoint-8" / "trainer_state.json").read_text())
    name = f"checkpoint-{state['best_global_step']}"
    assert name != "checkpoint-8"
    (runs.folder / "here").rename(runs.folder / "there")
    (runs.folder / "there" / name).rename(runs.folder / "aside")
    codes, text = runs("there", **options)
    assert codes == [1] and f"best checkpoint until checkpoint-8 was {name}, and it cannot be loaded" in text
    (runs.folder / "aside").rename(runs.folder / "there" / name)
    assert "best checkpoint" not in runs.finish("there", **options)
    got, want = (f / "adapter_model.safetensors" for f in (runs.folder / "there", runs.folder / "there" / name))
    assert got.read_bytes() == want.read_bytes()


def test_a_finished_run_takes_no_more_steps(runs, straight):
    """Killed after the last checkpoint, before the result was written; the last step is not an epoch's last."""
    runs.finish("again")
    (runs.folder / "again" / "adapter_model.safetensors").write_bytes(b"half")
    assert printed(runs.finish("again")) == [f"Continuing from {runs.folder}/again/checkpoint-8."]
    runs.assert_same("again", straight)
    assert max(step for _, step in batches_of(runs.folder / "again.log")) == 7


# --- SIGTERM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sigterm_saves_at_the_end_of_the_step(runs, processes):
    """It comes while step 2 is saved, to the last process only; no save was due after step 3."""
    name = f"term-{processes}"
    runs.finish(f"{name}-straight", processes=processes)
    codes, text = runs(name, ("SIGTERM", 1, "checkpoint-2"), processes=processes, rank=processes - 1)
    assert codes == [143] * processes, text
    folder = runs.folder / name
    assert printed(text)[-1] == (
        f"SIGTERM: stopped after step 3 of 8. The last complete checkpoint is {folder}/checkpoint-3. Continue with "
        "the same command and --resume_from_checkpoint true."
    )
    assert not list(folder.glob("adapter_model*")) and not (folder / "run.json").exists()
    assert f"Continuing from {folder}/checkpoint-3." in printed(runs.finish(name, processes=processes))
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
        assert "Half of it was written and deleted again. " in error
        assert "MiB are free there. Free some space on that disk (or its quota), or keep" in error
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
    codes, text = runs("small", file_limit=26_000, resume_from_checkpoint=None)
    assert codes == [1]
    assert "checkpoint-2 could not be written" in text and "deleted again" not in text
    assert "There is no complete checkpoint: the next run starts from scratch." in text
    assert (folder / "notes.txt").is_file() and not (folder / "complete.json").exists()
