"""A comparison: each training and the evaluation is a `trl-vpo` command of its own, in its own process.

    NAME/          a training's output_dir; with its run.json it is finished
    evaluation/    of the base and all adapters, as `trl-vpo evaluate` writes it
    table.md, compare.png

The same command continues: what is finished is kept, a training resumes from its newest complete checkpoint, the
evaluation with its next row.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from trl_vpo.compare.plan import Plan, check_plan
from trl_vpo.compare.table import Folders, heading, measured, print_table, write_table
from trl_vpo.errors import UserError
from trl_vpo.evaluate.results import BASE
from trl_vpo.report.plot import style
from trl_vpo.report.plot.curves import training_figure
from trl_vpo.report.plot.runs import read_runs
from trl_vpo.runs.console import make_console
from trl_vpo.training.launch import signals_passed_on
from trl_vpo.training.sigterm import STOPPED

Command = Callable[[list[str]], int]  # the words of a `trl-vpo` command -> its exit code


def run_compare(plan: Plan, command: Command) -> None:
    """Train what is not finished, evaluate, and write and print the comparison.

    `command` runs a `trl-vpo` command; it is called in a process of its own. Raises UserError as `check_plan` does, or
    if a command failed; SystemExit with its exit code if it was stopped by Ctrl-C or a signal.
    """
    finished, console = check_plan(plan), make_console()
    for place, training in enumerate(plan.trainings, 1):
        what = f"{place} of {len(plan.trainings)}: {training.name}"
        if training.name in finished:
            console.print(f"{what} is finished.")
            continue
        console.rule(what)
        options = training.options(plan.folder(training))
        options += ["--resume_from_checkpoint", "true"] if training.resumes else []
        _run(["train", training.method, *options], f"the training of {training.name}", command)
    console.rule(f"held-out rows: {plan.held_out}")
    folders = {training.name: plan.folder(training) for training in plan.trainings}
    words = ["evaluate", *plan.evaluation_options(), "--adapters", *map(str, folders.values())]
    _run(words, "the evaluation", command, printed=False)  # its table has every measure
    results = json.loads((plan.evaluation / "results.json").read_text(encoding="utf-8"))
    print_table(results, folders)
    table, figure = write_table(results, folders, plan.out / "table.md"), plan.out / "compare.png"
    notes = write_figure(results, folders, figure)
    console.print("\n".join([*notes, f"Table:  {table}", f"Figure: {figure}"]), soft_wrap=True)


def write_figure(results: dict[str, Any], folders: Folders, path: Path) -> list[str]:
    """Draw the trainings' curves and what was measured on held-out rows; return the notes on what is shown."""
    runs = read_runs(list(folders.values()), list(folders))
    models = results["contestants"].items()
    held_out = {
        f"{heading(measure)} (held out)": {name: own["measures"][measure] for name, own in models}
        for measure in measured(results)
    }
    figure, notes = training_figure({run.name: run.history for run in runs}, held_out=held_out, base=BASE)
    style.save(figure, path)
    return notes


def _run(words: list[str], what: str, command: Command, *, printed: bool = True) -> None:
    """Run a command in a process of its own; errors and progress are always shown.

    It is forked, with everything imported, where there is no accelerator; on one, a fork could not use it.
    """
    if torch.accelerator.is_available():
        output = None if printed else subprocess.DEVNULL
        process = subprocess.Popen([sys.executable, "-m", "trl_vpo", *words], stdout=output)
        with signals_passed_on():
            code = process.wait()
    else:
        process = get_context("fork").Process(target=_forked, args=(command, words, printed))
        process.start()
        with signals_passed_on():
            process.join()
        code = process.exitcode
    if code in (130, STOPPED, -signal.SIGTERM):
        print("Stopped. The same command continues.", file=sys.stderr)
        raise SystemExit(STOPPED if code < 0 else code)
    if code:
        raise UserError(
            f"{what} failed with exit code {code}; what it printed is above. Once that is corrected, the same command "
            "continues: what is finished is kept."
        )


def _forked(command: Command, words: list[str], printed: bool) -> None:
    if not printed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # also of the processes that a launcher starts
    sys.exit(command(words))
