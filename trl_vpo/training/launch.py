"""`--accelerate_config` and `--num_processes`: a command of `trl-vpo` started through `accelerate launch`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from trl_vpo.errors import RecipeError, as_user_errors
from trl_vpo.runs.named_recipes import find_accelerate_config
from trl_vpo.runs.recipe_file import LAUNCH_KEYS, read_accelerate_config, read_recipe, split_config
from trl_vpo.runs.secrets import STARS, scrub


def launch_options(options: list[str]) -> tuple[list[str], list[str]]:
    """Return (options for the training, options for `accelerate launch`): the command line's win over the recipe's.

    Raises RecipeError.
    """
    known, kept = _taken_out(LAUNCH_KEYS, options)
    values = {key: str(value) for key, value in _recipe_of(kept).items() if key in LAUNCH_KEYS} | known
    processes = values.get("num_processes", "1")
    if not processes.isdecimal() or int(processes) < 1:
        raise RecipeError(f"num_processes is {processes!r}: give a whole number of at least 1.")
    if {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ):  # launched already
        return kept, []
    launch = []
    if "accelerate_config" in values:
        file = find_accelerate_config(values["accelerate_config"])
        read_accelerate_config(file)  # refuses what cannot be read
        launch += ["--config_file", str(file)]
    if "num_processes" in values:
        launch += ["--num_processes", processes]
    return kept, launch


def _taken_out(keys: Iterable[str], words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return (the values of these options, the words without them)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for key in keys:
        parser.add_argument(f"--{key}", **({"nargs": "?", "const": "true"} if key == "use_cpu" else {}))
    known, kept = parser.parse_known_args(words)
    return vars(known), kept


def _recipe_of(options: list[str]) -> dict[str, Any]:
    """Return the recipe in `--config`."""
    name, _ = split_config(options)
    return read_recipe(name) if name is not None else {}


def check_gpus(words: list[str], launch: list[str]) -> None:
    """Refuse more processes than this machine has GPUs, before anything is loaded. A run on CPUs is never refused.

    `words` are the command, such as `["train", "rrpo", "--config", "rrpo/qwen2_5_vl_7b"]`, and `launch` is what
    `launch_options` made of it. Raises RecipeError, which names the command for the GPUs that there are; for `train`
    with the same effective batch.
    """
    import torch

    given = dict(zip(launch[::2], launch[1::2]))
    file = given.get("--config_file")
    config = read_accelerate_config(file) if file else {}
    processes = int(given.get("--num_processes") or config.get("num_processes") or 1)
    machines, gpus = int(config.get("num_machines") or 1), torch.accelerator.device_count()
    options, kept = _taken_out(("use_cpu", "device", "gradient_accumulation_steps", *LAUNCH_KEYS), words)
    values = _recipe_of(kept) | options
    cpu = str(values.get("use_cpu")).lower() in ("true", "1", "yes") or values.get("device") == "cpu"
    engine = str(config.get("distributed_type")).upper()
    if cpu and engine in ("DEEPSPEED", "FSDP") and not config.get("use_cpu"):
        raise RecipeError(f"the accelerate config {file} is for GPUs. On CPUs: --accelerate_config cpu2.")
    if cpu or config.get("use_cpu") or processes <= gpus * machines:
        return
    steps = str(values.get("gradient_accumulation_steps", 1)) if words[0] == "train" else ""
    fewer = _same_batch(processes * int(steps) if steps.isdecimal() else None, max(gpus, 1), machines)
    token, kept = _taken_out(("hub_token",), kept)
    changed = options | dict.fromkeys(token, STARS) | fewer
    command = ["trl-vpo", *kept, *(word for key, value in changed.items() for word in (f"--{key}", str(value)))]
    raise RecipeError(_too_few(processes, gpus, scrub(shlex.join(command)), trains=bool(steps)))


def _too_few(processes: int, gpus: int, command: str, *, trains: bool) -> str:
    """Say that there are fewer GPUs than processes, and which command does the same with those that there are."""
    import torch

    seen = f"sees {gpus} GPU{'s' * (gpus > 1)} here" if gpus else f"({torch.__version__}) sees no GPU here"
    text = f"num_processes is {processes}, but torch {seen}."
    if not gpus:
        text += f" To run on the CPU: {'--use_cpu' if trains else '--device cpu'}."
    if processes > 1:
        this = "This" if gpus else "On a machine with one GPU, this"
        text += f" {this} {'keeps the effective batch' if trains else 'does the same'}:\n  {command}"
    return text


def _same_batch(micro_batches: int | None, gpus: int, machines: int) -> dict[str, int]:
    """Return the processes on so many GPUs, and how often each must accumulate for so many micro-batches a step."""
    if micro_batches is None:
        return {"num_processes": gpus * machines}
    fitting = [n * machines for n in range(1, gpus + 1) if micro_batches % (n * machines) == 0] or [machines]
    return {"num_processes": fitting[-1], "gradient_accumulation_steps": max(micro_batches // fitting[-1], 1)}


def launch(options: list[str], words: list[str]) -> int:
    """Run a `trl-vpo` command in the processes that `accelerate launch` starts.

    SIGTERM is passed on to them, and they end as they would without a launcher. Returns their exit code. Raises
    RecipeError where there are not as many GPUs, or DeepSpeed is missing.
    """
    # Only here: `trl-vpo --help` imports this module.
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from trl_vpo.runs.packages import missing_packages
    from trl_vpo.training.sharding import check_groups, launched
    from trl_vpo.training.sigterm import STOPPED

    if launched(options).kind.startswith("zero") and (missing := missing_packages({"deepspeed": True})):
        raise RecipeError(f"accelerate_config: {missing[0]}.")
    if words[0] == "train":
        check_groups(options)
    check_gpus(words, options)
    if "--config_file" not in options and not os.path.isfile(default_config_file):
        # accelerate would start one process where it sees no GPU, and lists what it was not given.
        several = ["--multi_gpu"] * (launched(options).processes > 1)
        options = [*options, *several, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    args = launch_command_parser().parse_args([*options, "--module", "trl_vpo", *_taken_out(LAUNCH_KEYS, words)[1]])
    # torch's own, without SIGTERM: it would kill a training that needs more than 30 s to save, and at once the
    # processes that load its data, without which it cannot finish the step.
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    try:
        # ValueError is about keys of the config that accelerate does not know, or that contradict each other.
        with signals_passed_on(), as_user_errors("accelerate launch", kinds=(ValueError,)):
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
def signals_passed_on() -> Iterator[None]:
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
