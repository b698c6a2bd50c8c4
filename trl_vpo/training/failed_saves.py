"""A checkpoint or a result that cannot be saved: what happened, what is left, and what to do."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from safetensors import SafetensorError

from trl_vpo.errors import SaveError, UserError, is_disk_error
from trl_vpo.training.checkpoints import MARKER, what_is_left
from trl_vpo.training.output_dir import remedy


@contextmanager
def explain_failed_save(trainer: Any, target: Path) -> Iterator[None]:
    """Turn a failed write below `target`, a checkpoint or the folder of the result, into `SaveError`.

    Half of a new checkpoint is deleted. A folder that was there before stays, but loses its marker before it is
    written over. An adapter that cannot be saved as the result is kept among the temporary files.
    """
    writes, is_checkpoint = trainer.args.should_save, target != Path(trainer.args.output_dir)
    is_new = writes and not target.exists()
    if writes and is_checkpoint:
        (target / MARKER).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        failed = isinstance(error, SafetensorError) or is_disk_error(error)
        if isinstance(error, UserError) or not failed:
            raise
        if is_new and is_checkpoint:
            shutil.rmtree(target, ignore_errors=True)
        kept = _keep_adapter(trainer) if writes and not is_checkpoint else ""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        output_dir = Path(trainer.args.output_dir)
        deleted = "" if target.exists() else " Half of it was written and deleted again."
        advice = f"{remedy(output_dir, error)} {what_is_left(output_dir)}"
        raise SaveError(f"{target} could not be written: {reason}.{deleted} {advice}{kept}") from error


def _keep_adapter(trainer: Any) -> str:
    """Save the trained adapter among the temporary files; return a sentence that says where, if that went well."""
    if not is_peft_model(trainer.model) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return ""  # whole models are large, and sharded ones are saved by all processes together
    folder = tempfile.mkdtemp(prefix="trl-vpo-")
    try:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
    except Exception:  # the same disk, perhaps
        shutil.rmtree(folder, ignore_errors=True)
        return ""
    return f" The adapter of step {trainer.state.global_step} is kept in {folder}: move it from there."
