"""The paths in a recipe and its options, checked before the seconds that importing TRL takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from trl_vpo.data.hub_names import check_on_hub
from trl_vpo.data.paths import check_exists, check_output_dir, row_format
from trl_vpo.errors import DatasetError
from trl_vpo.models.source import check_adapter, check_model
from trl_vpo.runs.named_recipes import shipped_model
from trl_vpo.runs.recipe_file import read_recipe, split_config

KEYS = {  # what names paths, or says how they are meant, with other spellings of the option
    "model_name_or_path": ["--model"], "model_revision": [], "server_url": [], "dataset_name": ["--data"],
    "media_root": [], "output_dir": [], "from_adapter": [],
}  # fmt: skip


def check_paths(options: list[str]) -> None:
    """Refuse paths that lead nowhere, in the words of those who read them later. Values of other kinds pass.

    Raises UserError.
    """
    recipe, options = split_config(options)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for key, others in KEYS.items():
        parser.add_argument(f"--{key}", f"--{key.replace('_', '-')}", *others, nargs="?")
    parser.add_argument("--adapters", nargs="*")
    given = (read_recipe(recipe) if recipe else {}) | vars(parser.parse_known_args(options)[0])
    adapters = given.pop("adapters", None) or []
    paths = {key: value for key, value in given.items() if value and isinstance(value, str)}
    if name := paths.get("output_dir"):
        check_output_dir(name)
    if name := paths.get("media_root"):
        from trl_vpo.media.images import check_media_root

        check_media_root(name)
    if name := paths.get("dataset_name"):
        try:
            _check_rows(name)
        except DatasetError as error:
            raise DatasetError(f"{error}{_written_by(recipe, name)}") from error
    if (name := paths.get("model_name_or_path")) and "server_url" not in paths:
        check_model(shipped_model(name), revision=paths.get("model_revision"), settle=False)
    if name := paths.get("from_adapter"):
        check_adapter(name, key="from_adapter", settle=False)
    for name in [adapters] if isinstance(adapters, str) else adapters:
        check_adapter(str(name), key="adapters", settle=False)


def _written_by(recipe: str | None, rows: str) -> str:
    """Say which command writes the rows that a recipe of the quickstart names."""
    if not recipe or "quickstart/" not in recipe or read_recipe(recipe).get("dataset_name") != rows:
        return ""
    return " `trl-vpo quickstart`, given here, writes it."


def _check_rows(name: str) -> None:
    if row_format(Path(name)):
        check_exists(Path(name))
    elif not Path(name).exists():
        check_on_hub(name, key="dataset_name", kind="dataset", file="", settle=False)
