"""`run.json`: what was run, with what, on what, and how it ended."""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trl_vpo.data.identity import versions
from trl_vpo.files import atomic_write
from trl_vpo.runs.secrets import scrub


def write_run_record(
    trainer: Any,
    *,
    method: str,
    recipe: dict[str, Any],
    recipe_path: str | None,
    rows: int | None,
    metrics: dict[str, Any],
    started: datetime,
) -> Path:
    """Write `run.json` into the trainer's output folder, whole or not at all, and give its path.

    Args:
        trainer: after training.
        method: a key of `trl_vpo.training.run.METHODS`.
        recipe: every argument that differs from its default.
        recipe_path: the recipe file, if there was one.
        rows: how many rows the train split has; None if it is streamed.
        metrics: what `trainer.train` gave.
        started: when the run began, UTC.
    """
    trained = len(trainer.train_dataset) if rows is not None else None
    record = {
        "method": method,
        "seed": trainer.args.seed,
        "recipe": recipe,
        "recipe_path": recipe_path,
        "rows": {"trained": trained, "skipped": None if rows is None else rows - trained},
        "metrics": {"train": _last(trainer.state.log_history, "loss") | metrics}
        | ({"eval": found} if (found := _last_eval(trainer.state.log_history)) else {}),
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "device": device_name(trainer.args.device),
        "python": platform.python_version(),
        "versions": versions(),
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = Path(trainer.args.output_dir) / "run.json"
    with atomic_write(path) as part:
        part.write_text(json.dumps(scrub(record), indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def device_name(device: torch.device) -> str:
    """`NVIDIA H100 80GB HBM3`, or `cpu (x86_64)`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _last(history: list[dict], key: str) -> dict:
    return next((dict(logs) for logs in reversed(history) if key in logs), {})


def _last_eval(history: list[dict]) -> dict:
    """The last evaluation; with several evaluation sets, the last of each."""
    found: dict[str, Any] = {}
    for logs in reversed(history):
        if any(key.startswith("eval_") for key in logs) and not set(logs) <= set(found):
            found = {**logs, **found}
    return found
