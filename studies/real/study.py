"""What the methods do to a real language model: `make study-real`, or `python -m studies.real.study` in .venv-real.

Trains SmolLM2-135M-Instruct on preferences over its own answers, 30 runs, and appends a line to results.jsonl for
each checkpoint. The same command continues after an interruption; RESULTS.md is written anew after every run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAIRS, RESULTS = HERE / "pairs.jsonl", HERE / "results.jsonl"
OUT = Path("outputs/study-real")


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from transformers.utils import logging

    from studies.real import model as real_model
    from studies.real import pairs as real_pairs
    from studies.real import report, runs

    torch.set_num_threads(1)  # two spin more than they help
    logging.disable_progress_bar()
    folder = real_model.language_model(OUT / "model")
    results = read_results(RESULTS)
    waiting = runs.missing(results)
    if waiting or not PAIRS.is_file():
        model, tokenizer = real_model.load(folder)
        pairs = real_pairs.read_pairs(PAIRS if PAIRS.is_file() else real_pairs.write_pairs(model, tokenizer, PAIRS))
        base = runs.measure_base(model, tokenizer, pairs["held-out"])
        if not any(row["method"] == "base" for row in results):
            append(RESULTS, runs.base_result(model, tokenizer, base))
        del model
        for number, cell in enumerate(waiting, 1):
            print(f"{number} of {len(waiting)}: {cell}", flush=True)
            for result in runs.run(cell, folder, pairs["train"], base, OUT):
                append(RESULTS, result)
                print(f"  {result['steps']} steps: {result['cpu_seconds']}", flush=True)
    print("Report:", report.write_report(read_results(RESULTS), real_pairs.read_pairs(PAIRS), HERE))


def read_results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append(path: Path, result: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Stopped. Give the same command again to continue.", file=sys.stderr)
        raise SystemExit(130) from None
