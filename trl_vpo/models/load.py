"""Loading of weights to answer, score and evaluate. Settings are checked before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from trl_vpo.errors import AdapterError, ModelError, SourceError
from trl_vpo.forward.parts import IDLE, PROJECTORS, TOWERS
from trl_vpo.runs.packages import missing_packages

if TYPE_CHECKING:
    from peft import PeftConfig

    from trl_vpo.models.local import LocalModel

DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)  # of files that are no model
# Kept in full precision under 4-bit and 8-bit weights: they are small, and nothing in them is trained. Patterns as
# transformers matches them; a bare "visual" would match nothing, module names begin with "model.".
NOT_QUANTIZED = [rf"(.*\.)?({TOWERS}|{PROJECTORS}|{IDLE})", "lm_head"]
OWN_CODE = {"trust_remote_code": False}  # left out, transformers asks on the terminal, and `yes |` answers


def load_model(
    name: str | None,  # a folder or a name on the Hub, as the adapter's
    *,
    adapter: str | None = None,
    revision: str = "main",
    dtype: str = "auto",  # one of `DTYPES`
    attn_implementation: str | None = None,
    device: str | None = None,  # cpu, the kind of this process' accelerator, or auto: all accelerators. None: the best
    load_in_4bit: bool = False,  # of the language model alone, as in training
    load_in_8bit: bool = False,
    trust_remote_code: bool = False,
    batch_size: int = 8,  # see `LocalModel`
    max_pixels: int | None = None,
) -> LocalModel:
    """Load a vision-language model, with an adapter if one is given, to answer in this process.

    The adapter is not merged: that would round its change to the model's dtype, or to its 4 bits. Raises ModelError.
    """
    if not name:
        raise ModelError("there is no model: set model_name_or_path to a Hub model, a folder or a server's model.")
    bits = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit}
    if missing := missing_packages(bits | {"attn_implementation": attn_implementation}):
        raise ModelError("; ".join(missing) + ".")
    if dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype!r}: give one of {', '.join(DTYPES)}.")

    from transformers import AutoModelForImageTextToText, AutoProcessor

    from trl_vpo.models.attach import attach_adapter
    from trl_vpo.models.local import LocalModel
    from trl_vpo.models.source import check_model

    adapter_config = checked_adapter(adapter, name) if adapter else None
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    options = {"dtype": dtype, "attn_implementation": attn_implementation, "device_map": _device_map(device)}
    try:
        check_model(name, revision=revision)
        processor = AutoProcessor.from_pretrained(name, **common)
        model = AutoModelForImageTextToText.from_pretrained(
            name, quantization_config=_quantization(dtype, bits), use_safetensors=True, **options, **common
        )
    except LOAD_ERRORS as error:
        raise ModelError(f"{name} cannot be loaded as a vision-language model: {error}") from error
    commit = None if Path(name).exists() else getattr(model.config, "_commit_hash", None) or revision
    if adapter_config is not None:
        model = attach_adapter(model, adapter, config=adapter_config).get_base_model()
    record = {"model": name, "adapter": adapter, "revision": commit}
    return LocalModel(model, processor, batch_size=batch_size, max_pixels=max_pixels, description=record)


def _device_map(device: str | None) -> Any:
    """Map the weights to this process' accelerator (or CPU), or with "auto" to all accelerators."""
    from accelerate import PartialState

    state = PartialState()
    if device == "auto":
        if state.num_processes > 1:
            raise ModelError(
                f"device='auto' spreads one model over all GPUs, and {state.num_processes} processes would do so at "
                "once. Start one process, or leave device out: each process then has a GPU of its own."
            )
        return "auto"
    if device in (None, state.device.type):
        return {"": state.device}
    if device != "cpu":
        raise ModelError(
            f"device is {device!r}, but what this process has is {state.device}. Give 'cpu', or leave device out; "
            "choose among several GPUs with CUDA_VISIBLE_DEVICES."
        )
    return {"": "cpu"}


def _quantization(dtype: str, bits: dict[str, bool]) -> Any:
    """Return 4-bit or 8-bit weights in the language model only. None: neither."""
    if not any(bits.values()):
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        **bits,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="bfloat16" if dtype == "auto" else dtype,
        llm_int8_skip_modules=list(NOT_QUANTIZED),
    )


def checked_adapter(path: str, model: str) -> PeftConfig:
    """Return an adapter's config, checked as far as that goes without weights. Raises ModelError."""
    from peft import PeftConfig, PromptLearningConfig

    from trl_vpo.models.source import check_adapter, short_name

    try:
        check_adapter(path, key="from_adapter")
        adapter = PeftConfig.from_pretrained(path)
    except SourceError as error:
        raise ModelError(str(error)) from error
    except AdapterError as error:
        raise ModelError(f"from_adapter: {error}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"from_adapter: {path} cannot be read as an adapter: {error}") from error
    if isinstance(adapter, PromptLearningConfig):
        raise ModelError(f"from_adapter: {path} is a {type(adapter).__name__}; only LoRA and its kin work here.")
    base = adapter.base_model_name_or_path
    if base and short_name(base) != short_name(model):
        raise ModelError(
            f"from_adapter: {path} was trained on {base}, but model_name_or_path is {model}. Name its own base; if "
            "they are the same model under two names, correct base_model_name_or_path in adapter_config.json."
        )
    return adapter
