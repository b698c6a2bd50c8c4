"""The commands of `trl-vpo`: parsed arguments -> what they run -> exit code.

Each imports what it runs when it runs, so that `--help` answers at once; only that of a training method imports TRL.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

from trl_vpo.errors import SourceError
from trl_vpo.runs.recipe_file import read_recipe, split_config
from trl_vpo.training.launch import check_gpus, launch, launch_options

HELP = {"-h", "--help", "--help-all"}


def train(args: argparse.Namespace, rest: list[str]) -> int:
    """Train in this process, or in those that accelerate launches."""
    return _with_recipe(args, "trl_vpo.training.help:method_help", "trl_vpo.training.run:run_training")


def generate(args: argparse.Namespace, rest: list[str]) -> int:
    """Generate in this process, or in those that accelerate launches, and show the run's summary."""
    return _with_recipe(args, "trl_vpo.generate.pipelines:pipeline_help", "trl_vpo.generate.run:run_generation")


def _with_recipe(args: argparse.Namespace, help_page: str, run: str) -> int:
    """Run a command whose options are a recipe's keys, or show them. `help_page` and `run` are MODULE:FUNCTION."""
    if HELP & set(args.options):
        print(_imported(help_page)(args.method, "--help-all" in args.options))
        return 0
    if recipe := split_config(args.options)[0]:
        _imported("trl_vpo.runs.recipe_list:check_command")(recipe, args.run.__name__, args.method)
    options, launcher = launch_options(args.options)
    _check_paths(options, args.words, launcher)
    if launcher:
        return launch(launcher, args.words)
    _imported(run)(args.method, options)
    return 0


def _check_paths(options: list[str], words: list[str], launcher: list[str]) -> None:
    try:
        _imported("trl_vpo.models.paths:check_paths")(options)
    except SourceError:
        if launcher:
            check_gpus(words, launcher)  # said first: a model would be fetched in vain
        raise


def _imported(name: str) -> Callable:
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    """Measure the base and its adapters, or run benchmarks of lmms-eval."""
    options, launcher = launch_options(args.words[1:])  # argparse would tear unknown options from their values
    if not HELP & set(options):
        _check_paths(options, args.words, launcher)
        if launcher:
            return launch(launcher, args.words)
    _imported("trl_vpo.evaluate.command:evaluate")(options)
    return 0


def plot(args: argparse.Namespace, rest: list[str]) -> int:
    """Draw, and say what could not be drawn."""
    from trl_vpo.report.plot.page import plot_runs

    notes = plot_runs(args.runs, args.out, names=args.names)
    print("\n".join([str(args.out), *notes]))
    return 0


def merge(args: argparse.Namespace, rest: list[str]) -> int:
    """Merge, and say what a user should know about the result."""
    _imported("trl_vpo.models.source:read_config")(args.adapter)  # a wrong path is found before torch is imported
    from trl_vpo.models.merge import merge as merge_adapter

    notes = merge_adapter(
        args.adapter, args.out, base=args.base, dtype=args.dtype, revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    print("\n".join([f"Merged into {args.out}.", *notes]))
    return 0


def view(args: argparse.Namespace, rest: list[str]) -> int:
    """Write the page and say what is in it."""
    from trl_vpo.report.view.page import write_page

    counts = write_page(
        args.dataset, args.out, split=args.split, limit=args.limit, media_root=args.media_root,
        num_frames=args.num_frames,
    )  # fmt: skip
    print(f"{args.out}: {counts}")
    return 0


def import_data(args: argparse.Namespace, rest: list[str]) -> int:
    """Convert a file and report the rows."""
    from trl_vpo.data.importers import convert

    counts = convert(args.format, args.source, args.target, media_root=args.media_root, on_bad=args.on_bad)
    print(f"{args.target}: {counts.written} rows of {counts.read} records.")
    print(f"Media files: {counts.media}, {counts.missing_media} missing.")
    if counts.rejected:
        print(f"Left out: {counts.rejected}; {counts.rejected_path} says why.")
    if counts.ignored_fields:
        print(f"Fields not carried over: {', '.join(counts.ignored_fields)}.")
    for note in counts.left_to_do:
        print(note)
    return 0


def doctor(args: argparse.Namespace, rest: list[str]) -> int:
    """Check a recipe and its data."""
    read_recipe(args.recipe)  # a wrong name is found before TRL is imported
    _imported("trl_vpo.runs.recipe_list:check_command")(str(args.recipe), "train", args.method)
    return _imported("trl_vpo.doctor.checks:run_doctor")(
        args.recipe, rest, method=args.method, rows=None if args.all else args.rows, out=args.out,
        gpu_memory=args.gpu_memory, measures=args.measure,
    )  # fmt: skip


def recipes(args: argparse.Namespace, rest: list[str]) -> int:
    """List, show or copy the recipes of the package."""
    _imported("trl_vpo.runs.recipe_list:run_recipes")(args.action, args.name, args.folder, as_json=args.json)
    return 0


def quickstart(args: argparse.Namespace, rest: list[str]) -> int:
    """Train and compare the methods on the small world."""
    _imported("trl_vpo.testbed.quickstart:run_quickstart")(args.out, args.methods)
    return 0
