"""Recipes by name, from any folder: `rrpo/qwen2_5_vl_7b` is `recipes/rrpo/qwen2_5_vl_7b.yaml` of this package.

The recipes lie at the top of a checkout; the wheel has them inside of the package. A file of one's own always wins.
"""

from __future__ import annotations

import os.path
from importlib.util import find_spec
from pathlib import Path

from trl_vpo.errors import RecipeError, did_you_mean

PACKAGE = Path(__file__).parents[1]
ACCELERATE = "accelerate/"  # the accelerate configs among the recipes
LIST = "`trl-vpo recipes` lists the names."


def recipes_folder() -> Path:
    """Return the folder of the recipes: in the installed package, or at the top of a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of all recipes, accelerate configs among them (`accelerate/ddp`)."""
    root = recipes_folder()
    return [path.relative_to(root).with_suffix("").as_posix() for path in sorted(root.glob("*/*.yaml"))]


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: a path, or else one of `recipe_names`. Both with or without .yaml.

    Raises RecipeError, which says which names are near.
    """
    path, short = Path(name), str(name).removesuffix(".yaml")
    names = recipe_names()
    for own in (path, Path(f"{short}.yaml")):
        if os.path.exists(own) and not own.is_dir():
            return own
    if short in names:
        return recipes_folder() / f"{short}.yaml"
    if os.path.exists(path):
        return path  # a folder: who reads it says so
    missing = f"the recipe {name} does not exist"
    shipped = short.rpartition("recipes/")[2]
    if shipped in names:
        raise RecipeError(f"{missing} in {Path.cwd()}. The package has it under the name {shipped}.")
    hint = did_you_mean(shipped, names)
    if same := [one for one in names if one.split("/")[1] == shipped.split("/")[-1]]:
        hint = f" Did you mean {' or '.join(same)}?"
    siblings = [one for one in names if "/" in shipped and one.startswith(shipped.split("/")[0] + "/")]
    hint += f" There are {', '.join(siblings)}." if siblings else f" {LIST}"
    raise RecipeError(f"{missing}: no such file from {Path.cwd()}, and no recipe of this name in the package.{hint}")


def find_accelerate_config(name: str) -> Path:
    """Return the file of an accelerate config: a path, one of this package, or one of TRL's where there is none.

    Raises RecipeError, which lists the names.
    """
    if Path(name).is_file():
        return Path(name)
    folders = (Path(find_spec("trl").origin).parent / "accelerate_configs", recipes_folder() / ACCELERATE)
    valid = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}  # ours replace TRL's
    short = name.removesuffix(".yaml").removeprefix(ACCELERATE)
    if short not in valid:
        hint = did_you_mean(short, valid)
        raise RecipeError(f"accelerate_config {name!r} is neither a file nor one of {', '.join(sorted(valid))}.{hint}")
    return valid[short]


def shipped_model(name: str) -> str:
    """Return a model's name, or the folder in the installed package that a recipe means by `trl_vpo/...`."""
    folder = PACKAGE.parent / name
    return str(folder) if name.startswith("trl_vpo/") and not Path(name).exists() and folder.is_dir() else name
