"""Timing in turn, memory in a process of its own, tables."""

import json
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

MIB = 2**20


def in_turn(
    candidates: dict[str, Callable[[], None]],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate, (repeats,), run A B C A B C ... after one uncounted round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, run in candidates.items():
            begin = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(clock() - begin)
    return seconds


def peak_mib(run: Callable[[], None], device: str) -> float:
    """Return how much `run` adds to what was held before it, at its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    try:  # Linux: forget the process's highest resident size so far
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError("peak memory on the CPU is read from /proc, which needs Linux.") from error
    before = status_kib("VmRSS")
    run()
    return (status_kib("VmHWM") - before) / 1024


def status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def memory_of(args: Namespace, candidate: str, **options: object) -> dict:
    """Run `measure_memory` of this benchmark for one candidate, in a fresh process."""
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), args.name, "--candidate", candidate]
    for name, value in {"device": args.device, "response": args.response, **options}.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(seconds: list[float]) -> dict[str, float]:
    return {"seconds": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds)}


def show(title: str, rows: list[dict], columns: dict[str, str]) -> None:
    """Print a table; `columns` maps keys of the rows to headings. Floats get three significant digits."""
    table = Table(title=title)
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(_cell(row, key) for key in columns))
    Console(width=160).print(table)


def _cell(row: dict, key: str) -> str:
    value = row.get(key, "-")
    if key == "seconds" and value != "-":
        return f"{value:.3g} ({row['seconds_min']:.3g}-{row['seconds_max']:.3g})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
