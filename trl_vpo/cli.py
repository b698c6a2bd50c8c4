"""`trl-vpo`: train, evaluate, generate, plot, merge, view, import, doctor.

Only what a command needs is imported, so that `--help` answers at once. With a method, and for `evaluate`, it lists
the keys of recipes, and takes the seconds that importing TRL takes.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from trl_vpo.data.import_formats import FORMATS
from trl_vpo.errors import UserError
from trl_vpo.generate import METHODS as PIPELINES
from trl_vpo.runs.quiet import hide_messages
from trl_vpo.runs.secrets import scrub
from trl_vpo.training.launch import launch, launch_options
from trl_vpo.training.methods import METHODS

TRACEBACK = "TRL_VPO_TRACEBACK"
DESCRIPTION = "Visual preference optimization on TRL: LeanPO, RRPO, LPOI and DPO on videos and images."
TRAIN_EXAMPLE = """\
example:
  trl-vpo train rrpo --config recipes/rrpo/qwen2_5_vl_7b.yaml --dataset_name data/train.jsonl --lora_r 64

Every key of a recipe is also an option and wins over the recipe: `trl-vpo train rrpo --help` lists them all.
Paths start from the working directory. On several GPUs:

  trl-vpo train rrpo --config RECIPE.yaml --accelerate_config zero2 --num_processes 8
  accelerate launch --num_processes 8 scripts/train.py rrpo --config RECIPE.yaml

--accelerate_config takes a file, or the name of one in recipes/accelerate/ or of TRL's own (single_gpu, multi_gpu,
zero1, zero2, zero3, fsdp1, fsdp2). Both launch options may also stand in the recipe."""
GENERATE_EXAMPLE = """\
example:
  trl-vpo generate leanpo --config recipes/leanpo/generate.yaml --dataset_name questions.jsonl --dry-run
  trl-vpo generate leanpo --config recipes/leanpo/generate.yaml --dataset_name questions.jsonl
  trl-vpo train leanpo --config RECIPE.yaml --dataset_name outputs/leanpo-data/rows.jsonl

Every key of a recipe is also an option: `trl-vpo generate leanpo --help` lists them. An interrupted run goes on where
it stopped when the same command is given again. On several GPUs, each with a copy of the model:

  accelerate launch --num_processes 8 scripts/generate.py leanpo --config RECIPE.yaml"""
PLOT_EXAMPLE = """\
example:
  trl-vpo plot outputs/dpo outputs/leanpo -o curves.html"""
MERGE_EXAMPLE = """\
example:
  trl-vpo merge outputs/rrpo merged/rrpo --dtype bfloat16"""
VIEW_EXAMPLE = """\
example:
  trl-vpo view data/train.jsonl -o page.html
  trl-vpo view outputs/leanpo-data -o page.html --limit 500

DATASET is what a recipe's `dataset_name` is, or the folder of a run of `trl-vpo generate`."""
IMPORT_EXAMPLE = """\
example:
  trl-vpo import rrpo self_alignment.json data/train.jsonl --media_root /data/videos"""
DOCTOR_EXAMPLE = """\
example:
  trl-vpo doctor recipes/rrpo/qwen2_5_vl_7b.yaml --dataset_name data/train.jsonl --out problems.jsonl

Recipe keys given as options win over the recipe, as in `trl-vpo train`. Loads the processor and the model's config,
no weights. Exit code 1: something would stop the training."""


class Parser(argparse.ArgumentParser):
    """argparse with examples kept as written, no abbreviations, and the nearest valid value in its errors."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        super().error(scrub(message))

    def _check_value(self, action, value):
        if action.choices is None or value in action.choices:
            return
        close = difflib.get_close_matches(str(value), [str(choice) for choice in action.choices], n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        name = action.metavar or action.dest
        raise argparse.ArgumentError(None, f"{name}: {value!r} is not one of {', '.join(action.choices)}.{hint}")


# What a user can mend; ImportError: of packages that are not installed.
USER_ERRORS = (UserError, ValueError, OSError, ImportError)


def main(argv: list[str] | None = None) -> int:
    """The command line. Gives the exit code: 0, 1 for what went wrong, 2 for how it was called."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    args.words = argv
    if "run" not in args:
        parser.print_help()
        return 2
    if rest and args.run not in (doctor, evaluate):
        args.parser.error(f"unknown option {rest[0]}. `{args.parser.prog} --help` lists the options.")
    hide_messages()
    try:
        return args.run(args, rest)
    except KeyboardInterrupt:  # whoever was interrupted has said how to go on
        return 130
    except Exception as error:
        if os.environ.get(TRACEBACK) or not isinstance(error, USER_ERRORS):
            raise
        print(f"trl-vpo: error: {scrub(_message(error))}\n({TRACEBACK}=1 shows where.)", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _message(error: Exception) -> str:
    """What an error says; torch puts the traceback of a data-loader worker in front of that."""
    parts = str(error).split(f"\n{type(error).__module__}.{type(error).__qualname__}: ")
    return parts[-1].rstrip() if parts[0].startswith("Caught ") else str(error)


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="trl-vpo", description=DESCRIPTION, epilog=TRAIN_EXAMPLE.split("\n\n")[0])
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    _add_generate(commands)
    _add_plot(commands)
    _add_merge(commands)
    _add_view(commands)
    _add_import(commands)
    _add_doctor(commands)
    return parser


def _add_train(commands) -> None:
    text = "train a model with a method"
    _add_method_command(commands, "train", text, METHODS, TRAIN_EXAMPLE).set_defaults(run=train)


def _add_generate(commands) -> None:
    text = "make preference data with the model itself"
    _add_method_command(commands, "generate", text, PIPELINES, GENERATE_EXAMPLE).set_defaults(run=generate)


def _add_method_command(commands, name: str, text: str, methods: Iterable[str], example: str) -> Parser:
    """A command that takes a method, and behind it a recipe and its keys."""
    parser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=example,
        usage=f"trl-vpo {name} METHOD --config RECIPE.yaml [--any_key value ...]",
    )  # fmt: skip
    parser.add_argument("method", metavar="METHOD", choices=methods, help=f"one of {', '.join(methods)}")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="--config RECIPE.yaml and recipe keys")
    parser.set_defaults(parser=parser)
    return parser


def _add_evaluate(commands) -> None:
    text = "held-out measures of a base and its adapters, with confidence intervals"
    evaluate_parser = commands.add_parser(
        "evaluate", help=text, description=text, add_help=False,  # the keys are shown by the command
        usage="trl-vpo evaluate --model BASE --adapters A [B ...] --data FILE --output_dir RUN [--any_key value ...]",
    )  # fmt: skip
    evaluate_parser.add_argument("options", nargs=argparse.REMAINDER, help="--config RECIPE.yaml and its keys")
    evaluate_parser.set_defaults(run=evaluate, parser=evaluate_parser)


def _add_plot(commands) -> None:
    text = "the curves of training runs in one figure or page"
    plot_parser = commands.add_parser("plot", help=text, description=text, epilog=PLOT_EXAMPLE)
    plot_parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="an output_dir, or a checkpoint")
    plot_parser.add_argument("-o", "--out", metavar="FILE", type=Path, required=True, help=".html, .png, .svg or .pdf")
    plot_parser.add_argument("--names", metavar="NAME", nargs="+", help="what the legend says, one for each run")
    plot_parser.set_defaults(run=plot, parser=plot_parser)


def _add_merge(commands) -> None:
    text = "an adapter and its base -> a model that loads without PEFT"
    merge_parser = commands.add_parser("merge", help=text, description=text, epilog=MERGE_EXAMPLE)
    merge_parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of the adapter")
    merge_parser.add_argument("out", metavar="OUT", type=Path, help="folder to write, new or empty")
    merge_parser.add_argument("--base", metavar="MODEL", help="default: the base that the adapter names")
    merge_parser.add_argument("--revision", metavar="REV", help="revision of the base")
    merge_parser.add_argument("--dtype", default="auto", help="of the saved weights (default: as the base's)")
    merge_parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base")
    merge_parser.set_defaults(run=merge, parser=merge_parser)


def _add_view(commands) -> None:
    text = "preference data as one HTML page to look at"
    view_parser = commands.add_parser("view", help=text, description=text, epilog=VIEW_EXAMPLE)
    view_parser.add_argument("dataset", metavar="DATASET", help="a dataset, a file, or the folder of a run")
    view_parser.add_argument("-o", "--out", metavar="FILE", type=Path, required=True, help="the page to write")
    view_parser.add_argument("--split", default="train", help="split of the dataset (default: train)")
    view_parser.add_argument("--limit", metavar="N", type=int, help="only the first N rows")
    view_parser.add_argument("--media_root", metavar="DIR", help="folder that relative media paths start from")
    view_parser.add_argument("--num_frames", metavar="N", type=int, default=8, help="frames of a clip (default: 8)")
    view_parser.set_defaults(run=view, parser=view_parser)


def _add_import(commands) -> None:
    text = "preference data of another project -> a .jsonl file to train on"
    import_parser = commands.add_parser("import", help=text, description=text, epilog=IMPORT_EXAMPLE)
    import_parser.add_argument("format", metavar="FORMAT", choices=FORMATS, help=f"one of {', '.join(FORMATS)}")
    import_parser.add_argument("source", metavar="IN", type=Path, help="a .json or .jsonl file")
    import_parser.add_argument("target", metavar="OUT", type=Path, help="the .jsonl file to write")
    import_parser.add_argument("--media_root", metavar="DIR", help="folder that relative media paths are joined to")
    import_parser.add_argument(
        "--on_bad", choices=("error", "skip"), default="error",
        help="a bad record stops the import (default), or is left out and listed in OUT.rejected.jsonl",
    )  # fmt: skip
    import_parser.set_defaults(run=import_data, parser=import_parser)


def _add_doctor(commands) -> None:
    text = "check a recipe and its whole dataset before training"
    doctor_parser = commands.add_parser(
        "doctor", help=text, description=text, epilog=DOCTOR_EXAMPLE,
        usage="trl-vpo doctor RECIPE [--method METHOD] [--rows N | --all] [--out FILE] [--gpu_memory GIB]\n"
        "                      [--measure] [--accelerate_config FILE] [--num_processes N] [--any_key value ...]",
    )  # fmt: skip
    doctor_parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a recipe's .yaml file")
    doctor_parser.add_argument(
        "--method", metavar="METHOD", choices=METHODS, help="default: what the recipe's header or path says"
    )
    many = doctor_parser.add_mutually_exclusive_group()
    many.add_argument(
        "--rows", metavar="N", type=int, default=64, help="rows to tokenize (default: 64, spread evenly)"
    )
    many.add_argument("--all", action="store_true", help="tokenize every row")
    doctor_parser.add_argument("--out", metavar="FILE", type=Path, help="write every problem into this .jsonl file")
    machine = doctor_parser.add_argument_group("memory")
    machine.add_argument("--gpu_memory", metavar="GIB", type=float, help="of each GPU (default: of this machine's)")
    machine.add_argument("--measure", action="store_true", help="also train two steps on this machine's GPU")
    # Text only: they go on to `run_doctor` among the recipe's keys.
    doctor_parser.add_argument_group(
        "the processes that memory is estimated for",
        "--accelerate_config FILE  how the weights are sharded, as in `trl-vpo train`\n"
        "--num_processes N         how many GPUs",
    )
    doctor_parser.set_defaults(run=doctor, parser=doctor_parser)


# --- commands -----------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, rest: list[str]) -> int:
    """Train in this process, or in those that accelerate launches."""
    from trl_vpo.training.run import make_parser, run_training

    return _with_recipe("train", args, make_parser, run_training)


def generate(args: argparse.Namespace, rest: list[str]) -> int:
    """Generate in this process, or in those that accelerate launches, and show the run's summary."""
    from trl_vpo.generate.run import make_parser, run_generation

    return _with_recipe("generate", args, make_parser, run_generation)


def _with_recipe(command: str, args: argparse.Namespace, make_parser: Callable, run: Callable) -> int:
    """Run a command whose options are a recipe's keys, or show them."""
    if {"-h", "--help"} & set(args.options):
        make_parser(args.method).print_help()
        return 0
    options, launcher = launch_options(args.options)
    if launcher:
        return launch(launcher, [command, args.method, *options])
    run(args.method, options)
    return 0


def evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    """Measure the base and its adapters, or run benchmarks of lmms-eval."""
    from trl_vpo.evaluate.command import evaluate as run_command

    run_command(args.words[1:])  # argparse would tear unknown options from their values
    return 0


def plot(args: argparse.Namespace, rest: list[str]) -> int:
    """Draw, and say what could not be drawn."""
    from trl_vpo.report.plot.page import plot_runs

    notes = plot_runs(args.runs, args.out, names=args.names)
    print("\n".join([str(args.out), *notes]))
    return 0


def merge(args: argparse.Namespace, rest: list[str]) -> int:
    """Merge, and say what a user should know about the result."""
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
    print(counts)
    return 0


def import_data(args: argparse.Namespace, rest: list[str]) -> int:
    """Convert a file and say what came of it."""
    from trl_vpo.data.importers import convert

    counts = convert(args.format, args.source, args.target, media_root=args.media_root, on_bad=args.on_bad)
    print(f"{args.target}: {counts.written} rows of {counts.read} records.")
    print(f"Media files: {counts.media}, of which {counts.missing_media} are not there.")
    if counts.rejected:
        print(f"Left out: {counts.rejected}; {counts.rejected_path} says why.")
    if counts.ignored_fields:
        print(f"Fields not carried over: {', '.join(counts.ignored_fields)}.")
    return 0


def doctor(args: argparse.Namespace, rest: list[str]) -> int:
    """Check a recipe and its data."""
    from trl_vpo.doctor.checks import run_doctor

    return run_doctor(
        args.recipe, rest, method=args.method, rows=None if args.all else args.rows, out=args.out,
        gpu_memory=args.gpu_memory, measures=args.measure,
    )  # fmt: skip


# --- errors -------------------------------------------------------------------------------------------------------


def _version() -> str:
    import trl_vpo

    return f"trl-vpo {trl_vpo.__version__}"


if __name__ == "__main__":
    sys.exit(main())
