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

import pytest
from test_resume import BASE, RECIPE, ROOT

from trl_vpo.testbed.rows import write_jsonl, write_preferences

ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def start(tmp_path):
    """Starts a long run through the launcher; gives its process and log once the first checkpoint is whole."""
    _, rows = write_preferences("clip", 10, 3, tmp_path / "clips")
    write_jsonl(rows * 20, tmp_path / "clips.jsonl")  # epochs that are longer than the test
    started = []

    def run(*launch, **recipe):
        recipe = RECIPE | {"model_name_or_path": BASE, "dataset_name": tmp_path / "clips.jsonl"} | recipe
        recipe |= {"output_dir": tmp_path / "out", "max_steps": 5000, "save_total_limit": 2}
        options = [part for key, value in recipe.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "trl_vpo.cli", "train", "rrpo", *options, *launch]
        log = tmp_path / "log.txt"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=ENV, cwd=ROOT, start_new_session=True)
        started.append(process)
        deadline = time.monotonic() + 300
        while not list((tmp_path / "out").glob("checkpoint-*/complete.json")):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        return process, log

    yield run
    for process in started:
        for pid in {process.pid, *training_processes(tmp_path / "out")}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def training_processes(folder):
    """Those that were started for an output folder and still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if str(folder) in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(
    "launch",
    [("--num_processes", "1"), pytest.param(("--accelerate_config", "cpu2"), marks=pytest.mark.distributed)],
    ids=["one", "two"],
)
def test_sigterm_to_the_launcher_saves_and_exits_with_143(start, tmp_path, launch):
    """With workers that load data, which the signal must not reach."""
    process, log = start(*launch, dataloader_num_workers=1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, log.read_text()
    assert training_processes(tmp_path / "out") == []
    text = log.read_text()
    assert "Traceback" not in text, text
    step = re.search(r"SIGTERM: stopped after step (\d+) of 5000\. The last complete checkpoint is", text).group(1)
    state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["global_step"] == int(step)
    assert (tmp_path / "out" / f"checkpoint-{step}" / "complete.json").is_file()


@pytest.mark.slow
def test_ctrl_c_to_the_launcher_ends_the_training(start, tmp_path):
    process, log = start("--num_processes", "1")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()
    assert training_processes(tmp_path / "out") == []
    assert "interrupted after step" in log.read_text()
