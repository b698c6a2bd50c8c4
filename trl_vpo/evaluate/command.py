"""`trl-vpo evaluate`: the project's own measures, or with `--benchmark` the tasks of lmms-eval."""

from __future__ import annotations

import argparse

from trl_vpo.errors import RecipeError, as_user_errors

USAGE = """\
trl-vpo evaluate --model BASE --adapters A [B ...] --data FILE
                        --output_dir RUN [--key value ...]"""
EXAMPLE = """\
examples:
  trl-vpo evaluate --model BASE --adapters outputs/rrpo outputs/dpo \\
    --data held_out.jsonl --output_dir outputs/eval
  trl-vpo evaluate --benchmark mvbench,videohallucer --model BASE \\
    --adapters outputs/rrpo --output_dir outputs/bench"""
TASK_OPTIONS = {  # option: its value, and what it is
    "benchmark": ("NAME,NAME", "Measure on tasks of lmms-eval, or videohallucer, not on rows."),
    "include_path": ("DIR", "Folder with further task files for --benchmark."),
}

MODEL_OPTIONS = {  # of benchmarks: how videos are read and the model is loaded
    "num_frames": int, "fps": float, "max_frames": int, "max_pixels": int, "max_new_tokens": int, "seed": int,
    "model_revision": str, "dtype": str, "attn_implementation": str, "device": str,
    "load_in_4bit": bool, "load_in_8bit": bool, "trust_remote_code": bool,
}  # fmt: skip


def evaluate(options: list[str]) -> None:
    """Run what the options ask for; `--help` shows all keys."""
    if {"-h", "--help", "--help-all"} & set(options):
        from trl_vpo.evaluate.config import EvaluateConfig
        from trl_vpo.runs.help import CONFIG, HELP_ALL, LAUNCH, help_page

        tasks = [(f"--{name} {value}", text) for name, (value, text) in TASK_OPTIONS.items()]
        first, everything = (CONFIG, *LAUNCH, *tasks, HELP_ALL), "--help-all" in options
        own = ("measures", EvaluateConfig)
        print(help_page(USAGE, [EvaluateConfig], own, first=first, everything=everything, epilog=EXAMPLE))
        return
    if any(option.split("=")[0] == "--benchmark" for option in options):
        _run_benchmarks(options)
    else:
        from trl_vpo.evaluate.run import run_evaluation

        run_evaluation(options)


def _run_benchmarks(options: list[str]) -> None:
    """Run each benchmark for the base or, where adapters are given, for each of them, in folders by their names."""
    args = _benchmark_parser().parse_args(options)
    names = [name for name in args.benchmark.split(",") if name]
    if not names:
        raise RecipeError("--benchmark names nothing: give the names of tasks, separated by commas.")
    from trl_vpo.models.config import AnsweringConfig

    settings = {name: value for name, value in vars(args).items() if name in MODEL_OPTIONS}
    with as_user_errors(kinds=(ValueError,)):
        AnsweringConfig(batch_size=args.batch_size, limit=args.limit, **settings)  # checks them

    from trl_vpo.evaluate.candidates import candidate_names
    from trl_vpo.evaluate.lmms.run import run_benchmarks

    folders = [args.output_dir]
    if len(args.adapters) > 1:
        folders = [f"{args.output_dir}/{name}" for name in candidate_names(args.adapters)]
    for adapter, folder in zip(args.adapters, folders, strict=True):
        results = run_benchmarks(
            names, model=args.model, adapter=adapter, output_dir=folder, limit=args.limit,
            batch_size=args.batch_size, include_path=args.include_path, **settings,
        )  # fmt: skip
        print(f"{adapter or args.model} -> {folder}")
        for benchmark, tasks in results.items():
            for task, metrics in tasks.items():
                text = ", ".join(f"{metric} {value}" for metric, value in metrics.items())
                print(f"  {benchmark} {task}: {text}")


def _benchmark_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-vpo evaluate --benchmark", allow_abbrev=False)
    for name, (value, text) in TASK_OPTIONS.items():
        parser.add_argument(f"--{name}", metavar=value, help=text)
    parser.add_argument("--model", "--model_name_or_path", required=True, metavar="BASE")
    parser.add_argument("--adapters", nargs="+", default=[None], metavar="A", help="default: the base alone")
    parser.add_argument("--output_dir", required=True, metavar="DIR")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--batch_size", type=int, default=1)
    for name, kind in MODEL_OPTIONS.items():
        parsing = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(f"--{name}", **parsing, default=argparse.SUPPRESS, help="as without --benchmark")
    return parser
