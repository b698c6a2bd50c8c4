"""`run.json`: what was run, with what, on what, and how it ended."""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trl_vpo.data.identity import versions
from trl_vpo.files import atomic_write
from trl_vpo.media.budget import budget_of_run
from trl_vpo.runs.secrets import scrub


def write_run_json(
    trainer: Any, about: dict[str, Any], rows: int | None, metrics: dict[str, Any], started: datetime
) -> None:
    """Write `run.json` into the output folder of a trained trainer, whole or not at all.

    `about` has the method, the recipe without defaults, and digests of what it names; `rows` is the size of the train
    split (None: streamed), `metrics` are what `trainer.train` returned.
    """
    trained = len(trainer.train_dataset) if rows is not None else None
    history, device = trainer.state.log_history, trainer.args.device
    evaluation: dict[str, Any] = {}  # the last; with several evaluation sets, the last of each
    for logs in reversed(history):
        if any(key.startswith("eval_") for key in logs) and not set(logs) <= set(evaluation):
            evaluation = {**logs, **evaluation}
    machine = f"{device.type} ({platform.machine()})"
    record = {
        **about,
        "seed": trainer.args.seed,
        "rows": {"trained": trained, "skipped": None if rows is None else rows - trained},
        "metrics": {
            "train": next((logs for logs in reversed(history) if "loss" in logs), {}) | metrics,
            **({"eval": evaluation} if evaluation else {}),
        },
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine,
        "python": platform.python_version(),
        "video_budget": str(budget) if (budget := budget_of_run(trainer)) else None,
        "versions": versions(),
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with atomic_write(Path(trainer.args.output_dir) / "run.json") as part:
        part.write_text(json.dumps(scrub(record), indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
