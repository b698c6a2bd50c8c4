"""A disk that is full while a checkpoint is saved: what happened, what is left, and what to do."""

from __future__ import annotations

import contextlib
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_vpo.checkpoints import list_checkpoints, read_marker, what_is_left


class SaveError(OSError):
    """A checkpoint or model could not be written. Says where, why, and which checkpoint is left."""


@contextlib.contextmanager
def explain_failed_saves(trainer: Any) -> Iterator[None]:
    """Failed writes of checkpoints and of the model become `SaveError`s; half of a checkpoint is deleted."""
    try:
        yield
    except Exception as error:
        saving = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if not saving & {"_save_checkpoint", "save_model", "on_save"} or not _is_failed_write(error):
            raise
        output_dir = Path(trainer.args.output_dir)
        checkpoint = output_dir / f"checkpoint-{trainer.state.global_step}"
        target = checkpoint if saving & {"_save_checkpoint", "on_save"} else output_dir
        if target is checkpoint and trainer.args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)
        raise SaveError(_failed_save(trainer, target, error)) from error


def _is_failed_write(error: Exception) -> bool:
    """Errors of torch, safetensors and tokenizers included; an error of the model's code is not one."""
    return (
        isinstance(error, OSError)
        or type(error).__name__ == "SafetensorError"
        or any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "os error"))
    )


def _failed_save(trainer: Any, target: Path, error: Exception) -> str:
    free = shutil.disk_usage(trainer.args.output_dir).free
    reason = (str(error) or type(error).__name__).splitlines()[0]
    older = [f for f in list_checkpoints(trainer.args.output_dir) if read_marker(f)]
    needed = sum(entry["size"] for entry in read_marker(older[0])["files"].values()) if older else 0
    size = f"A checkpoint takes {needed / 2**20:.1f} MiB. " if needed else ""
    gone = "Half of it was written and deleted again. " if target.name.startswith("checkpoint-") else ""
    return (
        f"{target} could not be written: {reason}. {free / 2**20:.1f} MiB are free there. {size}"
        f"{gone}Free some space on that disk, or keep fewer checkpoints with save_total_limit. "
        f"{what_is_left(trainer.args.output_dir)}"
    )
