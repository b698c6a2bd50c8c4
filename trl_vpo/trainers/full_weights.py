"""Full fine-tuning: a checkpoint's weights where transformers would go on without them."""

from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model

logger = get_logger(__name__)


def load_full_weights(trainer: Any, folder: Path) -> None:
    """Load a checkpoint of full fine-tuning where transformers could not.

    It saves models such as Qwen2-VL under the names that their files have on the Hub. When training goes on, and for
    `load_best_model_at_end`, it looks for the names of the modules, finds none, and goes on with the weights as they
    are: https://github.com/huggingface/transformers/issues/43701. This can go when that is fixed.
    """
    if is_peft_model(trainer.model) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if saved_tensors(folder) <= set(model.state_dict()):
        return
    kinds = {p.dtype for p in model.parameters()}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    loaded = type(model).from_pretrained(folder, dtype=dtype, use_safetensors=True)  # a pickle may run code
    model.load_state_dict(loaded.state_dict())
    logger.warning(f"The weights were read from {folder} by from_pretrained: the file has other names for them.")


def open_safetensors(path: Path) -> set[str]:
    """The names of its tensors; opening compares the header with the size of the file."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return set(file.keys())


def saved_tensors(folder: Path) -> set[str]:
    """The names of all tensors in a checkpoint's safetensors files."""
    return set().union(*map(open_safetensors, folder.glob("*.safetensors")))
