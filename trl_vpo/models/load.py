"""Who answers and who judges: from the run's settings to an `AnsweringModel`.

Settings are checked and weights are loaded here; `local.py` and `server.py` do the answering. Nothing heavy is
imported before weights are loaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trl_vpo.errors import GenerateError
from trl_vpo.generate.config import GenerateConfig
from trl_vpo.models.requests import AnsweringModel
from trl_vpo.models.server import RequestBudget, ServerModel

DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)  # of files that are no model
# Kept in full precision under 4-bit and 8-bit weights: they are small, and nothing in them is trained. Patterns as
# transformers matches them; a bare "visual" would match nothing, module names begin with "model.".
NOT_QUANTIZED = [
    r"(.*\.)?(visual|vision_tower|vision_model|multi_modal_projector|vision_resampler|connector)",
    "lm_head",
]
OWN_CODE = {"trust_remote_code": False}  # left out, transformers asks on the terminal, and `yes |` answers


def answering_model(config: GenerateConfig, budget: RequestBudget | None = None) -> AnsweringModel:
    """The model that answers: behind `server_url`, or in this process.

    Args:
        config: the run's settings.
        budget: what is left of `max_requests`; give the same to `judge_model`, so that both count together.

    Raises:
        GenerateError: the settings name no model, or one that cannot be loaded here.
    """
    if not config.model_name_or_path:
        raise GenerateError("there is no model: set model_name_or_path to a Hub model, a folder or a server's model.")
    if config.server_url:
        return _server(config, config.server_url, config.model_name_or_path, config.api_key_env, budget)
    return _load(config)


def judge_model(config: GenerateConfig, budget: RequestBudget | None = None) -> AnsweringModel | None:
    """The model that judges open-ended answers, or None where the settings name none. Arguments as above."""
    if not config.judge_url:
        return None
    return _server(config, config.judge_url, config.judge_model, config.judge_api_key_env, budget)


def _server(config: GenerateConfig, url: str, model: str, key: str, budget: RequestBudget | None) -> ServerModel:
    return ServerModel(
        url,
        model,
        api_key_env=key,
        timeout=config.timeout,
        max_retries=config.max_retries,
        budget=budget or RequestBudget(config.max_requests),
        concurrency=config.batch_size,
        media=config.server_media,
        max_pixels=config.max_pixels,
    )


# --- a model in this process ----------------------------------------------------------------------------------------


def _load(config: GenerateConfig) -> AnsweringModel:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from trl_vpo.models.attach import attach_adapter
    from trl_vpo.models.local import LocalModel
    from trl_vpo.models.source import check_model
    from trl_vpo.runs.packages import missing_packages

    name = config.model_name_or_path
    if missing := missing_packages(vars(config)):
        raise GenerateError("; ".join(missing) + ".")
    if config.dtype not in DTYPES:
        raise GenerateError(f"dtype is {config.dtype!r}: give one of {', '.join(DTYPES)}.")
    adapter = checked_adapter(config.from_adapter, name) if config.from_adapter else None
    common = {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}
    device_map = _device_map(config.device)
    try:
        check_model(name, revision=config.model_revision)
        processor = AutoProcessor.from_pretrained(name, **common)
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
            device_map=device_map,
            quantization_config=_quantization(config),
            use_safetensors=True,
            **common,
        )
    except LOAD_ERRORS as error:
        raise GenerateError(f"{name} cannot be loaded as a vision-language model: {error}") from error
    local = Path(name).exists()
    record = {
        "model": name,
        "adapter": config.from_adapter,
        "revision": None if local else getattr(model.config, "_commit_hash", None) or config.model_revision,
    }
    if adapter is not None:
        # Not merged: merging would round the change to the model's dtype, or to its 4 bits.
        model = attach_adapter(model, config.from_adapter, config=adapter).get_base_model()
    return LocalModel(model, processor, batch_size=config.batch_size, max_pixels=config.max_pixels, description=record)


def _device_map(device: str | None) -> Any:
    """Where the weights go: this process' accelerator (or CPU), or with "auto" all accelerators there are."""
    from accelerate import PartialState

    state = PartialState()
    if device == "auto":
        if state.num_processes > 1:
            raise GenerateError(
                f"device='auto' spreads one model over all GPUs, and {state.num_processes} processes would do so at "
                "once. Start one process, or leave device out: each process then has a GPU of its own."
            )
        return "auto"
    if device in (None, state.device.type):
        return {"": state.device}
    if device != "cpu":
        raise GenerateError(
            f"device is {device!r}, but what this process has is {state.device}. Give 'cpu', or leave device out; "
            "choose among several GPUs with CUDA_VISIBLE_DEVICES."
        )
    return {"": "cpu"}


def _quantization(config: GenerateConfig) -> Any:
    """4-bit or 8-bit weights in the language model only, as in training. None: neither."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    from trl_vpo.models.load import NOT_QUANTIZED

    return BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="bfloat16" if config.dtype == "auto" else config.dtype,
        llm_int8_skip_modules=list(NOT_QUANTIZED),
    )


# --- adapters -------------------------------------------------------------------------------------------------------


def checked_adapter(path: str, model: str) -> Any:
    """The adapter's config, checked as far as that goes without weights."""
    from peft import PeftConfig, PromptLearningConfig

    from trl_vpo.data.hub_names import check_on_hub
    from trl_vpo.errors import AdapterError, SourceError
    from trl_vpo.models.adapters import read_config

    if Path(path).is_dir() and not (Path(path) / "adapter_config.json").is_file():
        raise GenerateError(
            f"from_adapter: {path} has no adapter_config.json. Name the folder that training wrote its adapter into; "
            "a fully trained model goes into model_name_or_path."
        )
    try:
        if not Path(path).is_dir():
            check_on_hub(path, key="from_adapter", file="adapter_config.json")
        else:
            read_config(Path(path))  # refuses pickled weights
        adapter = PeftConfig.from_pretrained(path)
    except SourceError as error:
        raise GenerateError(str(error)) from error
    except AdapterError as error:
        raise GenerateError(f"from_adapter: {error}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise GenerateError(f"from_adapter: {path} is no adapter that can be read: {error}") from error
    if isinstance(adapter, PromptLearningConfig):
        raise GenerateError(f"from_adapter: {path} is a {type(adapter).__name__}; only LoRA and its kin work here.")
    base = adapter.base_model_name_or_path
    if base and _short_name(base) != _short_name(model):
        raise GenerateError(
            f"from_adapter: {path} was trained on {base}, but model_name_or_path is {model}. Name its own base; if "
            "they are the same model under two names, correct base_model_name_or_path in adapter_config.json."
        )
    return adapter


def _short_name(model: str) -> str:
    """The model's name without the folder or owner in front of it; the same for the Hub, its cache and a copy."""
    cached = re.search(r"models--(?:.+?--)?([^/\\]+)[/\\]snapshots[/\\]", model)
    return (cached.group(1) if cached else re.split(r"[/\\]", model.rstrip("/\\"))[-1]).lower()
