"""What a run is: kept in its checkpoints, and compared when training goes on from one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from datasets import Dataset

from trl_vpo.data.identity import versions
from trl_vpo.runs.digests import model_files, row_digests
from trl_vpo.runs.secrets import scrub

# Recipe keys that change nothing about the weights: where things are, what is written, how data are loaded.
FREE = {"output_dir", "run_name", "resume_from_checkpoint", "project", "disable_tqdm", "push_to_hub"}
FREE |= {"frame_cache", "precompute_cache_dir", "check_media", "media_root", "ddp_timeout", "skip_memory_metrics"}
FREE |= {"include_num_input_tokens_seen", "dataset_num_proc", "restore_callback_states_from_checkpoint"}
FREE_PREFIXES = ("logging_", "log_", "save_", "hub_", "report_to", "trackio_", "dataloader_num_", "dataloader_pin_")
FREE_PREFIXES += ("dataloader_prefetch_", "dataloader_persistent_")
# May be changed; the rest of the run is then not, bit for bit, what it would have been.
SCHEDULE = {"max_steps", "num_train_epochs"}
LOOSE = {
    "per_device_eval_batch_size",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "metric_for_best_model",
}
LOOSE |= {"load_best_model_at_end", "greater_is_better"}
LOOSE_PREFIXES = ("eval_", "test_split_", "dataset_test_")
DATA = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_streaming", "datasets")
MODEL = ("model_name_or_path", "model_revision")  # clusters copy models to a disk that is new with every job
CHECKS = {"max_length", "on_bad_media"}  # which rows are refused; nothing is cut


def describe_run(trainer: Any, method: str, given: dict[str, Any]) -> dict:
    """What decides the outcome of a run.

    Args:
        trainer: before training.
        method: a key of `trl_vpo.training.run.METHODS`.
        given: every argument of the recipe that differs from its default.
    """
    args, first = trainer.args, trainer.is_world_process_zero()  # it alone compares
    recipe = json.loads(json.dumps(scrub(given), default=str))
    return {
        "method": method,
        "recipe": {
            key: value for key, value in recipe.items() if key not in FREE and not key.startswith(FREE_PREFIXES)
        },
        "processes": args.world_size,
        "rows per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "distributed": str(trainer.accelerator.distributed_type),
        "model files": model_files(given["model_name_or_path"], given.get("model_revision")) if first else {},
        "scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "versions": versions(),
    }


def digest_rows(trainer: Any) -> np.ndarray | None:
    """A hash of each row, on the main process; None for a stream."""
    rows = trainer.train_dataset
    known = isinstance(rows, Dataset) and trainer.is_world_process_zero()
    return row_digests(rows, trainer.args.media_root) if known else None


def compare_runs(saved: dict, now: dict, *, same_rows: bool) -> tuple[list[str], list[str]]:
    """(differences that are refused, differences that are warned of), one line each.

    Args:
        saved: of the checkpoint.
        now: of the run that is to go on.
        same_rows: the rows themselves were compared, wherever they lie.
    """
    refused, warned = _compare_model(saved, now)
    for key in ("method", "processes", "distributed", "rows per step"):
        if saved[key] != now[key]:
            refused.append(f"{key}: {saved[key]} when it was saved, {now[key]} now")
    old, new = saved["recipe"], now["recipe"]
    for key in sorted(set(old) | set(new)):
        if old.get(key) == new.get(key) or (same_rows and key in DATA) or key in MODEL:
            continue
        change = f"{key}: {_shown(old, key)} when it was saved, {_shown(new, key)} now"
        if key in CHECKS:
            warned.append(f"{change}. It changes no row that was trained on.")
        elif key in SCHEDULE:
            warned.append(f"{change}. The {now['scheduler']} schedule of the learning rate is that of the new length.")
        elif key in LOOSE or key.startswith(LOOSE_PREFIXES):
            warned.append(f"{change}. The rest of the run may differ in rounding and random numbers.")
        else:
            refused.append(change)
    for name, version in now["versions"].items():
        if saved["versions"].get(name) != version:
            warned.append(
                f"{name} was {saved['versions'].get(name)} and is {version}: results may differ in rounding."
            )
    return refused, warned


def _compare_model(saved: dict, now: dict) -> tuple[list[str], list[str]]:
    """Of the files that the base, its processor and its chat template are loaded from."""
    if "model files" not in saved:
        return [], ["it was saved by an earlier version: whether model, rows and clips are the same is not known."]
    old, new = saved["model files"], now["model files"]
    names = [run["recipe"].get("model_name_or_path") for run in (saved, now)]
    if not old or not new:  # not on this machine, but for what transformers has loaded
        unknown = f"the model was {names[0]} and is {names[1]}: whether it is the same is not known."
        return [], [unknown] if names[0] != names[1] else []
    files = sorted(name for name in set(old) | set(new) if old.get(name) != new.get(name))
    if not files:
        return [], []
    shown = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    return [f"model: {shown} of {names[1]} are not what the run was begun with, of {names[0]}"], []


def _shown(recipe: dict, key: str) -> str:
    return repr(recipe[key]) if key in recipe else "its default"
