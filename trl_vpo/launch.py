"""`--accelerate_config` and `--num_processes`: a command of `trl-vpo` started through `accelerate launch`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def launch_options(options: list[str]) -> tuple[list[str], list[str]]:
    """(options for the training, options for `accelerate launch`): those of the command line win over the recipe's.

    Raises:
        RecipeError: `--accelerate_config` names nothing.
    """
    found: dict[str, str] = {}
    kept = list(options)
    for name in ("accelerate_config", "num_processes"):
        for at, option in enumerate(kept):
            if option == f"--{name}" and at + 1 < len(kept):
                found[name] = kept[at + 1]
                del kept[at : at + 2]
                break
            if option.startswith(f"--{name}="):
                found[name] = kept.pop(at).split("=", 1)[1]
                break
    found = _of_recipe(kept) | found
    if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):  # launched already
        return kept, []
    launch = (
        ["--config_file", str(accelerate_config(found["accelerate_config"]))] if "accelerate_config" in found else []
    )
    return kept, launch + (["--num_processes", found["num_processes"]] if "num_processes" in found else [])


def _of_recipe(options: list[str]) -> dict[str, str]:
    """The launch keys of the recipe in `--config`. A recipe that cannot be read is the trainer's to complain about."""
    import yaml

    from trl_vpo.train import config_path

    path = config_path(options)
    if path is None or not Path(path).is_file():
        return {}
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return {}
    keys = ("accelerate_config", "num_processes")
    return {key: str(recipe[key]) for key in keys if isinstance(recipe, dict) and key in recipe}


def accelerate_config(name: str) -> Path:
    """The file of an `--accelerate_config`: a path, or a name in recipes/accelerate/ or among TRL's own."""
    from importlib.util import find_spec

    if Path(name).is_file():
        return Path(name)
    folders = (Path("recipes/accelerate"), Path(find_spec("trl").origin).parent / "accelerate_configs")
    valid = {file.stem: file for folder in reversed(folders) for file in sorted(folder.glob("*.yaml"))}
    if name not in valid:
        from trl_vpo.recipe import RecipeError, nearest

        raise RecipeError(
            f"accelerate_config {name!r} is no file and none of {', '.join(valid)}.{nearest(name, valid)}"
        )
    return valid[name]


def launch(options: list[str], command: list[str]) -> int:
    """Run a `trl-vpo` command in the processes that `accelerate launch` starts."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args([*options, "--module", "trl_vpo.cli", *command]))
    except ChildFailedError as error:  # the failing process has said what happened; the launcher's trace adds nothing
        print(error, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:  # of a single process. Its text is the whole command, with tokens
        return error.returncode
    return 0
