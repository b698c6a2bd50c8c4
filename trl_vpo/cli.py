"""`trl-vpo`: the commands, their parser, and how their errors end.

Each command imports what it runs when it runs, so that `--help` answers at once; only that of a training imports TRL.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trl_vpo import __version__
from trl_vpo.data.import_formats import FORMATS, format_list
from trl_vpo.errors import SourceError, UserError, as_user_errors
from trl_vpo.generate.pipelines import PIPELINES
from trl_vpo.runs import examples
from trl_vpo.runs.parser import Parser
from trl_vpo.runs.quiet import hide_messages
from trl_vpo.runs.recipe_file import read_recipe, split_config
from trl_vpo.runs.secrets import scrub
from trl_vpo.training.launch import check_gpus, launch, launch_options
from trl_vpo.training.methods import METHODS

HELP = {"-h", "--help", "--help-all"}
TRACEBACK = "TRL_VPO_TRACEBACK"
DESCRIPTION = "Preference optimization on TRL of models that see videos and images."


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 1 for what went wrong, 2 for how it was called.

    It ends quietly where nobody reads on, as behind `| head`: code 1.
    """
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()  # else a closed pipe shows when Python exits
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print
        return 1


def _main(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    args.words = argv
    if "run" not in args:
        parser.print_help()
        return 2
    if rest and args.run not in (doctor, evaluate, compare):
        args.parser.error(f"unknown option {rest[0]}. `{args.parser.prog} --help` lists the options.")
    hide_messages()
    try:
        with as_user_errors(kinds=(OSError,)):  # of disks, wherever a file is written
            return args.run(args, rest)
    except KeyboardInterrupt:  # whoever was interrupted has said how to continue
        return 130
    except UserError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            print(flush=True)  # raises it again, unless another pipe broke than the one that this prints to
        if os.environ.get(TRACEBACK):
            raise
        print(f"trl-vpo: error: {scrub(_message(error))}\n({TRACEBACK}=1 shows where.)", file=sys.stderr)
        return error.exit_code


def _message(error: UserError) -> str:
    """The message of an error; torch puts the traceback of a data-loader worker in front of it."""
    parts = str(error).split(f"\n{type(error).__module__}.{type(error).__qualname__}: ")
    return parts[-1].rstrip() if parts[0].startswith("Caught ") else str(error)


# --- the commands: parsed arguments -> exit code --------------------------------------------------------------------


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


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a command by name."""
    return {name: value for name, value in vars(args).items() if name not in ("run", "parser", "words")}


def evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    """Measure the base and its adapters, or run benchmarks of lmms-eval."""
    options, launcher = launch_options(args.words[1:])  # argparse would tear unknown options from their values
    if not HELP & set(options):
        _check_paths(options, args.words, launcher)
        if launcher:
            return launch(launcher, args.words)
    _imported("trl_vpo.evaluate.command:evaluate")(options)
    return 0


def compare(args: argparse.Namespace, rest: list[str]) -> int:
    """Train recipes and compare what comes of them; each training and the evaluation is a command of its own."""
    for recipe in args.config:
        read_recipe(recipe)  # a wrong name is found before TRL is imported
    plan = _imported("trl_vpo.compare.plan:read_plan")(args.config, args.held_out, args.out, rest)
    _imported("trl_vpo.compare.run:run_compare")(plan, main)
    return 0


def plot(args: argparse.Namespace, rest: list[str]) -> int:
    """Draw, and say what could not be drawn."""
    notes = _imported("trl_vpo.report.plot.page:plot_runs")(args.runs, args.out, names=args.names)
    print("\n".join([str(args.out), *notes]))
    return 0


def merge(args: argparse.Namespace, rest: list[str]) -> int:
    """Merge, and say what a user should know about the result."""
    _imported("trl_vpo.models.source:read_config")(args.adapter)  # a wrong path is found before torch is imported
    notes = _imported("trl_vpo.models.merge:merge")(**_given(args))
    print("\n".join([f"Merged into {args.out}.", *notes]))
    return 0


def view(args: argparse.Namespace, rest: list[str]) -> int:
    """Write the page and say what is in it."""
    counts = _imported("trl_vpo.report.view.page:write_page")(**_given(args))
    print(f"{args.out}: {counts}")
    return 0


def import_data(args: argparse.Namespace, rest: list[str]) -> int:
    """Convert a file, and say what came of it."""
    convert = _imported("trl_vpo.data.importers:convert")
    counts = convert(args.format, args.source, args.target, media_root=args.media_root, on_bad=args.on_bad)
    print(counts.report(args.target))
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
    _imported("trl_vpo.testbed.quickstart:run_quickstart")(args.out, args.methods, main, data_only=args.data_only)
    return 0


# --- the parser -----------------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="trl-vpo", description=DESCRIPTION, epilog=examples.TRAIN_EXAMPLE.split("\n\n")[0])
    parser.add_argument("--version", action="version", version=f"trl-vpo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_method_command(commands, train, "train a model with a method", METHODS, examples.TRAIN_EXAMPLE)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_method_command(
        commands, generate, "make preference data with the model itself", PIPELINES, examples.GENERATE_EXAMPLE
    )
    for add in (_add_plot, _add_merge, _add_view, _add_import, _add_doctor, _add_recipes, _add_quickstart):
        add(commands)
    return parser


def _add(commands, name: str, run: Callable, text: str, **options) -> Parser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", **options)
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_method_command(commands, run: Callable, text: str, methods: Iterable[str], example: str) -> None:
    """Add a command that takes a method, and behind it a recipe and its keys."""
    usage = f"trl-vpo {run.__name__} METHOD --config RECIPE [--key value ...]"
    parser = _add(commands, run.__name__, run, text, epilog=example, usage=usage)
    parser.add_argument("method", metavar="METHOD", choices=methods, help=f"one of {', '.join(methods)}")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="--config RECIPE and recipe keys")


def _add_evaluate(commands) -> None:
    text = "held-out measures of a base and its adapters, with confidence intervals"
    parser = _add(commands, "evaluate", evaluate, text, add_help=False)  # the command shows usage and keys
    parser.add_argument("options", nargs=argparse.REMAINDER, help="--config RECIPE and its keys")


def _add_compare(commands) -> None:
    usage = (
        "trl-vpo compare --config RECIPE [RECIPE ...] --held_out FILE [--out DIR]\n"
        "                       [--accelerate_config FILE] [--num_processes N]\n"
        "                       [--key value ...]"
    )
    text = "train recipes and compare them on held-out rows: a table, a figure"
    parser = _add(commands, "compare", compare, text, epilog=examples.COMPARE_EXAMPLE, usage=usage)
    several = "recipes of trainings, or one of a comparison"
    parser.add_argument("--config", metavar="RECIPE", nargs="+", required=True, help=several)
    parser.add_argument("--held_out", "--dataset", metavar="FILE", help="rows as `trl-vpo evaluate` takes them")
    out = "folder to write (default: outputs/compare)"
    parser.add_argument("--out", "--output_dir", metavar="DIR", help=out)


def _add_plot(commands) -> None:
    text = "the curves of training runs in one figure or page"
    parser = _add(commands, "plot", plot, text, epilog=examples.PLOT_EXAMPLE)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="an output_dir, or a checkpoint")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, required=True, help=".html, .png, .svg or .pdf")
    parser.add_argument("--names", metavar="NAME", nargs="+", help="what the legend says, one for each run")


def _add_merge(commands) -> None:
    text = "an adapter and its base -> a model that loads without PEFT"
    parser = _add(commands, "merge", merge, text, epilog=examples.MERGE_EXAMPLE)
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of the adapter")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write, new or empty")
    parser.add_argument("--base", metavar="MODEL", help="default: the base that the adapter names")
    parser.add_argument("--revision", metavar="REV", help="revision of the base")
    parser.add_argument("--dtype", default="auto", help="of the saved weights (default: as the base's)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base")


def _add_view(commands) -> None:
    parser = _add(commands, "view", view, "preference data as one HTML page to look at", epilog=examples.VIEW_EXAMPLE)
    parser.add_argument("dataset", metavar="DATASET", help="a dataset, a file, or the folder of a run")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, required=True, help="the page to write")
    parser.add_argument("--split", default="train", help="split of the dataset (default: train)")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N rows")
    parser.add_argument("--media_root", metavar="DIR", help="folder that relative media paths start from")
    parser.add_argument("--num_frames", metavar="N", type=int, default=8, help="frames of a clip (default: 8)")


def _add_import(commands) -> None:
    text = "data of another project -> rows to train on, generate pairs from or evaluate on"
    parser = _add(commands, "import", import_data, text, epilog=examples.IMPORT_EXAMPLE)
    parser.add_argument("format", metavar="FORMAT", choices=FORMATS, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument(
        "source", metavar="IN", type=Path, help="a .json, .jsonl or .parquet file; of some benchmarks also a folder"
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="the .jsonl file to write")
    shown = "show every format with its fields, and exit"
    parser.add_argument("--list", action="version", version=format_list(), help=shown)
    parser.add_argument("--media_root", metavar="DIR", help="folder that relative media paths are joined to")
    bad = "a bad record stops the import (default), or is left out and listed in OUT.rejected.jsonl"
    parser.add_argument("--on_bad", choices=("error", "skip"), default="error", help=bad)


def _add_doctor(commands) -> None:
    usage = (
        "trl-vpo doctor RECIPE [--method METHOD] [--rows N | --all] [--out FILE]\n"
        "                      [--gpu_memory GIB] [--measure] [--accelerate_config FILE]\n"
        "                      [--num_processes N] [--key value ...]"
    )
    text = "check a recipe and its whole dataset before training"
    parser = _add(commands, "doctor", doctor, text, epilog=examples.DOCTOR_EXAMPLE, usage=usage)
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a recipe's .yaml file, or its name")
    method = "default: what the recipe's header or path says"
    parser.add_argument("--method", metavar="METHOD", choices=METHODS, help=method)
    many = parser.add_mutually_exclusive_group()
    rows = "rows to tokenize (default: 64, spread evenly)"
    many.add_argument("--rows", metavar="N", type=int, default=64, help=rows)
    many.add_argument("--all", action="store_true", help="tokenize every row")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write every problem into this .jsonl file")
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--gpu_memory", metavar="GIB", type=float, help="memory of each GPU in GiB (default: this machine's GPU)"
    )
    memory.add_argument("--measure", action="store_true", help="also train two steps on this machine's GPU")
    # Text only: they are passed on to `run_doctor` among the recipe's keys.
    parser.add_argument_group(
        "the processes that memory is estimated for",
        "--accelerate_config FILE  how the weights are sharded, as in `trl-vpo train`\n"
        "--num_processes N         how many GPUs",
    )


def _add_recipes(commands) -> None:
    parser = _add(commands, "recipes", recipes, "list, show or copy the recipes of the package")
    actions = ("list", "show", "copy")
    text = "list (the default), show or copy"
    parser.add_argument("action", metavar="ACTION", nargs="?", choices=actions, default="list", help=text)
    parser.add_argument("name", metavar="NAME", nargs="?", help="of the recipe to show or copy")
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, default=".", help="or FILE.yaml to copy to (default: .)"
    )
    parser.add_argument("--json", action="store_true", help="list everything that is known, as JSON")


def _add_quickstart(commands) -> None:
    parser = _add(commands, "quickstart", quickstart, "train four methods, or those named, on a small world, on a CPU")
    parser.add_argument("--out", metavar="DIR", type=Path, default="outputs/quickstart", help="folder to write")
    four = ["dpo", "leanpo", "rrpo", "lpoi"]
    text = f"of {', '.join(METHODS)} (default: {' '.join(four)})"
    parser.add_argument("--methods", metavar="METHOD", nargs="+", choices=METHODS, default=four, help=text)
    parser.add_argument("--data_only", action="store_true", help="write the rows, and train nothing")


if __name__ == "__main__":
    sys.exit(main())
