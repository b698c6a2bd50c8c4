"""`--accelerate_config` and `--num_processes`: a command of `trl-vpo` started through `accelerate launch`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from trl_vpo.errors import RecipeError, did_you_mean
from trl_vpo.runs.recipe_file import LAUNCH_KEYS, read_recipe, split_config


def launch_options(options: list[str]) -> tuple[list[str], list[str]]:
    """Return (options for the training, options for `accelerate launch`): the command line's win over the recipe's.

    Raises:
        RecipeError: `--accelerate_config` names nothing, or `--num_processes` is no number of processes.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in LAUNCH_KEYS:
        parser.add_argument(f"--{name}")
    known, kept = parser.parse_known_args(options)
    values = _of_recipe(kept) | vars(known)
    processes = values.get("num_processes", "1")
    if not processes.isdecimal() or int(processes) < 1:
        raise RecipeError(f"num_processes is {processes!r}: give a whole number of at least 1.")
    if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):  # launched already
        return kept, []
    launch = []
    if "accelerate_config" in values:
        launch += ["--config_file", str(_accelerate_config(values["accelerate_config"]))]
    if "num_processes" in values:
        launch += ["--num_processes", processes]
    return kept, launch


def _of_recipe(options: list[str]) -> dict[str, str]:
    """The launch keys of the recipe in `--config`. A recipe that cannot be read is the trainer's to complain about."""
    try:
        path, _ = split_config(options)
        recipe = read_recipe(path) if path is not None else {}
    except RecipeError:
        return {}
    return {key: str(recipe[key]) for key in LAUNCH_KEYS if key in recipe}


def _accelerate_config(name: str) -> Path:
    """The file of an `--accelerate_config`: a path, or a name in recipes/accelerate/ or among TRL's own."""
    if Path(name).is_file():
        return Path(name)
    folders = (Path("recipes/accelerate"), Path(find_spec("trl").origin).parent / "accelerate_configs")
    valid = {file.stem: file for folder in reversed(folders) for file in sorted(folder.glob("*.yaml"))}
    if name not in valid:
        raise RecipeError(
            f"accelerate_config {name!r} is neither a file nor one of {', '.join(valid)}.{did_you_mean(name, valid)}"
        )
    return valid[name]


def launch(options: list[str], command: list[str]) -> int:
    """Run a `trl-vpo` command in the processes that `accelerate launch` starts.

    SIGTERM is passed on to them, and they end as they would without a launcher. Returns their exit code.
    """
    # Only here: `trl-vpo --help` imports this module.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from trl_vpo.runs.packages import missing_packages
    from trl_vpo.training.sharding import launched
    from trl_vpo.training.sigterm import STOPPED

    if launched(options).kind.startswith("zero") and (missing := missing_packages({"deepspeed": True})):
        raise RecipeError(f"accelerate_config: {missing[0]}.")
    args = launch_command_parser().parse_args([*options, "--module", "trl_vpo", *command])
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
    """Pass signals on to the processes that this one has started, and not to those that they started.

    With several processes torch handles SIGINT itself, from their start on.
    """
    import psutil

    from trl_vpo.training.sigterm import STOP_SIGNALS

    def pass_on(number, frame):
        children = psutil.Process().children()
        if not children:
            raise SystemExit(128 + number)
        for child in children if number in STOP_SIGNALS or not _in_foreground() else []:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    """Return whether Ctrl-C reaches all processes of the terminal; a second SIGINT would cut short what it began."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:  # no terminal
        return False
