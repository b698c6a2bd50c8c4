"""Recipes: a YAML file plus command-line options -> TRL's argument classes, strictly.

TRL's parser and conventions. Stricter in three ways, because a misspelt key costs a night of GPU time: unknown keys,
abbreviated options and values outside of a choice are errors that name the nearest valid ones.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from trl.scripts.utils import ScriptArguments, TrlParser

from trl_vpo.report.run_record import scrub

TARGETS_HELP = (
    "What LoRA adapts: language, language+projector or all (the vision tower, too), the same in every model family; "
    "PEFT's all-linear; or a regular expression of whole module names."
)
LAUNCH_KEYS = ("accelerate_config", "num_processes")  # read by `trl-vpo train` before any process starts


class RecipeError(ValueError):
    """A recipe or option that cannot be used. Raised before a model or dataset is loaded."""


def nearest(word: str, valid: Iterable[str], prefix: str = "") -> str:
    """` Did you mean ...?`, or nothing where nothing is near."""
    close = difflib.get_close_matches(str(word).lower(), list(valid), n=3)
    return f" Did you mean {' or '.join(prefix + c for c in close)}?" if close else ""


@dataclass
class VisualScriptArguments(ScriptArguments):
    """[`trl.ScriptArguments`] and what TRL's scripts have no option for.

    Parameters:
        freeze_vision (`bool`, defaults to `False`): full fine-tuning trains the language model only.
    """

    freeze_vision: bool = field(
        default=False, metadata={"help": "Keep vision tower and projector as they are in full fine-tuning."}
    )


class RecipeParser(TrlParser):
    """[`trl.TrlParser`] that refuses what it does not know.

    Args:
        dataclass_types: as TRL's.
        any_device: parse also where the recipe could not run, for example a bf16 recipe on a machine without a GPU.

    Attributes:
        given (`dict`): after parsing, every argument that differs from its default.
    """

    def __init__(self, dataclass_types: Iterable[type], *, any_device: bool = False, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.any_device = any_device
        self.given: dict[str, Any] = {}
        self._own_defaults: dict[str, Any] = {}
        for action in self._actions:  # `--no_x` comes after `--x`, with a default of its own
            if action.dest == "lora_target_modules":
                action.help = TARGETS_HELP
            default = action.default
            typed = self._get_value(action, default) if isinstance(default, str) else default  # as argparse does
            self._own_defaults.setdefault(action.dest, typed)

    def parse(self, argv: list[str]) -> tuple:
        """The argument objects of `--config FILE` and the options after it, which win over the file.

        Raises:
            RecipeError: no such file, no YAML mapping, an unknown key or option, or a value that is not valid.
            ValueError: values contradict each other; raised by the argument classes.
        """
        argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        try:
            return self.parse_args_and_config(argv)
        except IndexError as error:
            raise RecipeError("--config needs the path of a recipe behind it.") from error
        except OSError as error:
            raise RecipeError(
                f"the recipe {error.filename} cannot be read ({error.strerror}). Paths start from the working "
                f"directory, {Path.cwd()}."
            ) from error
        except yaml.YAMLError as error:
            # Not the error's own text: it shows the line, which may hold a token.
            mark = getattr(error, "problem_mark", None)
            where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            what = getattr(error, "problem", None) or type(error).__name__
            raise RecipeError(f"the recipe is not valid YAML{where}: {scrub(what)}.") from None

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        unknown = [key for key in kwargs if key not in self._own_defaults and key not in LAUNCH_KEYS]
        if unknown:
            raise RecipeError(" ".join(f"unknown recipe key `{k}`.{nearest(k, self._own_defaults)}" for k in unknown))
        return super().set_defaults_with_config(**{k: v for k, v in kwargs.items() if k not in LAUNCH_KEYS})

    def parse_known_args(self, args=None, namespace=None):
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:  # without values: a token may be among them
            options = [arg.split("=")[0] for arg in rest if arg.startswith("--")]
            hints = [nearest(o[2:].replace("-", "_"), self._own_defaults, "--") for o in options]
            unknown = " ".join(f"unknown option {o}.{h}" for o, h in zip(options, hints))
            raise RecipeError(unknown or f"a value that belongs to no option stands behind {_before(rest[0], args)}.")
        for action in self._actions:  # argparse does not check values that came from the recipe
            if action.choices and getattr(namespace, action.dest) is not None:
                self._check_value(action, getattr(namespace, action.dest))
        _check_data_keys(namespace)
        self.given = {k: v for k, v in vars(namespace).items() if v != self._own_defaults.get(k)}
        if self.any_device and not _has_accelerator():
            namespace.use_cpu = True
        return namespace, rest

    def _check_value(self, action, value):
        valid = [str(getattr(choice, "value", choice)) for choice in action.choices or ()]
        value = getattr(value, "value", value)
        if not valid or str(value) in valid:
            return
        hint = nearest(value, valid)
        if isinstance(value, bool) and {"no", "yes"} & set(valid):
            hint = ' YAML reads an unquoted no as false: write "no".'
        raise RecipeError(scrub(f"{action.dest}: {value!r} is not one of {', '.join(valid)}.{hint}"))

    def error(self, message: str):
        raise RecipeError(scrub(message))


def _check_data_keys(given: Any) -> None:
    """Refuse keys on the data that would do nothing."""
    mixture, streaming = getattr(given, "datasets", None), getattr(given, "streaming", None)
    if streaming and not mixture:
        raise RecipeError("streaming is for a mixture: with `dataset_name` set dataset_streaming in its place.")
    if mixture and getattr(given, "dataset_streaming", None):
        raise RecipeError("dataset_streaming is for one dataset: with `datasets` set streaming in its place.")
    evaluation = getattr(given, "eval_strategy", None)
    if getattr(given, "test_split_size", None) and not mixture and getattr(evaluation, "value", evaluation) == "no":
        raise RecipeError("test_split_size cuts off rows to evaluate on: set eval_strategy, too, or leave it out.")


def _before(value: str, args: list[str]) -> str:
    """The option that a value stands behind."""
    options = [arg.split("=")[0] for arg in args[: args.index(value)] if arg.startswith("--")]
    return options[-1] if options else "no option at all"


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
