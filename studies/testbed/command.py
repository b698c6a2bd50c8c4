"""`python -m studies.testbed`: the comparison of the methods on the small world.

run [--full | --quick] [--workers N]     make the rows that are missing; the same command continues. --quick makes its
                                         own, in outputs/, every time, and fails if the methods no longer differ as
                                         they did
cell --method dpo --pairs near --rate 3e-3 --steps 60 --seed 0
                                         recompute one row, and compare it with the stored one
tables                                   RESULTS.md and its figure, of the rows that there are
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from studies.results import append_rows, read_rows
from studies.testbed import plan
from studies.testbed.pairs import PAIRS
from trl_vpo.errors import UserError

RESULTS, OUT = Path("studies/testbed/results.jsonl"), Path("outputs/testbed")
QUICK = OUT / "quick" / "results.jsonl"
TOLERANCE = 1e-3  # between a row and the same one recomputed
PORTABLE = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}  # see `cells.arithmetic`
SHOWN = 5  # rows in one message
KINDS = dict.fromkeys(("method", "pairs", "base", "arithmetic"), str) | dict.fromkeys(("samples", "cpu_seconds"), dict)


def main(argv: Sequence[str] | None = None) -> None:
    places = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)  # stand anywhere
    places.add_argument("--results", type=Path, help=f"default: {RESULTS}; {QUICK} with --quick")
    places.add_argument("--out", type=Path, help=f"data and runs; default: {OUT}")
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m studies.testbed", description=description, parents=[places])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the rows that are missing", parents=[places])
    which = run.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="also the controls and the other kinds of pairs")
    which.add_argument("--quick", action="store_true", help="one seed, one rate, one checkpoint")
    run.add_argument("--workers", type=int, default=2, help="processes of one thread each; default: 2")
    cell = commands.add_parser("cell", help="recompute one row", parents=[places])
    cell.add_argument("--method", required=True, choices=["base", *plan.ALL])
    cell.add_argument("--pairs", default="near", choices=PAIRS)
    cell.add_argument("--rate", type=float, required=True)
    cell.add_argument("--steps", type=int, required=True)
    cell.add_argument("--seed", type=int, required=True)
    commands.add_parser("tables", help="write RESULTS.md and its figure beside the results", parents=[places])
    args = argparse.Namespace(results=None, out=OUT)
    parser.parse_args(argv, args)
    args.results = args.results or (QUICK if args.command == "run" and args.quick else RESULTS)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **PORTABLE}
    try:
        if why := wrong_place(args.results, args.out):
            parser.error(why)
        if args.command == "run":
            if args.workers < 1:
                parser.error(f"--workers {args.workers}: give 1 or more.")
            runs = plan.full_runs() if args.full else plan.quick_runs() if args.quick else plan.main_runs()
            make_rows(runs, args.results, args.out, args.workers, anew=args.quick)
            write_report(args.results)
            if args.quick:
                check_directions(stored_rows(args.results))
        elif args.command == "cell":
            cell = plan.Run(args.method, args.pairs, args.rate, args.seed, (args.steps,))
            if why := plan.why_not(cell):
                parser.error(why)
            make_cell(cell, args.results, args.out)
        else:
            write_report(args.results)
    except KeyboardInterrupt:
        print("Stopped. The same command continues.", file=sys.stderr)
        raise SystemExit(130) from None


def wrong_place(results: Path, out: Path) -> str:
    """Return why rows or runs cannot lie where they are meant to; nothing if they can."""
    if results.is_dir():
        return f"--results {results}: a folder. Name the file of the rows, such as results.jsonl."
    if file := next((place for place in (out, *out.parents) if place.is_file()), None):
        return f"--out {out}: {file} is a file. Name a folder; it is created if it does not exist."
    return ""


def stored_rows(results: Path) -> list[dict[str, Any]]:
    """Return the rows of the results.

    Raises:
        SystemExit: rows are of another base or not of the plan, or lack what others have: tables would mix them
            silently.
    """
    from studies.testbed.cells import digest

    rows, columns = read_rows(results), {}
    flat = [row | _of_samples(row.get("samples")) for row in rows]
    longest = max((len(of) for row in flat for of in row.values() if isinstance(of, list)), default=0)
    for row in flat:
        columns.setdefault(row.get("pairs"), {*plan.KEYS, "base"}).update(row)
    wrong = []
    for row in flat:
        if lacking := sorted(columns[row.get("pairs")] - row.keys()):
            why = f"no {', '.join(lacking)}"
        elif strange := plan.not_planned([row[key] for key in plan.KEYS]):
            why = f"not of the plan, {strange}"
        elif odd := [name for name, value in row.items() if not _fits(name, value, longest)]:
            why = f"{odd[0]} is {row[odd[0]]!r}, which no run writes"
        elif row["base"] != (present := digest(plan.kind_of(row["pairs"]))):
            why = f"of the base {row['base']}, and the present one is {present}"
        else:
            continue
        wrong.append(f"\n  - {', '.join(f'{key} {row.get(key)}' for key in plan.KEYS)}: {why}")
    if wrong:
        raise SystemExit(
            f"{results}: {len(wrong)} of {len(rows)} rows cannot be used:{''.join(wrong[:SHOWN])}"
            f"{f'{chr(10)}  ...' * (len(wrong) > SHOWN)}\nDelete these lines, or move the file away: "
            "`python -m studies.testbed run` makes what is missing."
        )
    return rows


def _of_samples(samples: Any) -> dict[str, Any]:
    samples = {"kl": None} | samples if isinstance(samples, dict) else {}
    return {f"samples/{name}": of for name, of in samples.items()}


def _fits(name: str, value: Any, count: int) -> bool:
    """Return whether a run may have written this, such as a finite number for each of `count` samples."""
    if "/" in name:
        return isinstance(value, list) and len(value) == count > 0 and all(_fits("", one, 0) for one in value)
    return isinstance(value, KINDS[name]) if name in KINDS else type(value) in (float, int) and math.isfinite(value)


def write_report(results: Path) -> None:
    """Write the tables and the figure of all rows beside them.

    Raises:
        SystemExit: there are no rows.
    """
    from studies.testbed import report

    if not (rows := stored_rows(results)):
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
        holds = low < high  # not where one is nan
        print(text if holds else f"does not hold: {text}", flush=True)
        wrong += [text] * (not holds)
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(plan.DIRECTIONS)} directions do not hold.")


def make_rows(runs: Sequence[plan.Run], results: Path, out: Path, workers: int, *, anew: bool = False) -> None:
    """Make the missing rows, so many runs at a time, and append those of a run as soon as it is finished.

    Where none is missing, `anew` makes all again.

    Raises:
        SystemExit: runs failed, after all others; or a worker was killed.
    """
    waiting = plan.missing(runs, stored_rows(results)) or (list(runs) if anew else [])
    began, failed = time.time(), []
    print(f"{len(waiting)} of {len(runs)} runs to do", flush=True)
    if not waiting:
        return
    with ProcessPoolExecutor(min(workers, len(waiting)), get_context("spawn"), _leave_interrupts) as pool:
        try:
            for done, future in enumerate(as_completed([pool.submit(_cells, run, out) for run in waiting]), start=1):
                if isinstance(rows := future.result(), str):
                    failed.append(rows)
                    continue
                append_rows(results, rows)
                spent = (time.time() - began) / 60
                left = spent / done * (len(waiting) - done)
                print(f"{rows[0]['method']} at {rows[0]['rate']:g}, seed {rows[0]['seed']}: "
                      f"{done} of {len(waiting)} runs after {spent:.0f} min, {left:.0f} left", flush=True)  # fmt: skip
        except BaseException as error:
            for worker in active_children():  # they would finish their runs, and begin others
                worker.kill()
            if isinstance(error, BrokenProcessPool):
                raise SystemExit(
                    "A worker was killed, perhaps for want of memory. The same command continues; --workers 1 needs "
                    "less."
                ) from None
            raise
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} runs failed:", *failed]))


def _leave_interrupts() -> None:
    """Leave Ctrl-C, which all processes of a terminal get, to the one that started this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cells(run: plan.Run, out: Path) -> list[dict] | str:
    """Return the rows of a run, or why it failed."""
    from studies.testbed.cells import digest, run_cells

    try:
        return run_cells(run, out / digest(run.kind))  # what another base said stays apart
    except Exception as error:  # one run without pairs, say, must not end the others
        if not isinstance(error, (UserError, OSError)):  # whose message says it all
            traceback.print_exc()
        return f"{run.method} on {run.pairs} pairs at {run.rate:g}, seed {run.seed}: {error}"


def make_cell(run: plan.Run, results: Path, out: Path) -> None:
    """Recompute a row and print it.

    Raises:
        SystemExit: its numbers are not those of the stored row.
    """
    stored = [old for old in stored_rows(results) if tuple(old[key] for key in plan.KEYS) == run.cells()[0]]
    rows = _cells(run, out)
    if isinstance(rows, str):
        raise SystemExit(rows)
    (row,) = rows
    print(json.dumps({name: value for name, value in row.items() if name != "samples"}))
    if not stored:
        print("There is no such row among the stored ones.", file=sys.stderr)
        return
    numbers = [name for name, value in row.items() if isinstance(value, float)]
    both = {name: (row[name], stored[0].get(name, math.nan)) for name in numbers}
    if off := {name: sides for name, sides in both.items() if not abs(sides[0] - sides[1]) <= TOLERANCE}:
        raise SystemExit(
            f"The stored row has other numbers (anew, stored): {off}\nArithmetic: anew {row['arithmetic']}, stored "
            f"{stored[0]['arithmetic']}. Unless both are portable, rounding alone may do that at high rates."
        )
    print(f"All {len(numbers)} numbers are those of the stored row, within {TOLERANCE:g}.", file=sys.stderr)
