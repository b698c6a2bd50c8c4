"""The training methods, by their names on the command line."""

import re
from importlib import import_module
from pathlib import Path

from trl_vpo.errors import RecipeError
from trl_vpo.runs.recipe_file import recipe_text

METHODS = {  # method: the names of its config and its trainer in `trl_vpo.trainers.METHOD`
    "dpo": ("VisualDPOConfig", "VisualDPOTrainer"),
    "leanpo": ("LeanPOConfig", "LeanPOTrainer"),
    "rrpo": ("RRPOConfig", "RRPOTrainer"),
    "lpoi": ("LPOIConfig", "LPOITrainer"),
    "simpo": ("SimPOConfig", "SimPOTrainer"),
    "tdpo": ("TDPOConfig", "TDPOTrainer"),
    "ddpo": ("DDPOConfig", "DDPOTrainer"),
    "mdpo": ("MDPOConfig", "MDPOTrainer"),
    "dpa": ("DPAConfig", "DPATrainer"),
    "symmpo": ("SymMPOConfig", "SymMPOTrainer"),
}


def method_classes(method: str) -> tuple[type, type]:
    """The config and the trainer of a method. Imports TRL, which takes seconds."""
    module = import_module(f"trl_vpo.trainers.{method}")
    config, trainer = METHODS[method]
    return getattr(module, config), getattr(module, trainer)


def method_of(recipe: Path) -> str:
    """Return the method of a recipe: its header's `trl-vpo train METHOD`, else its file name or folder.

    Raises RecipeError.
    """
    header = re.findall(r"^#.*\btrain(?:\.py)?\s+(\w+)", recipe_text(recipe), re.MULTILINE)
    for name in [*header, recipe.stem, *reversed(recipe.parent.parts)]:
        if name in METHODS:
            return name
    raise RecipeError(
        f"{recipe} does not say which method it is for. Begin it with the line `# trl-vpo train METHOD`; methods are "
        f"{', '.join(METHODS)}."
    )
