"""A worker of the study: `python -m studies.testbed.runs JOBS.json OUT` does the jobs of one group, in order.

Every finished job leaves one result, written whole: its settings, the trainer's log, and a record of each held-out
row. A job whose result is there is not done again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studies.testbed import data as study_data
from studies.testbed.plan import BASE, Job, from_json, watched_split

ANSWER_TOKENS, EVALUATED_AT_ONCE = 24, 64
_DECODED: dict[tuple[Path, str], Any] = {}
UNNEEDED = ("contestant", "damaged_logps", "question", "options", "cluster")  # of a record


def main() -> None:
    jobs_file, out = Path(sys.argv[1]), Path(sys.argv[2])
    jobs, parent = from_json(jobs_file.read_text(encoding="utf-8")), os.getppid()
    with _alone(jobs_file):
        for job in jobs:
            if os.getppid() != parent:  # the command was killed: the next one goes on from here
                sys.exit(
                    f"The study that started this worker is gone; {job.name} and what follows are left to the next."
                )
            if not job.result(out).is_file():
                run_job(job, out)


@contextmanager
def _alone(jobs_file: Path) -> Iterator[None]:
    """A worker whose command was killed may still be at its last job: wait for it, and do not do that job twice."""
    with jobs_file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_job(job: Job, out: Path) -> None:
    """Do a job and write its result."""
    import torch

    torch.set_num_threads(1)  # so small a model gains nothing from a second thread
    result: dict[str, Any] = {"name": job.name, "settings": job.settings, "history": [], "generated": None}
    clock, ready = Clock(), True
    if job.settings["train"]:
        data, result["generated"] = _training_file(job, out)
        clock.stop("data")
        result["history"], ready = _trained(job, data, out)
        clock.stop("training")
    if ready:
        result["records"] = evaluate(job, out)
        clock.stop("evaluation")
    result |= {"seconds": clock.wall, "cpu_seconds": clock.cpu, "commit": os.environ.get("STUDY_COMMIT")}
    study_data.write_text(job.result(out), json.dumps(result))
    spent = ", ".join(f"{key} {clock.wall[key]:.0f} s ({clock.cpu[key]:.0f} s of CPU)" for key in clock.wall)
    print(f"{job.name}: {spent}", flush=True)


def _trained(job: Job, data: Path | None, out: Path) -> tuple[list[dict[str, Any]], bool]:
    """The log of a run, and whether there is a model: without rows or after diverging there is none to measure."""
    from trl_vpo.errors import NonFiniteLossError

    if data is None:
        return [], False
    try:
        return run_training(job, data, out), True
    except NonFiniteLossError as error:
        print(f"{job.name}: {error}", flush=True)
        return [], False


class Clock:
    """Seconds of each phase of a job, on the wall and of this process."""

    def __init__(self):
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._began = time.perf_counter(), time.process_time()

    def stop(self, phase: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.wall[phase], self.cpu[phase] = (after - before for after, before in zip(now, self._began))
        self._began = now


# --- training -----------------------------------------------------------------------------------------------------


def run_training(job: Job, data: Path, out: Path) -> list[dict[str, Any]]:
    """Train by the recipe through the entry point of `trl-vpo train`; gives the trainer's log."""
    from trl_vpo.training.run import run_training as train_recipe

    train, adapter = job.settings["train"], job.adapter(out)
    shutil.rmtree(adapter, ignore_errors=True)  # of a run that was killed
    options = {
        "config": f"quickstart/{train['method']}",
        "model_name_or_path": BASE,
        "output_dir": adapter,
        "dataset_name": _watched(train, data, out) if train["watch"] else data,
        "seed": train["seed"],
        "logging_steps": 1,
        "frame_cache": out / "frames",
        **train["options"],
    }
    if train["watch"]:
        options |= {"eval_strategy": "steps", "eval_steps": train["watch"]["steps"], "eval_on_start": True}
    trainer = train_recipe(train["method"], [word for k, v in options.items() for word in (f"--{k}", str(v))])
    return trainer.state.log_history


def _watched(train: dict[str, Any], data: Path, out: Path) -> Path:
    """A folder with the training rows and, as its test split, the validation rows that are looked at in training."""
    watch, folder = train["watch"], data.with_name(f"{data.stem}-watched-{train['watch']['rows']}")
    rows, _ = study_data.held_out_rows(watched_split(watch), out / "data")
    lines = rows.read_text(encoding="utf-8").splitlines()[: watch["rows"]]
    study_data.write_text(folder / "test.jsonl", "".join(f"{line}\n" for line in lines))
    study_data.write_text(folder / "train.jsonl", data.read_text(encoding="utf-8"))
    return folder


def _training_file(job: Job, out: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The rows of a run, and what the pipeline says of them where the base made them; no file if it made none."""
    data = dict(job.settings["train"]["data"])
    made_by = data.pop("made_by", None)
    if made_by is None:
        return study_data.training_rows(data, out / "data"), None
    from trl_vpo.generate.run import run_generation

    method, run = job.settings["train"]["method"], out / "made" / job.stem
    inputs = study_data.generation_inputs(data, method, out / "data")
    options = ["--config", f"quickstart/{method}-generate", "--dataset_name", inputs, "--output_dir", run]
    options += ["--model_name_or_path", BASE, "--seed", job.settings["train"]["seed"]]
    if made_by != "base":
        options += ["--from_adapter", out / "runs" / made_by]
    summary = run_generation(method, [str(word) for word in options])
    rows = run / "rows.jsonl"
    return (rows if summary["rows"] else None), {key: summary[key] for key in ("inputs", "rows", "figures")}


# --- evaluation ---------------------------------------------------------------------------------------------------


def evaluate(job: Job, out: Path) -> list[dict[str, Any]]:
    """A record for each held-out row, as `trl-vpo evaluate` writes them: of the base, or of the job's adapter."""
    from trl_vpo.data.inputs import read_inputs
    from trl_vpo.evaluate.config import EvaluateConfig
    from trl_vpo.evaluate.rows import read_rows
    from trl_vpo.evaluate.run import evaluate_batch

    trained = bool(job.settings["train"])
    path, _ = study_data.held_out_rows(job.settings["held_out"], out / "data")
    config = EvaluateConfig(
        model_name_or_path=str(BASE), adapters=[str(job.adapter(out))] if trained else [], dataset_name=str(path),
        device="cpu", batch_size=EVALUATED_AT_ONCE, max_new_tokens=ANSWER_TOKENS, num_frames=8, sensitivity=["none"],
        answer_preferences=True,
    )  # fmt: skip
    inputs = read_inputs(**config.input_options())
    rows, candidates = read_rows(inputs), _candidates(config)
    records = []
    for start in range(0, len(rows), EVALUATED_AT_ONCE):
        sources = [(row, inputs[row.place]) for row in rows[start : start + EVALUATED_AT_ONCE]]
        batch = [(row, source, _media(path, source, config)) for row, source in sources]
        for outcome in evaluate_batch(candidates, batch, config):
            if outcome.reason:
                raise ValueError(f"{job.name}: {outcome.reason}")
            records.append({k: v for k, v in outcome.rows[-1].items() if k not in UNNEEDED})
    return records


def _media(path: Path, source: Any, config: Any) -> Any:
    """A row's media, decoded once for all runs of the group: 2,000 clips are 150 MB."""
    from trl_vpo.data.inputs import load_media

    key = path, source.id
    if key not in _DECODED:
        _DECODED[key] = load_media(source, config.video_options())
    return _DECODED[key]


def _candidates(config: Any) -> Any:
    """The base beside its adapter. The base's answers are known from its own job: it is scored, for the KL, only."""
    from trl_vpo.evaluate.candidates import load_candidates

    models = load_candidates(config.adapters, **config.model_options())
    models.names = models.names[-1:]
    return models


if __name__ == "__main__":
    main()
