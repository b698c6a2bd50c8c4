"""A checkpoint or a result that cannot be saved: what happened, what is left, and what to do."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from trl_vpo.errors import SaveError
from trl_vpo.training.checkpoints import MARKER, list_checkpoints, read_marker, what_is_left
from trl_vpo.training.output_dir import remedy


@contextlib.contextmanager
def explain_failed_saves(trainer: Any) -> Iterator[None]:
    """Failed writes of checkpoints and of the model become `SaveError`s; half of a checkpoint is deleted.

    A folder that was there before stays, as do an earlier run's files in it. It loses its marker before it is written
    over: no marker may stand beside files of which it knows only the size.
    """
    save, made = trainer._save_checkpoint, set()

    def save_checkpoint(*args, **kwargs):
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        if trainer.args.should_save:
            if folder.exists():
                (folder / MARKER).unlink(missing_ok=True)
            else:
                made.add(folder)
        return save(*args, **kwargs)

    trainer._save_checkpoint = save_checkpoint
    try:
        yield
    except Exception as error:
        saving = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if not saving & {"_save_checkpoint", "save_model", "on_save"} or not _is_failed_write(error):
            raise
        output_dir = Path(trainer.args.output_dir)
        checkpoint = output_dir / f"checkpoint-{trainer.state.global_step}"
        target = checkpoint if saving & {"_save_checkpoint", "on_save"} else output_dir
        if target in made:
            shutil.rmtree(target, ignore_errors=True)
        kept = _keep_adapter(trainer) if target is output_dir and trainer.args.should_save else ""
        raise SaveError(_failed_save(trainer, target, error, deleted=not target.exists()) + kept) from error
    finally:
        del trainer._save_checkpoint


def _keep_adapter(trainer: Any) -> str:
    """Save the trained adapter among the temporary files; a sentence that says where, if that went well."""
    if not is_peft_model(trainer.model) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return ""  # whole models are large, and sharded ones are saved by all processes together
    folder = tempfile.mkdtemp(prefix="trl-vpo-")
    try:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
    except Exception:  # the same disk, perhaps
        shutil.rmtree(folder, ignore_errors=True)
        return ""
    return f" The adapter of step {trainer.state.global_step} is kept in {folder}: move it from there."


def _is_failed_write(error: Exception) -> bool:
    """Errors of torch, safetensors and tokenizers included; an error of the model's code is not one."""
    return (
        isinstance(error, OSError)
        or type(error).__name__ == "SafetensorError"
        or any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "os error"))
    )


def _failed_save(trainer: Any, target: Path, error: Exception, *, deleted: bool) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    older = [f for f in list_checkpoints(trainer.args.output_dir) if read_marker(f)]
    needed = sum(entry["size"] for entry in read_marker(older[0])["files"].values()) if older else 0
    size = f"A checkpoint takes {needed / 2**20:.1f} MiB. " if needed else ""
    gone = "Half of it was written and deleted again. " if deleted else ""
    return (
        f"{target} could not be written: {reason}. {size}{gone}{remedy(Path(trainer.args.output_dir), error)} "
        f"{what_is_left(trainer.args.output_dir)}"
    )
