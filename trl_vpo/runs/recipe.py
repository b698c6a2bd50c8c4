"""Recipes: a YAML file plus command-line options -> TRL's argument classes, strictly.

TRL's parser and conventions. Stricter in three ways, because a misspelt key costs a night of GPU time: unknown keys,
abbreviated options and values outside of a choice are errors that name the nearest valid ones.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from trl.scripts.utils import ScriptArguments, TrlParser

from trl_vpo.errors import RecipeError, UserError, did_you_mean
from trl_vpo.runs.named_recipes import shipped_model
from trl_vpo.runs.packages import missing_packages
from trl_vpo.runs.recipe_file import LAUNCH_KEYS, read_recipe, split_config
from trl_vpo.runs.secrets import scrub
from trl_vpo.runs.values import annotations, check_bounds, check_json, checked, environment


@dataclass
class VisualScriptArguments(ScriptArguments):
    """[`trl.ScriptArguments`] and what TRL's scripts have no option for."""

    freeze_vision: bool = field(
        default=False, metadata={"help": "Keep vision tower and projector as they are in full fine-tuning."}
    )


class RecipeParser(TrlParser):
    """[`trl.TrlParser`] that refuses what it does not know.

    With `any_device` it also parses what could not run, for example a bf16 recipe on a machine without a GPU.
    """

    def __init__(self, dataclass_types: Iterable[type], *, any_device: bool = False, **kwargs):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.any_device = any_device
        self.given: dict[str, Any] = {}  # after parsing, every argument that differs from its default
        self.named: dict[str, Any] = {}  # after parsing, every argument that the recipe or an option names
        self.recipe_path: str | None = None  # after parsing, the recipe file
        self._own_defaults: dict[str, Any] = {}
        for action in self._actions:  # `--no_x` comes after `--x`, with a default of its own
            default = action.default
            typed = self._get_value(action, default) if isinstance(default, str) else default  # as argparse does
            self._own_defaults.setdefault(action.dest, typed)

    def parse(self, argv: list[str]) -> tuple:
        """Return the argument objects of `--config FILE` and the options after it, which win over the file.

        Raises RecipeError; and UserError in place of what the argument classes raise.
        """
        path, argv = split_config(argv)
        self.recipe_path = path
        try:
            self.named = self._read(path) if path else {}
            self.set_defaults_with_config(**self.named)
            return self.parse_args_into_dataclasses(args=argv)
        except RecipeError:
            raise
        except (ValueError, TypeError, KeyError, ArithmeticError, ImportError) as error:  # of argument classes
            raise UserError(f"{path}: {error}" if path else str(error)) from error

    def _read(self, path: str) -> dict[str, Any]:
        """Return the recipe with checked values; its `env` becomes the environment, as in TRL."""
        recipe = read_recipe(path)
        os.environ |= environment(recipe.pop("env", None) or {}, f"{path}: ")
        recipe = {key: value for key, value in recipe.items() if key not in LAUNCH_KEYS}
        known = annotations(self.dataclass_types)
        unknown = [f"unknown recipe key `{k}`.{did_you_mean(k, known)}" for k in recipe if k not in known]
        if unknown:
            raise RecipeError(f"{path}: {' '.join(unknown)}")
        for action in self._actions:  # argparse does not check values that came from the recipe
            if action.dest in recipe:
                value = checked(action.dest, recipe[action.dest], known[action.dest], f"{path}: ")
                recipe[action.dest] = value
                if value is not None:
                    self._check_value(action, value, f"{path}: ")
        return recipe

    def parse_known_args(self, args=None, namespace=None):
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            raise RecipeError(self._unknown(rest, args))
        if model := getattr(namespace, "model_name_or_path", None):
            namespace.model_name_or_path = shipped_model(model)
        known = annotations(self.dataclass_types)
        for option in {arg.split("=")[0] for arg in args or () if arg.startswith("--")} & {
            *self._option_string_actions
        }:
            key = self._option_string_actions[option].dest
            self.named[key] = getattr(namespace, key, None)
            check_json(key, getattr(namespace, key, None), known.get(key))
            check_bounds(key, getattr(namespace, key, None), "--")
        if problem := _useless_data_key(vars(namespace)):
            raise RecipeError(f"{self.recipe_path}: {problem}" if self.recipe_path else problem)
        if not self.any_device and (missing := missing_packages(vars(namespace))):
            raise RecipeError("; ".join(missing) + ".")
        self.given = {k: v for k, v in vars(namespace).items() if v != self._own_defaults.get(k)}
        if self.any_device and not torch.accelerator.is_available():
            namespace.use_cpu = True
        return namespace, rest

    def _unknown(self, rest: list[str], args: list[str]) -> str:
        """Describe options that do not exist, without their values: a token may be among them."""
        options = [arg.split("=")[0] for arg in rest if arg.startswith("--")]
        if options:
            hints = [did_you_mean(o[2:].replace("-", "_"), self._own_defaults, "--") for o in options]
            return " ".join(f"unknown option {o}.{hint}" for o, hint in zip(options, hints))
        before = [arg.split("=")[0] for arg in args[: args.index(rest[0])] if arg.startswith("--")]
        return f"a value that belongs to no option stands behind {before[-1] if before else 'no option at all'}."

    def _check_value(self, action, value, where=""):
        valid = [str(getattr(choice, "value", choice)) for choice in action.choices or ()]
        value = getattr(value, "value", value)
        if not valid or str(value) in valid:
            return
        hint = did_you_mean(value, valid)
        raise RecipeError(scrub(f"{where}{action.dest}: {value!r} is not one of {', '.join(valid)}.{hint}"))

    def error(self, message: str):
        raise RecipeError(scrub(message))


def _useless_data_key(arguments: dict[str, Any]) -> str | None:
    """Name a key on the data that would do nothing."""
    mixture, evaluation = arguments.get("datasets"), arguments.get("eval_strategy")
    if arguments.get("streaming") and not mixture:
        return "streaming is for a mixture: with `dataset_name` set dataset_streaming in its place."
    if mixture and arguments.get("dataset_streaming"):
        return "dataset_streaming is for one dataset: with `datasets` set streaming in its place."
    if arguments.get("test_split_size") and not mixture and getattr(evaluation, "value", evaluation) == "no":
        return "test_split_size cuts off rows to evaluate on: set eval_strategy, too, or leave it out."
    return None
