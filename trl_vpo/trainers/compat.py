"""Everything that TRL, transformers, accelerate, PEFT, bitsandbytes or torch need corrected for these trainers.

Each function says what upstream does, links where it is discussed, and when it can go. `tests/test_upstream.py` fails
when an upgrade moves what they lean on.
"""

import inspect
import os
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from safetensors import safe_open
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel, ProcessorMixin
from trl.trainer import dpo_trainer

logger = get_logger(__name__)


# --- trl ----------------------------------------------------------------------------------------------------------


def without_trl_precomputing(args: Any) -> AbstractContextManager:
    """While `DPOTrainer.__init__` runs: let it precompute nothing, as it refuses visual rows.

    `ReferenceCache` does it afterwards, for all rows. Can go when TRL precomputes through the data collator:
    https://github.com/huggingface/trl/pull/5867
    """
    return patch.object(args, "precompute_ref_log_probs", False)


def without_reference_model(policy_by_name: bool) -> AbstractContextManager:
    """While `DPOTrainer.__init__` runs: do not load the second copy of the model that it takes for a reference.

    LeanPO has none, and precomputed log-probs need none. Can go when `DPOTrainer` has a switch for it.
    """
    loads = [dpo_trainer.create_model_from_path] if policy_by_name else []  # the first load is then the policy's
    load = lambda *args, **kwargs: loads.pop()(*args, **kwargs) if loads else None  # noqa: E731
    return patch.object(dpo_trainer, "create_model_from_path", load)


def drop_empty_media_columns(dataset: Dataset | IterableDataset, processing_class: Any) -> Dataset | IterableDataset:
    """Drop the image columns of a text model's rows, which are empty: TRL takes their names for images.

    Of a stream, whose rows are checked when they are collated, only where they are empty.

    Can go when `DPOTrainer.__init__` looks at the values of `image` and `images` instead.
    """
    names = ["image", "images"]
    if isinstance(processing_class, ProcessorMixin):
        return dataset
    if isinstance(dataset, Dataset):
        return dataset.remove_columns([name for name in names if name in dataset.column_names])
    return dataset.map(lambda row: {k: row[k] for k in names if row.get(k)}, remove_columns=names)


@torch.no_grad()
def copy_whole_adapter(policy: nn.Module) -> None:
    """Make the adapter "ref" of a `PeftModel` equal to its adapter "default", in weights and buffers.

    `DPOTrainer` copies what has ".default." in its name, but not what ends in ".default": LoRA on embeddings, single
    trained tokens, IA3, LoHa, LoKr, VeRA. Their reference would be a new adapter. Can go with
    https://github.com/huggingface/trl/pull/6975
    """
    tensors = dict(policy.named_parameters()) | dict(policy.named_buffers())
    for name, tensor in tensors.items():
        twin = tensors.get(".".join("ref" if part == "default" else part for part in name.split(".")))
        if twin is not None and twin is not tensor:
            twin.copy_(tensor)


def turn_off_dropout(model: nn.Module) -> None:
    """Turn off all dropout, also what modules have as a number: `attention_dropout`, or `drop_prob` of a whole layer.

    `disable_dropout` turns off that of `nn.Dropout` alone, so the policy would not begin as its reference. Can go when
    TRL's `disable_dropout_in_model` does this.
    """
    for module in model.modules():
        numbers = {k: 0.0 for k, v in vars(module).items() if "drop" in k and isinstance(v, float)}
        module.__dict__.update(numbers | ({"p": 0.0} if isinstance(module, nn.modules.dropout._DropoutNd) else {}))


def keep_attention(model: PreTrainedModel) -> None:
    """Let `gradient_checkpointing_kwargs` have the key `selective`, as in `trl.SFTTrainer`.

    The backward pass then uses what attention computed, and computes the rest of a layer again. `DPOTrainer` hands the
    key to torch, which refuses it. TRL's own function for it does nothing for a `PeftModel`, and does not know torch's
    kernel for packed rows. Can go when `DPOTrainer` has the key and both are mended.
    """
    model.activation_checkpointing_enable = types.MethodType(_enable_checkpointing, model)


def _enable_checkpointing(self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
    options = dict(activation_checkpointing_kwargs or {})
    if options.pop("selective", False):
        contexts = partial(create_selective_checkpoint_contexts, _saves_attention)
        options |= {"use_reentrant": False, "context_fn": contexts}
        # To offload what is kept, too, fails: it comes back in other strides, and other operators follow. torch is to
        # insist on the choice: https://github.com/pytorch/pytorch/issues/191236
        if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters:
            options["respect_saved_tensors_hooks"] = False
    type(self).activation_checkpointing_enable(self, options or None, **kwargs)


def _saves_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Know attention by its name, such as `torch_attn._varlen_attn` and `aten._scaled_dot_product_flash_attention`."""
    named = "attention" in str(op) or "attn" in str(op)
    return CheckpointPolicy.MUST_SAVE if named else CheckpointPolicy.PREFER_RECOMPUTE


def undo_bfloat16_adapters(trainer: Any) -> None:
    """Put adapters of quantized models back into float32, in which PEFT makes them.

    `DPOTrainer` casts them to bfloat16, where most updates of a learning rate like 5e-6 are rounded away. Under FSDP
    they stay as they are: all weights that it gathers together need one dtype. Can go when TRL no longer casts:
    https://github.com/huggingface/trl/issues/7268
    """
    model = trainer.model
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    if quantized and not trainer.is_fsdp_enabled:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()


# --- peft, bitsandbytes -------------------------------------------------------------------------------------------


@contextmanager
def keep_frozen(model: nn.Module) -> Iterator[None]:
    """Restore afterwards which parameters train.

    PEFT makes every weight of an adapter trainable when it switches back to it, also those that were frozen (0.20 also
    when another adapter is added). Can go when `disable_adapter` restores the flags:
    https://github.com/huggingface/peft/issues/3447
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def keep_4bit_weights_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU in the first evaluation.

    Repacked weights are for inference: gradients silently stop at them (bitsandbytes 0.50, on CPUs with AVX512-BF16,
    since https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804). Can go when `Linear4bit.forward` packs
    only models that do not train. Raises ValueError for weights that are packed already: unpacking does not give them
    back.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    "the 4-bit weights of this model were packed for inference when it was first called on this CPU; "
                    "gradients do not pass them. Load the model again, and give it to the trainer before calling it."
                )


# --- transformers, accelerate ---------------------------------------------------------------------------------------


def wrap_existing_layers(trainer: Any) -> None:
    """FSDP: wrap those layers that the model has, of those that its class names.

    CLIP also names layers of its text encoder, which a LLaVA does not have, and accelerate refuses to go without them.
    Can go when it wraps what is there: https://github.com/huggingface/transformers/issues/37672
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in trainer.model.modules()}
        plugin.transformer_cls_names_to_wrap = [n for n in trainer.model._no_split_modules or [] if n in present]


@contextmanager
def full_state_dict(trainer: Any) -> Iterator[None]:
    """While a result is saved under FSDP: gather the weights.

    With SHARDED_STATE_DICT `Trainer.save_model` silently saves none:
    https://github.com/huggingface/transformers/issues/30491. Can go when it saves them or raises.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    kind = plugin and plugin.state_dict_type
    if plugin:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        if plugin:
            plugin.set_state_dict_type(kind)


def load_renamed_weights(trainer: Any, folder: Path) -> None:
    """Load the weights of a checkpoint of full fine-tuning where transformers does not find them.

    It saves models such as Qwen2-VL under the names of their files on the Hub. On resuming, and for
    `load_best_model_at_end`, it looks for the names of the modules, finds none, and continues with the weights in
    memory. Can go with https://github.com/huggingface/transformers/issues/43701
    """
    if is_peft_model(trainer.model) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    model, saved = trainer.accelerator.unwrap_model(trainer.model), set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            saved |= set(file.keys())
    if saved <= set(model.state_dict()):
        return
    dtypes = {p.dtype for p in model.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    loaded = type(model).from_pretrained(folder, dtype=dtype, use_safetensors=True)  # a pickle may run code
    model.load_state_dict(loaded.state_dict())
    logger.warning(f"The weights were read from {folder} by from_pretrained: the file has other names for them.")


# --- torch --------------------------------------------------------------------------------------------------------


class WholeErrorFile(ErrorHandler):
    """Write the error of a rank for its launcher whole, or not at all.

    torch writes it in place. A launcher that ends this rank while it writes reads half of the file, and fails itself
    with a JSONDecodeError where it should name the rank and its error. Can go when torch renames a finished file.
    """

    def record_exception(self, e: BaseException) -> None:
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if not path:
            return super().record_exception(e)
        with patch.dict(os.environ, TORCHELASTIC_ERROR_FILE=f"{path}.part"):
            super().record_exception(e)
        os.replace(f"{path}.part", path)


record_error = partial(record, error_handler=WholeErrorFile())
