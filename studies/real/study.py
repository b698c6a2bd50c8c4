"""What the methods do to a real language model: `make study-real`, or `python -m studies.real.study` in .venv-real.

Trains SmolLM2-135M-Instruct on preferences over its own answers, 30 runs, and appends a line to results.jsonl for
each checkpoint. The same command continues after an interruption. At the end it writes RESULTS.md from all lines.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies import interrupt
from studies.results import append_rows, read_rows

HERE = Path(__file__).parent
PAIRS, RESULTS = HERE / "pairs.jsonl", HERE / "results.jsonl"
OUT = Path("outputs/study-real")
WORKERS = 2  # processes of one thread


def main() -> None:
    """Make what is missing, by `WORKERS` processes, and write the report; a worker is told its part."""
    parser = argparse.ArgumentParser(prog="python -m studies.real.study", description=__doc__)
    parser.add_argument("part", nargs="?", type=int, choices=range(WORKERS), help="only for its own workers")
    part = parser.parse_args().part
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from transformers.utils import logging

    from studies.real import model as real_model
    from studies.real import pairs as real_pairs
    from studies.real import report, runs

    torch.set_num_threads(1)  # two spin more than they help
    logging.disable_progress_bar()
    folder = real_model.language_model(OUT / "model")
    if part is not None:
        work(folder, part)
        return
    if not PAIRS.is_file():
        real_pairs.write_pairs(*real_model.load(folder), PAIRS)
    if runs.missing(read_rows(RESULTS)):
        command = [sys.executable, "-m", "studies.real.study"]
        workers = [subprocess.Popen([*command, str(part)]) for part in range(WORKERS)]
        codes = [worker.wait() for worker in workers]
        if any(codes):
            raise SystemExit("A worker failed; its message is above. Give the same command again to continue.")
    print("Report:", report.write_report(read_rows(RESULTS), real_pairs.read_pairs(PAIRS), HERE))


def work(folder: Path, part: int) -> None:
    """Do every `WORKERS`th of the runs that are missing; the first worker also writes the base's line."""
    from studies.real import model as real_model
    from studies.real import pairs as real_pairs
    from studies.real import runs

    results, pairs = read_rows(RESULTS), real_pairs.read_pairs(PAIRS)
    waiting = runs.missing(results)[part::WORKERS]
    model, tokenizer = real_model.load(folder)
    base = runs.measure_base(model, tokenizer, pairs["held-out"])
    if part == 0 and not any(row["method"] == "base" for row in results):
        append_rows(RESULTS, [runs.base_result(model, tokenizer, base)])
    del model
    do_runs(waiting, f"worker {part}, ", RESULTS, lambda cell: runs.run(cell, folder, pairs["train"], base, OUT))


def do_runs(waiting: Sequence[Any], who: str, path: Path, run: Callable[[Any], Iterable[Mapping[str, Any]]]) -> None:
    """Do the runs one by one, and append each result to the file as soon as it is there."""
    for number, cell in enumerate(waiting, 1):
        print(f"{who}{number} of {len(waiting)}: {cell}", flush=True)
        for result in run(cell):
            append_rows(path, [result])
            print(f"  {result['steps']} steps: {result['cpu_seconds']}", flush=True)


if __name__ == "__main__":
    interrupt.run(main)
