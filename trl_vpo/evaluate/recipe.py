"""Turn the options of `trl-vpo evaluate` into its settings."""

from __future__ import annotations

from dataclasses import replace

from trl_vpo.errors import RecipeError
from trl_vpo.evaluate.config import EvaluateConfig
from trl_vpo.evaluate.trained import trained_media
from trl_vpo.runs.recipe import RecipeParser


def make_parser() -> RecipeParser:
    return RecipeParser([EvaluateConfig], any_device=True, prog="trl-vpo evaluate")


def parse(argv: list[str]) -> EvaluateConfig:
    """Return the settings; unset video settings are those of the adapters' training."""
    if sum(arg.split("=")[0] == "--adapters" for arg in argv) > 1:
        raise RecipeError("--adapters is given twice, and the first would be lost: name all of them behind one.")
    parser = make_parser()
    config = parser.parse(argv)[0]
    config.check_can_start(
        model_name_or_path="the base model, a folder or a Hub model",
        dataset_name="the held-out rows",
        output_dir="a folder for the run",
    )
    return replace(config, **trained_media(config.adapters, parser.given))
