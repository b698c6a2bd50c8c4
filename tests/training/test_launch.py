"""Signals to a launcher reach the training that it started: the real launcher, real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers import KITS
from resume_runs import RECIPE

from trl_vpo.testbed.rows import write_jsonl, write_preferences

ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


OURS = [sys.executable, "-m", "trl_vpo", "train"]
BARE = {
    "accelerate": ["-m", "accelerate.commands.launch", "--num_processes", "1", "scripts/train.py"],
    "accelerate two": ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu2.yaml",
                       "-m", "trl_vpo", "train"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "trl_vpo", "train"],
}  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """Starts a long run; gives its process and log once the first checkpoint is whole."""
    _, rows = write_preferences("clip", 10, 3, tmp_path / "clips")
    write_jsonl(rows * 20, tmp_path / "clips.jsonl")  # epochs that are longer than the test
    started = []

    def run(*launch, command=OURS, **recipe):
        defaults = {"dataset_name": tmp_path / "clips.jsonl", "output_dir": tmp_path / "out"}
        defaults |= {"max_steps": 5000, "save_total_limit": 2}
        recipe = RECIPE | defaults | recipe
        options = [part for key, value in recipe.items() for part in (f"--{key}", str(value))]
        log = tmp_path / "log.txt"
        with log.open("a") as file:
            process = subprocess.Popen(
                [*command, "rrpo", *options, *launch], stdout=file, stderr=file, env=ENV, cwd=KITS.parents[1],
                start_new_session=True,
            )  # fmt: skip
        started.append(process)
        wait_for(lambda: list((tmp_path / "out").glob("checkpoint-*/complete.json")), process, log)
        return process, log

    yield run
    for process in started:
        for pid in {process.pid, *training_processes(tmp_path / "out")}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, process, log):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def training_processes(folder):
    """Those that were started for an output folder and still run."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if str(folder) in words:
            pids.append(int(path.parent.name))
    return pids


def saved_when_stopped(log, folder, name="SIGTERM"):
    """See that the run said where it stopped, that this is saved, and that nothing failed."""
    text = log.read_text()
    assert "Error" not in text.replace("ChildFailedError", ""), text
    stopped = re.search(rf"{name}: stopped after step (\d+) of 5000\. The last complete checkpoint is", text)
    assert stopped, text
    step = stopped.group(1)
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["global_step"] == int(step)
    assert (folder / f"checkpoint-{step}" / "complete.json").is_file()
    return text


WORKERS = {"dataloader_num_workers": 2, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
WORKERS |= {"test_split_size": 0.1}
SPAWNED = {"dataloader_num_workers": 1, "eval_steps": 1000}  # each imports everything


@pytest.mark.parametrize(
    ("launch", "recipe"),
    [
        pytest.param(("--num_processes", "1"), {}, marks=pytest.mark.slow),
        pytest.param(("--accelerate_config", "cpu2"), {}, marks=pytest.mark.distributed),
        pytest.param((), {"dataloader_persistent_workers": True}, marks=pytest.mark.slow),
        pytest.param((), SPAWNED | {"dataloader_multiprocessing_context": "spawn"}, marks=pytest.mark.slow),
        pytest.param((), SPAWNED | {"dataloader_multiprocessing_context": "forkserver"}, marks=pytest.mark.slow),
    ],
    ids=["one", "two", "persistent", "spawn", "forkserver"],
)
def test_sigterm_to_the_whole_job_saves_and_exits_with_143(start, tmp_path, launch, recipe):
    """As schedulers send it: the launcher, the ranks and the processes that load data get it, and get it again."""
    process, log = start(*launch, **WORKERS | recipe)
    for _ in range(3):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    assert process.wait(120) == 143, log.read_text()
    assert training_processes(tmp_path / "out") == []
    assert "Traceback" not in saved_when_stopped(log, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("launch", [("--num_processes", "1"), ("--accelerate_config", "cpu2")], ids=["one", "two"])
def test_a_signal_to_the_launcher_alone(start, tmp_path, launch, number):
    process, log = start(*launch, **WORKERS)
    process.send_signal(number)
    assert process.wait(120) == 143, log.read_text()
    assert training_processes(tmp_path / "out") == []
    assert "Traceback" not in saved_when_stopped(log, tmp_path / "out", number.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_launchers_of_others(start, tmp_path, name, number):
    """SIGTERM to the whole job; or the launcher alone is killed, and its processes end by themselves."""
    process, log = start(command=[sys.executable, *BARE[name]], use_cpu=True, **WORKERS)
    os.killpg(process.pid, number) if number == signal.SIGTERM else process.kill()
    process.wait(120)
    deadline = time.monotonic() + 60
    while training_processes(tmp_path / "out"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    saved_when_stopped(log, tmp_path / "out")


@pytest.mark.slow
def test_ctrl_c_to_the_launcher_ends_the_training(start, tmp_path):
    process, log = start("--num_processes", "1")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()
    assert training_processes(tmp_path / "out") == []
    assert "interrupted after step" in log.read_text()


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_killed_worker_is_named(start, tmp_path):
    process, log = start(dataloader_num_workers=1, dataloader_persistent_workers=True)
    second = subprocess.run(process.args, capture_output=True, text=True, env=ENV, cwd=KITS.parents[1], timeout=200)
    assert second.returncode == 1
    assert f"another training writes to output_dir {tmp_path}/out: pid {process.pid} on " in second.stderr
    (worker,) = (child for child in psutil.Process(process.pid).children() if "spawn" not in " ".join(child.cmdline()))
    worker.kill()
    assert process.wait(60) == 1
    text = log.read_text()
    assert re.search(
        rf"error: DataLoader worker \(pid(\(s\))? {worker.pid}\) .*, after step \d+\. It loads rows; most", text
    )
    assert "Continue with the same command" in text and "Traceback" not in text
