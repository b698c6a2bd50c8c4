"""`--accelerate_config` and `--num_processes`: a command of `trl-vpo` started through `accelerate launch`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STOPPED = 128 + signal.SIGTERM
STOP = (signal.SIGTERM, signal.SIGUSR1)  # SLURM sends USR1 ahead of the end where `--signal=USR1@60` asks for it


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
    if not found.get("num_processes", "1").isdecimal() or int(found.get("num_processes", 1)) < 1:
        from trl_vpo.errors import RecipeError

        raise RecipeError(f"num_processes is {found['num_processes']!r}: give a whole number of at least 1.")
    if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):  # launched already
        return kept, []
    launch = (
        ["--config_file", str(accelerate_config(found["accelerate_config"]))] if "accelerate_config" in found else []
    )
    return kept, launch + (["--num_processes", found["num_processes"]] if "num_processes" in found else [])


def _of_recipe(options: list[str]) -> dict[str, str]:
    """The launch keys of the recipe in `--config`. A recipe that cannot be read is the trainer's to complain about."""
    from trl_vpo.errors import RecipeError
    from trl_vpo.runs.recipe_file import read_recipe
    from trl_vpo.training.run import config_path

    path = config_path(options)
    try:
        recipe = read_recipe(path) if path is not None else {}
    except RecipeError:
        return {}
    return {key: str(recipe[key]) for key in ("accelerate_config", "num_processes") if key in recipe}


def accelerate_config(name: str) -> Path:
    """The file of an `--accelerate_config`: a path, or a name in recipes/accelerate/ or among TRL's own."""
    from importlib.util import find_spec

    if Path(name).is_file():
        return Path(name)
    folders = (Path("recipes/accelerate"), Path(find_spec("trl").origin).parent / "accelerate_configs")
    valid = {file.stem: file for folder in reversed(folders) for file in sorted(folder.glob("*.yaml"))}
    if name not in valid:
        from trl_vpo.errors import RecipeError, did_you_mean

        raise RecipeError(
            f"accelerate_config {name!r} is no file and none of {', '.join(valid)}.{did_you_mean(name, valid)}"
        )
    return valid[name]


def launch(options: list[str], command: list[str]) -> int:
    """Run a `trl-vpo` command in the processes that `accelerate launch` starts.

    SIGTERM goes on to them, and they end as they would without a launcher. The exit code is theirs.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from trl_vpo.errors import RecipeError
    from trl_vpo.runs.packages import missing_packages
    from trl_vpo.training.sharding import launched

    if launched(options).kind.startswith("zero") and (missing := missing_packages({"deepspeed": True})):
        raise RecipeError(f"accelerate_config: {missing[0]}.")
    args = launch_command_parser().parse_args([*options, "--module", "trl_vpo.cli", *command])
    # torch's own, without SIGTERM: it would kill a training that needs more than 30 s to save, and at once the
    # processes that load its data, without which it cannot finish the step.
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    try:
        with _signals_passed_on():
            launch_command(args)
    except ChildFailedError as error:  # the failing process has said what happened; the launcher's trace adds nothing
        if {failure.exitcode for failure in error.failures.values()} <= {STOPPED, -signal.SIGTERM}:
            return STOPPED
        print(error, file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    except subprocess.CalledProcessError as error:  # of a single process. Its text is the whole command, with tokens
        return error.returncode if error.returncode >= 0 else 128 - error.returncode
    return 0


@contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Signals go on to the processes that this one has started, and not to those that they started.

    With several processes torch handles SIGINT itself, from their start on.
    """
    import psutil  # accelerate needs it, too

    def pass_on(number, frame):
        children = psutil.Process().children()
        if not children:
            raise SystemExit(128 + number)
        for child in children if number in STOP or not _in_foreground() else []:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (*STOP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    """Ctrl-C in the terminal reaches all processes here; a second SIGINT would cut short what the first one began."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:  # no terminal
        return False
