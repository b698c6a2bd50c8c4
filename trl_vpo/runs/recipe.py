"""Recipes: a YAML file plus command-line options -> TRL's argument classes, strictly.

TRL's parser and conventions. Stricter in three ways, because a misspelt key costs a night of GPU time: unknown keys,
abbreviated options and values outside of a choice are errors that name the nearest valid ones.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trl.scripts.utils import ScriptArguments, TrlParser

from trl_vpo.errors import RecipeError, did_you_mean
from trl_vpo.runs.packages import missing_packages
from trl_vpo.runs.recipe_file import read_recipe
from trl_vpo.runs.secrets import scrub
from trl_vpo.runs.values import annotations, check_bounds, checked, environment

TARGETS_HELP = (
    "What LoRA adapts: language, language+projector or all (the vision tower, too), the same in every model family; "
    "PEFT's all-linear; or a regular expression of whole module names."
)
LAUNCH_KEYS = ("accelerate_config", "num_processes")  # read by `trl-vpo train` before any process starts


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
        self._path: str | None = None  # of the recipe
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
        path, recipe = None, {}
        if "--config" in argv:
            at = argv.index("--config")
            if at + 1 == len(argv):
                raise RecipeError("--config needs the path of a recipe behind it.")
            if "--config" in argv[at + 1 :]:
                raise RecipeError("--config is given twice: name one recipe.")
            path, argv = argv[at + 1], argv[:at] + argv[at + 2 :]
            recipe = self._read(path)
        self._path = path
        try:
            self.set_defaults_with_config(**recipe)
            return self.parse_args_into_dataclasses(args=argv)
        except RecipeError:
            raise
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:  # of argument classes
            raise ValueError(f"{path}: {error}" if path else str(error)) from error

    def _read(self, path: str) -> dict[str, Any]:
        """The recipe with checked values; its `env` becomes the environment, as in TRL."""
        recipe = read_recipe(path)
        os.environ |= environment(recipe.pop("env", None) or {}, f"{path}: ")
        known = annotations(self.dataclass_types)
        unknown = [key for key in recipe if key not in known and key not in LAUNCH_KEYS]
        if unknown:
            hints = " ".join(f"unknown recipe key `{k}`.{did_you_mean(k, known)}" for k in unknown)
            raise RecipeError(f"{path}: {hints}")
        recipe = {key: value for key, value in recipe.items() if key not in LAUNCH_KEYS}
        for action in self._actions:  # argparse does not check values that came from the recipe
            if action.dest in recipe:
                value = checked(action.dest, recipe[action.dest], known[action.dest], f"{path}: ")
                recipe[action.dest] = value
                if value is not None:
                    self._check_value(action, value, f"{path}: ")
        return recipe

    def parse_known_args(self, args=None, namespace=None):
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:  # without values: a token may be among them
            options = [arg.split("=")[0] for arg in rest if arg.startswith("--")]
            hints = [did_you_mean(o[2:].replace("-", "_"), self._own_defaults, "--") for o in options]
            unknown = " ".join(f"unknown option {o}.{h}" for o, h in zip(options, hints))
            raise RecipeError(unknown or f"a value that belongs to no option stands behind {_before(rest[0], args)}.")
        for option in {arg.split("=")[0] for arg in args or () if arg.startswith("--")}:
            key = option[2:].replace("-", "_")
            check_bounds(key, getattr(namespace, key, None), "--")
        _check_data_keys(namespace, f"{self._path}: " if self._path else "")
        if not self.any_device and (missing := missing_packages(vars(namespace))):
            raise RecipeError("; ".join(missing) + ".")
        self.given = {k: v for k, v in vars(namespace).items() if v != self._own_defaults.get(k)}
        if self.any_device and not _has_accelerator():
            namespace.use_cpu = True
        return namespace, rest

    def _check_value(self, action, value, where=""):
        valid = [str(getattr(choice, "value", choice)) for choice in action.choices or ()]
        value = getattr(value, "value", value)
        if not valid or str(value) in valid:
            return
        hint = did_you_mean(value, valid)
        if isinstance(value, bool) and {"no", "yes"} & set(valid):
            hint = ' YAML reads an unquoted no as false: write "no".'
        raise RecipeError(scrub(f"{where}{action.dest}: {value!r} is not one of {', '.join(valid)}.{hint}"))

    def error(self, message: str):
        raise RecipeError(scrub(message))


def _check_data_keys(given: Any, where: str) -> None:
    """Refuse keys on the data that would do nothing."""
    wrong = None
    mixture, streaming = getattr(given, "datasets", None), getattr(given, "streaming", None)
    if streaming and not mixture:
        raise RecipeError(
            f"{where}streaming is for a mixture: with `dataset_name` set dataset_streaming in its place."
        )
    if mixture and getattr(given, "dataset_streaming", None):
        wrong = "dataset_streaming is for one dataset: with `datasets` set streaming in its place."
    evaluation = getattr(given, "eval_strategy", None)
    if getattr(given, "test_split_size", None) and not mixture and getattr(evaluation, "value", evaluation) == "no":
        raise RecipeError(
            f"{where}test_split_size cuts off rows to evaluate on: set eval_strategy, too, or leave it out."
        )
    if wrong:
        raise RecipeError(where + wrong)


def _before(value: str, args: list[str]) -> str:
    """The option that a value stands behind."""
    options = [arg.split("=")[0] for arg in args[: args.index(value)] if arg.startswith("--")]
    return options[-1] if options else "no option at all"


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
