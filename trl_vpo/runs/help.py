"""The help of commands that take a recipe: its keys in groups, in 80 columns, read from the argument classes.

Imports nothing heavy: `trl-vpo generate METHOD --help` and `trl-vpo evaluate --help` answer at once.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field
from enum import Enum
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args, get_origin

from trl_vpo.runs.fields import annotated_fields, union_members

WIDTH, COLUMN = 80, 27  # of the text; where the descriptions begin
GROUPS = {  # of all commands, in their order; what a command does not have is left out
    "data": """dataset_name dataset_config dataset_split dataset_train_split dataset_test_split test_split_size
        media_root limit on_bad""",
    "media": """num_frames fps max_frames max_pixels video_start video_end frame_cache check_media on_bad_media""",
    "model": """model_name_or_path model_revision adapters from_adapter dtype attn_implementation device
        trust_remote_code max_length freeze_vision""",
    "LoRA and quantization": """use_peft lora_r lora_alpha lora_dropout lora_target_modules load_in_4bit
        load_in_8bit""",
    "answers and servers": """batch_size max_new_tokens temperature top_p server_url server_media judge_url
        judge_model judge_prompt dry_run""",
    "run": """output_dir lr_scheduler_type warmup_steps num_train_epochs max_steps
        per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing optim weight_decay
        bf16 use_cpu seed dataloader_num_workers""",
    "logs, evaluation, checkpoints": """logging_steps report_to eval_strategy eval_steps
        per_device_eval_batch_size save_strategy save_steps save_total_limit resume_from_checkpoint push_to_hub
        hub_model_id""",
}
SHARED = "learning_rate beta precompute_ref_log_probs precompute_cache_dir layout"  # of all methods that take them
# Shown by --help-all only.
RARE = {
    "dataset_config", "video_start", "video_end", "precompute_cache_dir", "f_alpha_divergence_coef", "discopop_tau",
    "penalty_weight",
}  # fmt: skip
CONFIG = ("--config RECIPE", "Recipe: a file, or a name that `trl-vpo recipes` lists. Options win over it.")
LAUNCH = (
    ("--num_processes N", "Start this many processes, one for each GPU."),
    ("--accelerate_config FILE", "How they share the work: a file, or a name such as ddp, zero2, zero3 or fsdp2."),
)
HELP_ALL = ("--help-all", "Show every key, with its whole description.")


def help_page(
    usage: str,
    types: Iterable[type],  # the argument classes. Of equal keys the first class has the right one, as in argparse
    own: tuple[str, type],  # the title of the first group of keys, and the class whose own fields are in it
    *,
    first: Iterable[tuple[str, str]] = (CONFIG, HELP_ALL),  # (option, description) of what is no key
    hidden: Iterable[str] = (),  # keys that the config refuses
    texts: Mapping[str, str] = MappingProxyType({}),  # descriptions in place of those of the classes
    everything: bool = False,  # also the keys that few need, and whole descriptions instead of first sentences
    epilog: str = "",
) -> str:
    """Return the help of a command."""
    entries = {
        name: _entry(field, annotation, texts.get(name), everything)
        for name, (field, annotation) in annotated_fields(types).items()
        if name not in hidden
    }
    title, kind = own
    groups = {name: text.split() for name, text in GROUPS.items()}
    keys = [key for key in inspect.get_annotations(kind) if not any(key in group for group in groups.values())]
    groups = {title: dict.fromkeys([*keys, *SHARED.split()])} | groups
    if everything:
        shown = {key for group in groups.values() for key in group}
        groups["everything else"] = [key for key in entries if key not in shown]
    parts = [f"usage: {usage}", _lines(first)]
    for name, group in groups.items():
        if lines := [entries[key] for key in group if key in entries and (everything or key not in RARE)]:
            parts.append(f"{name}:\n{_lines(lines)}")
    return "\n\n".join([*parts, epilog] if epilog else parts)


def _entry(field: Field, annotation: Any, text: str | None, everything: bool) -> tuple[str, str]:
    """Return an option with what it takes, and its description with the default in brackets."""
    text = " ".join((text or field.metadata.get("help", "")).replace("%%", "%").split())
    if not everything:  # the first sentence
        text = re.split(r"(?<=[^.][.!]) (?=[A-Z`])", text)[0]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    choices = field.metadata.get("choices") or _choices(annotation)
    choices = [str(getattr(choice, "value", choice)) for choice in choices]
    value = _takes(annotation, default)
    if 0 < len("|".join(choices)) < 20:
        value = "|".join(choices)
    elif choices and (everything or len(choices) < 8):
        text += f" One of {', '.join(choices)}."
    names = ", ".join([f"--{field.name}", *field.metadata.get("aliases", ())])
    return f"{names} {value}".rstrip(), text + _shown_default(default)


def _shown_default(default: Any) -> str:
    if isinstance(default, Enum):
        default = default.value
    if isinstance(default, (list, tuple)):
        default = " ".join(map(str, default))
    text = str(default).lower() if isinstance(default, bool) else str(default)
    unset = default is None or default is False or default is MISSING
    return "" if unset or not text or len(text) > 30 or "\n" in text else f" [{text}]"


def _types(annotation: Any) -> list[Any]:
    return [member for member in union_members(annotation) if member is not NoneType]


def _choices(annotation: Any) -> list[Any]:
    for kind in _types(annotation):
        if get_origin(kind) is Literal:
            return list(get_args(kind))
        if isinstance(kind, type) and issubclass(kind, Enum):
            return list(kind)
    return []


def _takes(annotation: Any, default: Any) -> str:
    """Return the kind of an option's value: nothing for a switch that is off, `TEXT ...` for a list of texts."""
    names = {int: "N", float: "X", str: "TEXT", dict: "JSON"}
    kinds = _types(annotation)
    if kinds == [bool]:
        return "BOOL" if default is True else ""
    for kind in kinds:
        if get_origin(kind) is list or kind is list:
            return f"{names.get((get_args(kind) or [str])[0], 'TEXT')} ..."
    kinds = [names.get(get_origin(kind) or kind, "TEXT") for kind in kinds]
    return next((name for name in ("TEXT", "X", "N") if name in kinds), kinds[0] if kinds else "TEXT")


def _lines(entries: Iterable[tuple[str, str]]) -> str:
    lines = []
    for option, text in entries:
        head = f"{f'  {option}  ':<{COLUMN}}"
        lines.append(
            textwrap.fill(text, WIDTH, initial_indent=head, subsequent_indent=" " * COLUMN, break_on_hyphens=False)
        )
    return "\n".join(lines)
