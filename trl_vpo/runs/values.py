"""The values of a recipe, checked against their keys: of the right type, finite, and within bounds."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import is_dataclass
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from trl_vpo.errors import RecipeError, did_you_mean
from trl_vpo.runs.fields import annotated_fields, union_members
from trl_vpo.runs.secrets import scrub

# Keys that argument classes do not check themselves: outside of these, a run does nothing, or something else.
BOUNDS = [
    ("at least 1", lambda value: value >= 1, {
        "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
        "precompute_ref_batch_size", "lora_r", "lora_alpha", "max_length", "dataset_num_proc",
        "dataloader_prefetch_factor", "eval_accumulation_steps", "torch_empty_cache_steps", "ref_model_sync_steps",
        "ddp_timeout", "pad_to_multiple_of",
        "batch_size", "max_new_tokens", "limit", "resamples", "max_requests", "attempts", "short_words",
        "judge_max_new_tokens", "num_damaged_frames", "max_candidates", "rows",
    }),
    ("at least 2", lambda value: value >= 2, {"num_images"}),
    ("at least 0", lambda value: value >= 0, {
        "alpha", "nll_weight", "list_weight", "dpo_weight", "anchor_weight", "conditional_weight", "pair_weight",
        "margin_weight", "penalty_weight", "phrase_weight", "loss_weights", "score_scale_weight", "score_sensitivity",
        "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "seed", "data_seed", "dataloader_num_workers",
        "neftune_noise_alpha", "router_aux_loss_coef", "vision_learning_rate", "projector_learning_rate",
        "temperature", "judge_temperature", "max_retries",
    }),
    ("a number above 0", lambda value: value > 0, {
        "learning_rate", "beta", "num_train_epochs", "adam_epsilon", "logging_steps", "save_steps", "eval_steps",
        "test_split_size", "discopop_tau", "displacement_warning", "timeout", "gpu_memory",
    }),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, {
        "lora_dropout", "label_smoothing", "adam_beta1", "adam_beta2", "box_threshold",
    }),
    ("a number above 0 and below 1", lambda value: 0 < value < 1, {"level"}),
    ("a number above 0 and up to 1", lambda value: 0 < value <= 1, {"top_p", "keep_top", "max_changed"}),
    ("a number from 0 to 1", lambda value: 0 <= value <= 1, {"flip_probability", "min_trust"}),
    ("a number from -1 to 1", lambda value: -1 <= value <= 1, {"min_trust_margin"}),
    ("a whole number of at least 1, or -1 for num_train_epochs", lambda value: value >= 1 or value == -1, {
        "max_steps",
    }),
]  # fmt: skip
KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text (quote it)", dict: "a mapping",
    Literal: "false",
}  # fmt: skip


def annotations(types: Iterable[type]) -> dict[str, Any]:
    """The annotation of each field of argument classes. Of equal names, the first, as in argparse."""
    return {name: annotation for name, (_, annotation) in annotated_fields(types).items()}


def checked(key: str, value: Any, annotation: Any, where: str = "") -> Any:
    """Return a value as its key takes it: numbers that YAML reads as texts, such as 1e-6, become numbers.

    Raises RecipeError.
    """
    if key == "report_to" and value is None:  # transformers would look for a reporter called None
        raise RecipeError(f'{where}report_to is null: write "none", or name what to report to.')
    if key == "resume_from_checkpoint" and isinstance(value, bool):  # a text to transformers
        value = "true" if value else None
    if get_origin(annotation) is list and is_dataclass(item_type := get_args(annotation)[0]):
        items = value if isinstance(value, list) else [value]
        return [_checked_item(f"{key}[{i}]", item, item_type, where) for i, item in enumerate(items)]
    parts = _parts(annotation)
    if list in parts and str not in parts and isinstance(value, str):
        _check_type(key, [value], annotation, where)
        value = value if key == "lora_target_modules" else [value]  # a text there is a preset or an expression
    else:
        value = _check_type(key, value, annotation, where)
    check_bounds(key, value, where)
    return value


def environment(values: Any, where: str) -> dict[str, str]:
    """Return the `env` of a recipe as texts. Raises RecipeError, which shows no value that may be a secret."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where}env is {type(values).__name__}: give a mapping of names and texts.")
    for name, value in values.items():
        if not isinstance(name, str):
            raise RecipeError(f"{where}env: the name {_shown(name)} is not a text. YAML reads it so unless quoted.")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            shown = _shown(value) if isinstance(value, (bool, NoneType)) else f"a {type(value).__name__}"
            raise RecipeError(f"{where}env.{name} is {shown}: give a text (quote it) or a number.")
    return {name: str(value) for name, value in values.items()}


def check_bounds(key: str, value: Any, where: str = "") -> None:
    """Refuse numbers that are not finite or out of bounds, and what is not a regular expression.

    Raises RecipeError.
    """
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+", value):
        value = int(value)  # an option that also takes texts
    limits = [("a finite number", math.isfinite)] + [(text, test) for text, test, keys in BOUNDS if key in keys]
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            for text, test in limits:
                if not test(number):
                    raise RecipeError(f"{where}{key} is {value}: give {text}.")
    if key == "lora_target_modules" and (isinstance(value, str) or (isinstance(value, list) and len(value) == 1)):
        pattern = value if isinstance(value, str) else value[0]
        try:
            re.compile(pattern)
        except re.error as error:
            raise RecipeError(f"{where}{key}: {pattern!r} is not a regular expression ({error}).") from error


def check_json(key: str, value: Any, annotation: Any) -> None:
    """Refuse an option for a mapping that is not JSON, without its value: a token may be in it. Raises RecipeError."""
    if isinstance(value, str) and value.startswith("{") and dict in _parts(annotation):
        try:
            json.loads(value)
        except ValueError as error:
            raise RecipeError(
                f"--{key}: as an option a mapping is JSON, such as '{{\"key\": 2}}'; in a recipe it is YAML ({error})."
            ) from None


def group_size(sizes: dict[str, int], processes: int) -> int:
    """Return how many processes share a row, from the sizes "sp", "cp" and "tp" of accelerate's parallelism.

    Raises RecipeError.
    """
    size = sizes["sp"]
    if sizes["cp"] > 1:
        raise RecipeError(
            f"cp_size is {sizes['cp']}: context parallelism (ring attention) knows one causal sequence only, not a "
            "prompt with several responses. Leave cp_size out and set sp_size, which splits the same rows by heads."
        )
    if size > 1 and sizes["tp"] > 1:
        raise RecipeError(f"sp_size is {size} and tp_size {sizes['tp']}: one of them has to be 1.")
    if processes % size:
        raise RecipeError(f"sp_size is {size}, so num_processes has to be a multiple of {size}; it is {processes}.")
    return size


def _check_type(key: str, value: Any, annotation: Any, where: str) -> Any:
    adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    texts = value if isinstance(value, list) else [value]
    lax = texts and all(isinstance(item, str) for item in texts)  # pydantic then reads numbers, and names of enums
    try:
        read = adapter.validate_python(value, strict=not lax)
    except ValidationError:
        shown = scrub({key: value}).get(key, "***")
        expected = _described(annotation)
        hint = ' YAML reads an unquoted no as false: write "no".' if value is False and "no" in expected else ""
        raise RecipeError(f"{where}{key} is {_shown(shown)}: give {expected}.{hint}") from None
    return value if isinstance(read, Enum) else read


def _checked_item(key: str, item: Any, kind: type, where: str) -> dict[str, Any]:
    """Check an item of a list of argument classes, as of `datasets`."""
    if not isinstance(item, dict):
        raise RecipeError(f"{where}{key} is {_shown(item)}: give a mapping.")
    known = annotations([kind])
    for name in item:
        if name not in known:
            raise RecipeError(f"{where}unknown key `{name}` in {key}.{did_you_mean(name, known)}")
    return {name: checked(f"{key}.{name}", value, known[name], where) for name, value in item.items()}


def _parts(annotation: Any) -> list[Any]:
    """The types of a union, without what stands in brackets."""
    return [get_origin(member) or member for member in union_members(annotation)]


def _described(annotation: Any) -> str:
    """Say what to give: `a number or leave it out`."""
    texts = []
    parts = _parts(annotation)
    for part in parts:
        if isinstance(part, type) and issubclass(part, Enum):
            texts.append(f"one of {', '.join(str(member.value) for member in part)}")
        elif part is list:
            texts.append("a list of numbers" if "float" in str(annotation) else "a list of texts")
        elif part in KINDS:
            texts.append(KINDS[part])
    texts += ["leave it out"] if NoneType in parts else []
    return " or ".join(dict.fromkeys(texts))


def _shown(value: Any) -> str:
    text = {True: "true", False: "false", None: "null"}[value] if isinstance(value, (bool, NoneType)) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
