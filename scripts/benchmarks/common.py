"""Timing in turn, memory in a process of its own, tables."""

import json
import resource
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


def in_turn(contestants: dict[str, Callable[[], None]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each contestant, (repeats,), run A B C A B C ... after one uncounted round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def peak_mib(run: Callable[[], None], device: str) -> float:
    """How much `run` adds to what was held before it, at its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    _reset_peak()
    before = status_kib("VmRSS")
    run()
    return (status_kib("VmHWM") - before) / 1024


def _reset_peak() -> None:
    """Linux: forget the process's highest resident size so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError("peak memory on the CPU is read from /proc, which needs Linux.") from error


def status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_of(args: Namespace, contestant: str, **options: object) -> dict:
    """What `measure_memory` of this benchmark gives for one contestant, in a fresh process."""
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), args.name, "--contestant", contestant]
    for name, value in {"device": args.device, "response": args.response, **options}.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(seconds: list[float]) -> dict[str, float]:
    return {"seconds": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds)}


def show(title: str, rows: list[dict], columns: dict[str, str]) -> None:
    """A table; `columns` maps keys of the rows to headings. Floats get three significant digits."""
    table = Table(title=title)
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(_cell(row, key) for key in columns))
    Console(width=160).print(table)


def _cell(row: dict, key: str) -> str:
    value = row.get(key)
    if key == "seconds" and value is not None:
        return f"{value:.3g} ({row['seconds_min']:.3g}-{row['seconds_max']:.3g})"
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
