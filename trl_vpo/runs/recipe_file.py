"""The YAML file of a recipe, read strictly: what YAML would drop or guess silently is refused, with file and line."""

import re
from pathlib import Path
from typing import Any

import yaml

from trl_vpo.errors import RecipeError
from trl_vpo.runs.named_recipes import find_recipe
from trl_vpo.runs.secrets import scrub

LAUNCH_KEYS = ("accelerate_config", "num_processes")  # read by the command line, before any process starts


def split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Return (the recipe behind `--config`, or None; the options without it). Raises RecipeError."""
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in argv:
        return None, argv
    at = argv.index("--config")
    if not "".join(argv[at + 1 : at + 2]):
        raise RecipeError("--config needs a recipe behind it, a path or a name.")
    if "--config" in argv[at + 1 :]:
        raise RecipeError("--config is given twice: name one recipe.")
    return argv[at + 1], argv[:at] + argv[at + 2 :]


def read_accelerate_config(path: Path | str) -> dict[str, Any]:
    """Return the keys and values of an accelerate config; those that we look into are of their types.

    Raises RecipeError.
    """
    config = read_recipe(path, what="accelerate config")
    for key in ("num_processes", "num_machines"):
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise RecipeError(f"the accelerate config {path}: {key} is {value!r}: give a whole number of at least 1.")
    for key in ("deepspeed_config", "fsdp_config", "parallelism_config"):
        if not isinstance(config.get(key) or {}, dict):
            raise RecipeError(f"the accelerate config {path}: {key} is not a mapping.")
    return config


def read_recipe(path: Path | str, *, what: str = "recipe") -> dict[str, Any]:
    """Return the keys and values of a recipe, or of another YAML file: `what` messages call it.

    Raises RecipeError, also for a key given twice, or a number that YAML 1.1 takes to base 8 or 60.
    """
    text = recipe_text(path)
    try:
        recipe = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        # Not the error's own text: it shows the line, which may hold a token.
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        raise RecipeError(f"the {what} {path} is not valid YAML{where}: {scrub(why)}.") from None
    except (ValueError, RecursionError) as error:  # a date like 2024-02-31; lists within lists
        raise RecipeError(f"the {what} {path}: {error}.") from None
    if not isinstance(recipe, dict):
        kind = "is empty" if recipe is None else f"holds a {type(recipe).__name__}"
        raise RecipeError(f"the {what} {path} {kind}: write a line `key: value` for each setting.")
    if odd := [key for key in recipe if not isinstance(key, str)]:
        raise RecipeError(f"the {what} {path}: the key {odd[0]!r} is not a text. YAML reads it so unless quoted.")
    return recipe


def recipe_text(path: Path | str) -> str:
    """Return the text of a recipe: a file, or a name of `trl_vpo.runs.named_recipes`. Raises RecipeError."""
    try:
        return find_recipe(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError(f"the recipe {path} is not UTF-8 text, in line {line}: save it as UTF-8.") from None


class _Loader(yaml.SafeLoader):
    """[`yaml.SafeLoader`] without what nobody means: the last of several equal keys, 010 as 8, and 1:30 as 90."""

    def construct_mapping(self, node, deep=False):
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # the base class refuses it
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in lines:
                problem = f"the key {key!r} is given twice, the first time in line {lines[key]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        octal = re.fullmatch(r"[-+]?0[0-9_]+", node.value)
        if octal or ":" in node.value:
            problem = f"a number to base {8 if octal else 60}: write a plain decimal one, or quote what is a text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)


for kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _Loader.construct_number)
