"""What a run is: kept in its checkpoints, and compared when training goes on from one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from datasets import Dataset

import trl_vpo
from trl_vpo.data.rows import COLUMNS, ROW_INDEX
from trl_vpo.report.run_record import scrub

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
MEDIA = {"videos", "video", "images", "image", "image_list"}


def describe_run(trainer: Any, method: str, given: dict[str, Any]) -> dict:
    """What decides the outcome of a run.

    Args:
        trainer: before training.
        method: a key of `trl_vpo.train.METHODS`.
        given: every argument of the recipe that differs from its default.
    """
    args, rows, first = trainer.args, trainer.train_dataset, trainer.is_world_process_zero()  # it alone compares
    recipe = json.loads(json.dumps(scrub(given), default=str))
    return {
        "method": method,
        "recipe": {
            key: value for key, value in recipe.items() if key not in FREE and not key.startswith(FREE_PREFIXES)
        },
        "processes": args.world_size,
        "rows per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "distributed": str(trainer.accelerator.distributed_type),
        "rows": len(rows) if isinstance(rows, Dataset) else None,
        "data": digest_rows(rows) if first and isinstance(rows, Dataset) else None,
        "weights": digest_weights(trainer.accelerator.unwrap_model(trainer.model)) if first else None,
        "scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "versions": trl_vpo.versions(),
    }


def digest_rows(dataset: Dataset) -> str:
    """A hash of all rows in their order: texts, phrases, boxes and ids. Media are not opened, and may have moved."""
    columns = sorted(name for name in dataset.column_names if name in ({*COLUMNS, ROW_INDEX} - MEDIA))
    digest = hashlib.sha256(json.dumps(columns).encode())
    for batch in dataset.select_columns(columns).with_format("arrow").iter(1000):
        digest.update(json.dumps(batch.to_pylist(), default=str).encode())
    return digest.hexdigest()


@torch.no_grad()
def digest_weights(model: torch.nn.Module) -> str:
    """A hash of names, shapes and the first 8 numbers of the weights that training begins with, but for new LoRA."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            first = weight.reshape(-1)[:8].float().tolist()
            digest.update(json.dumps([name, list(weight.shape), first]).encode())
    return digest.hexdigest()


def compare_runs(saved: dict, now: dict) -> tuple[list[str], list[str]]:
    """(differences that are refused, differences that are warned of), one line each."""
    refused, warned = [], []
    known = saved["data"] is not None and now["data"] is not None
    for key in ("method", "processes", "distributed", "rows per step", "rows"):
        if saved[key] != now[key]:
            refused.append(f"{key}: {saved[key]} when it was saved, {now[key]} now")
    if known and saved["data"] != now["data"] and saved["rows"] == now["rows"]:
        refused.append("data: as many rows, but not the same ones, or in another order")
    if saved["weights"] != now["weights"]:
        names = [run["recipe"].get("model_name_or_path") for run in (saved, now)]
        refused.append(f"model: the weights of {names[1]} are not those that it was begun with, of {names[0]}")
    old, new = saved["recipe"], now["recipe"]
    for key in sorted(set(old) | set(new)):
        if old.get(key) == new.get(key) or (known and key in DATA) or key in MODEL:
            continue
        change = f"{key}: {_shown(old, key)} when it was saved, {_shown(new, key)} now"
        if key in SCHEDULE:
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


def _shown(recipe: dict, key: str) -> str:
    return repr(recipe[key]) if key in recipe else "its default"
