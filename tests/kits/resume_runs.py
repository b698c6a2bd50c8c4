"""Runs that tests start, kill and compare: all are forks of one process that has imported TRL, see resume_run.py."""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from forks import Server

from trl_vpo.testbed.rows import write_jsonl, write_preferences
from trl_vpo.testbed.tiny_vlm import BASE

RECIPE = {
    "model_name_or_path": BASE,
    "use_peft": True,
    "lora_r": 2,
    "lora_dropout": 0.1,
    "lora_target_modules": r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)",
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "max_steps": 8,
    "logging_steps": 3,
    "save_steps": 2,
    "num_frames": 2,
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
    "resume_from_checkpoint": True,
}
SPEEDS = ("runtime", "per_second")  # of the steps since the run was continued


class Runs(Server):
    """Starts runs in the folder of a test module."""

    def __init__(self, folder):
        self.folder = folder
        for kind, name in (("clip", "clips"), ("scene", "scenes")):
            write_jsonl(write_preferences(kind, 10, 3, folder / name)[1], folder / f"{name}.jsonl")
        super().__init__("resume_run.py")

    def __call__(self, name, kill=None, *, method="rrpo", processes=1, file_limit=None, rank=0, env=None, **recipe):
        """Run once. The exit codes of the processes, and what the first one printed."""
        data = self.folder / ("scenes.jsonl" if method == "lpoi" else "clips.jsonl")
        recipe = RECIPE | {"dataset_name": data, "output_dir": self.folder / name} | recipe
        argv = [part for key, value in recipe.items() if value is not None for part in (f"--{key}", str(value))]
        log = self.folder / f"{name.replace('/', '_')}.log"
        job = {"method": method, "argv": argv, "log": str(log), "processes": processes, "kill": kill, "rank": rank}
        codes = self.ask(job | {"file_limit": file_limit, "env": env or {}, "output_dir": recipe["output_dir"]})
        return codes, Path(f"{log}.0.txt").read_text(errors="replace")

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
        order = batches_of(self.folder / f"{reference}.log")
        for step, names in batches_of(self.folder / f"{name}.log").items():
            assert names <= order[step], step


def history(checkpoint):
    return [without_speed(logs) for logs in json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]]


def without_speed(logs):
    return {key: value for key, value in logs.items() if not key.endswith(SPEEDS)}


def batches_of(log):
    """(rank, step) -> the batches that were trained on then, in whichever attempt."""
    batches = defaultdict(set)
    for entry in map(json.loads, log.read_text().splitlines()):
        batches[entry["rank"], entry["step"]].add(tuple(entry["names"]))
    return batches


def order(log):
    """The ids of the rows in the order in which they were trained on, by the last attempt at each step."""
    entries = map(json.loads, log.read_text().splitlines())
    last = {(entry["step"], entry["rank"]): entry["names"] for entry in entries}
    return [re.search(r"id '([^']+)'", name).group(1) for at in sorted(last) for name in last[at]]


def printed(text):
    return re.findall(r"^trl-vpo: (.*)", text, re.MULTILINE)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    starter = Runs(tmp_path_factory.mktemp("resume"))
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def straight(runs):
    """A run that nothing happened to."""
    text = runs.finish("straight")
    assert printed(text) == [f"{runs.folder}/straight has no complete checkpoint: training starts from scratch."]
    logged = history(runs.folder / "straight" / "checkpoint-8")
    assert [logs["step"] for logs in logged] == [3, 6]
    return "straight"
