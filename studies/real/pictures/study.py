"""What the methods do to a picture model with real weights: the second half of `make study-real`.

Trains 8 runs on pairs of a right and a wrong answer, and appends a line to results.jsonl for each checkpoint. The same
command continues after an interruption. At the end it writes RESULTS.md from all lines.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from studies import interrupt

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
OUT = Path("outputs/study-real")


def main() -> None:
    """Do what is missing, in this process, and write the report."""
    argparse.ArgumentParser(prog="python -m studies.real.pictures.study", description=__doc__).parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from transformers.utils import logging

    from studies.real import model as real_model
    from studies.real.pictures import base, questions, report, runs
    from studies.real.pictures import model as picture_model
    from studies.results import read_rows

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    pairs = runs.pairs(questions.data_folder())
    if runs.missing(read_rows(RESULTS)):
        language = real_model.language_model(OUT / "model")
        work(base.base_model(OUT / "picture-model", language, picture_model.tower_file()), pairs)
    print("Report:", report.write_report(read_rows(RESULTS), pairs, HERE))


def work(folder: Path, pairs: dict[str, list]) -> None:
    """Do the runs that are missing, and the base's line."""
    from studies.real.pictures import model as picture_model
    from studies.real.pictures import runs
    from studies.real.study import do_runs
    from studies.results import append_rows, read_rows

    results = read_rows(RESULTS)
    model, processor = picture_model.load(folder)
    base = runs.measure_base(model, processor, pairs["held-out"])
    if not any(row["method"] == "base" for row in results):
        append_rows(RESULTS, [runs.base_result(model, processor, base)])
    del model
    out = OUT / "pictures"
    do_runs(runs.missing(results), "", RESULTS, lambda cell: runs.run(cell, folder, pairs["train"], base, out))


if __name__ == "__main__":
    interrupt.run(main)
