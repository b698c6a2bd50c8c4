"""The identity of a run: kept in its checkpoints, and compared when training continues from one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from trl_vpo.data.chat import same_start
from trl_vpo.data.identity import versions
from trl_vpo.files import file_digest, json_digest
from trl_vpo.media.budget import budget_of_run
from trl_vpo.runs.digests import model_files, row_digests
from trl_vpo.runs.resume_rules import TRAIN_DATA, TRAIN_MODEL, fixed_recipe, warning_of_change
from trl_vpo.runs.secrets import scrub
from trl_vpo.trainers.fingerprint import rendered_prompt
from trl_vpo.training.stream_rows import compare_streams, describe_stream, files_identity, stream_files, text_digests


def describe_run(trainer: Any, method: str, given: dict[str, Any]) -> dict:
    """Describe all that decides the outcome of a run, of which `given` are the arguments that are not defaults."""
    args = trainer.args
    compares = trainer.is_world_process_zero()
    return {
        "method": method,
        "recipe": fixed_recipe(json.loads(json.dumps(scrub(given), default=str))),
        "processes": args.world_size,
        "rows per step": trainer.get_total_train_batch_size(args),
        "distributed": str(trainer.accelerator.distributed_type),
        "mixed precision": trainer.accelerator.mixed_precision,  # of the recipe, or else of the launcher
        "ZeRO stage": getattr(getattr(trainer.accelerator.state, "deepspeed_plugin", None), "zero_stage", None),
        "model files": model_files(given["model_name_or_path"], given.get("model_revision")) if compares else {},
        "prompt": rendered_prompt(trainer.processing_class) if compares else None,
        "scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "video_budget": str(budget_of_run(trainer)),
        "evaluated": _digest_evaluated(trainer, given) if compares else None,
        "stream": describe_stream(trainer, _train_files(given)) if compares and _streams(trainer) else None,
        "versions": versions(),
    }


def contents(given: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of what arguments name on this machine: the base, by its `files`, and a file of rows."""
    found = {}
    if files:
        found["model_name_or_path"] = json_digest(files)
    if (name := given.get("dataset_name")) and (path := Path(name)).is_file():
        found["dataset_name"] = file_digest(path)
    return found


def digest_rows(trainer: Any, given: Mapping[str, Any]) -> np.ndarray | None:
    """The digest of each row, on the main process; None for a stream whose rows are not known (`text_digests`)."""
    if not trainer.is_world_process_zero():
        return None
    if _streams(trainer):
        return text_digests(_train_files(given))
    return row_digests(trainer.train_dataset, trainer.args.media_root)


def _digest_evaluated(trainer: Any, given: Mapping[str, Any]) -> str | None:
    """One digest of the rows that are evaluated on; None where there are none, or they are not on this machine."""
    rows = trainer.eval_dataset
    if isinstance(rows, Dataset):
        return json_digest(row_digests(rows, trainer.args.media_root).tolist())
    files = stream_files(given, given.get("dataset_test_split") or "test") if rows is not None else []
    digests = text_digests(files)
    return json_digest(files_identity(files) if digests is None else digests.tolist()) if files else None


def _streams(trainer: Any) -> bool:
    return not isinstance(trainer.train_dataset, Dataset)


def _train_files(given: Mapping[str, Any]) -> list[Path]:
    return stream_files(given, given.get("dataset_train_split") or "train")


def evaluates_on_others(saved: dict, now: dict) -> bool:
    """Return whether the rows that are evaluated on are known, and not those of before."""
    return None not in (old := saved.get("evaluated"), new := now.get("evaluated")) and old != new


def compare_runs(saved: dict, now: dict, *, same_rows: bool) -> tuple[list[str], list[str]]:
    """Return (differences that are refused, differences that are warned of), one line each.

    With `same_rows`, the rows themselves were compared, wherever they lie.
    """
    refused, warned = _compare_models(saved, now)
    for key in ("method", "processes", "distributed", "rows per step", "mixed precision", "ZeRO stage"):
        if key in saved and saved[key] != now[key]:  # the last two are not in checkpoints of earlier versions
            refused.append(f"{key}: {saved[key]} when it was saved, {now[key]} now")
    # A checkpoint without the key is of a version that left the size of frames to the processor.
    before, after = (run.get("video_budget", str(None)) for run in (saved, now))
    if before != after and saved["recipe"].get("max_pixels") == now["recipe"].get("max_pixels"):
        refused.append(f"pixels of videos: {before} when it was saved, {after} now (None: the processor's own size)")
    warned += _compare_prompts(saved.get("prompt"), now.get("prompt")) if not refused else []
    streams = (saved.get("stream"), now.get("stream"))
    refused += compare_streams(*streams, same_rows=same_rows)
    same_rows = same_rows or all(stream and stream["files"] for stream in streams)
    old, new = saved["recipe"], now["recipe"]
    for key in sorted(set(old) | set(new)):
        if old.get(key) == new.get(key) or (same_rows and key in TRAIN_DATA) or key in TRAIN_MODEL:
            continue
        before, after = (repr(recipe[key]) if key in recipe else "its default" for recipe in (old, new))
        change = f"{key}: {before} when it was saved, {after} now"
        warning = warning_of_change(key, now["scheduler"])
        if warning is None:
            refused.append(change)
        else:
            warned.append(f"{change}. {warning}")
    for name, version in now["versions"].items():
        if (before := saved["versions"].get(name)) != version:
            warned.append(f"{name} was {before} and is {version}: results may differ in rounding.")
    return refused, warned


def _compare_models(saved: dict, now: dict) -> tuple[list[str], list[str]]:
    """Compare the files that the base, its processor and its chat template are loaded from."""
    old, new = saved["model files"], now["model files"]
    names = [run["recipe"].get("model_name_or_path") for run in (saved, now)]
    if not old or not new:  # not on this machine, but for what transformers has loaded
        unknown = f"the model was {names[0]} and is {names[1]}: whether it is the same is not known."
        return [], [unknown] if names[0] != names[1] else []
    files = sorted(name for name in set(old) | set(new) if old.get(name) != new.get(name))
    if not files:
        return [], []
    shown = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    return [f"model: {shown} of {names[1]} are not those that the run was begun with, of {names[0]}"], []


def _compare_prompts(saved: str | None, now: str | None) -> list[str]:
    """Compare what the same chat template made of the same message."""
    if saved is None or now is None or saved == now:
        return []
    start = max(same_start(saved, now) - 30, 0)
    old, new = (text[start : start + 60] for text in (saved, now))
    return [
        f"the chat template wrote {old!r} when it was saved and writes {new!r} now: the rest of the run has other "
        "prompts. A template with a date does that (`strftime_now`); one that takes the date from "
        "`chat_template_kwargs` of the rows would not."
    ]
