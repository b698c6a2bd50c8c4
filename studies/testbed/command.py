"""`python -m studies.testbed`: the comparison of the methods on the small world.

run [--full | --quick] [--workers N]     make the rows that are missing; the same command continues. --quick makes its
                                         own, in outputs/, and fails if the methods no longer differ as they did
cell --method dpo --pairs near --rate 3e-3 --steps 60 --seed 0
                                         make one row anew, and compare it with the stored one
tables                                   RESULTS.md and its figure, of the rows that there are
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from studies.results import append_rows, read_rows
from studies.testbed import plan
from studies.testbed.pairs import PAIRS

RESULTS, OUT = Path("studies/testbed/results.jsonl"), Path("outputs/testbed")
QUICK = OUT / "quick" / "results.jsonl"
TOLERANCE = 1e-3  # between a row and the same one made anew


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.testbed", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS}; {QUICK} with --quick")
    parser.add_argument("--out", type=Path, default=OUT, help=f"data and runs; default: {OUT}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the rows that are missing")
    run.add_argument("--full", action="store_true", help="also the controls and the other kinds of pairs")
    run.add_argument("--quick", action="store_true", help="one seed, one rate, one checkpoint")
    run.add_argument("--workers", type=int, default=2, help="processes of one thread each; default: 2")
    cell = commands.add_parser("cell", help="make one row anew")
    cell.add_argument("--method", required=True, choices=["base", *plan.ALL])
    cell.add_argument("--pairs", default="near", choices=PAIRS)
    cell.add_argument("--rate", type=float, required=True)
    cell.add_argument("--steps", type=int, required=True)
    cell.add_argument("--seed", type=int, required=True)
    commands.add_parser("tables", help="write RESULTS.md and its figure beside the results")
    args = parser.parse_args(argv)
    args.results = args.results or (QUICK if args.command == "run" and args.quick else RESULTS)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if args.command == "run":
        runs = plan.full_runs() if args.full else plan.quick_runs() if args.quick else plan.main_runs()
        make_rows(runs, args.results, args.out, args.workers)
        write_report(args.results)
        if args.quick:
            check_directions(read_rows(args.results))
    elif args.command == "cell":
        make_cell(plan.Run(args.method, args.pairs, args.rate, args.seed, (args.steps,)), args.results, args.out)
    else:
        write_report(args.results)


def write_report(results: Path) -> None:
    """Write the tables and the figure of all rows beside them.

    Raises:
        SystemExit: there are no rows.
    """
    from studies.testbed import report

    if not (rows := read_rows(results)):
        raise SystemExit(f"{results} has no rows: `python -m studies.testbed run` makes them.")
    print("Report:", report.write_report(rows, results.parent))


def check_directions(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print how the methods differ, at the rate and steps of `plan.quick_runs`.

    Raises:
        SystemExit: one of `plan.DIRECTIONS` does not hold.
    """
    found = {row["method"]: row for row in rows}
    wrong = []
    for measure, less, more in plan.DIRECTIONS:
        low, high = found[less][measure], found[more][measure]
        text = f"{measure}: {low:.3f} ({less}) < {high:.3f} ({more})"
        print(text if low < high else f"does not hold: {text}", flush=True)
        wrong += [text] * (low >= high)
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(plan.DIRECTIONS)} directions do not hold.")


def make_rows(runs: Sequence[plan.Run], results: Path, out: Path, workers: int) -> None:
    """Make the missing rows, so many runs at a time, and append those of a run as soon as it is finished.

    Raises:
        SystemExit: runs failed, after all others.
    """
    waiting, began, failed = plan.missing(runs, read_rows(results)), time.time(), []
    print(f"{len(waiting)} of {len(runs)} runs to do", flush=True)
    with multiprocessing.get_context("spawn").Pool(min(workers, len(waiting)) or 1) as pool:
        for done, rows in enumerate(pool.imap_unordered(partial(_cells, out=out), waiting), start=1):
            if isinstance(rows, str):
                failed.append(rows)
                continue
            append_rows(results, rows)
            spent = (time.time() - began) / 60
            left = spent / done * (len(waiting) - done)
            print(f"{rows[0]['method']} at {rows[0]['rate']:g}, seed {rows[0]['seed']}: "
                  f"{done} of {len(waiting)} runs after {spent:.0f} min, {left:.0f} left", flush=True)  # fmt: skip

    if failed:
        raise SystemExit("\n".join([f"{len(failed)} runs failed:", *failed]))


def _cells(run: plan.Run, out: Path) -> list[dict] | str:
    """Return the rows of a run, or why it failed."""
    from studies.testbed.cells import run_cells

    try:
        return run_cells(run, out)
    except Exception as error:  # one run without pairs, say, must not end the others
        traceback.print_exc()
        return f"{run.method} on {run.pairs} pairs at {run.rate:g}, seed {run.seed}: {error}"


def make_cell(run: plan.Run, results: Path, out: Path) -> None:
    """Print a row anew.

    Raises:
        SystemExit: its numbers are not those of the stored row.
    """
    rows = _cells(run, out)
    if isinstance(rows, str):
        raise SystemExit(rows)
    (row,) = rows
    print(json.dumps({name: value for name, value in row.items() if name != "samples"}))
    stored = [old for old in read_rows(results) if tuple(old[key] for key in plan.KEYS) == run.cells()[0]]
    if not stored:
        print("There is no such row among the stored ones.", file=sys.stderr)
        return
    numbers = [name for name, value in row.items() if isinstance(value, float)]
    off = {name: (row[name], stored[0][name]) for name in numbers if abs(row[name] - stored[0][name]) > TOLERANCE}
    if off:
        raise SystemExit(f"The stored row has other numbers (anew, stored): {off}")
    print(f"All {len(numbers)} numbers are those of the stored row, within {TOLERANCE:g}.", file=sys.stderr)
