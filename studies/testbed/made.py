"""Pairs of clips that the base makes itself, by the pipelines of `trl-vpo generate`, in two rounds.

    made         the base makes pairs of annotated clips: those whose first wording is the chosen one of `near`
    made_again   an adapter, trained on the first round, makes pairs of further clips; those whose rejected response is
                 true by the facts are removed; they train a new adapter

LeanPO's chosen responses are the model's own, made with the annotation as a hint; RRPO's are the annotations. The
rejected ones are what the model says about damaged clips. Both pipelines compare captions by their words, so that a
true caption in another wording passes for a wrong one: the figures say how often.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from studies.testbed import plan, truth
from studies.testbed.training import CAPTION_TOKENS, as_words, train
from trl_vpo.testbed import language, world
from trl_vpo.testbed.rows import write_jsonl, write_rows
from trl_vpo.testbed.tiny_vlm import BASE

ROUNDS = ("made", "made_again")
FIRST_STEPS = plan.STEPS[1]  # of the adapter of the first round
FURTHER = 500  # added to the seed of the first round's clips
OPTIONS = {"leanpo": {"plain_answer": False}, "rrpo": {}}  # the summary's plain answers are not needed


def training_rows(run: plan.Run, out: Path) -> tuple[Path, dict[str, float]]:
    """Return the file of a run's pairs, and the figures of all pairs that were made.

    Raises:
        GenerateError: the pipeline made none.
        ValueError: none is left of the second round.
    """
    again = run.pairs == ROUNDS[1]
    seed = plan.TRAIN_SEED + run.seed + again * FURTHER
    name = f"{run.pairs}-{run.method}-{seed}-{plan.ROWS}" + (f"-{run.rate:g}" if again else "")
    path, samples = out / "data" / f"{name}.jsonl", world.draw_samples("clip", plan.ROWS, seed, habits=False)
    if not path.is_file():
        first = out / "runs" / f"first-{run.method}-{run.rate:g}-{run.seed}"
        adapter = first_adapter(run, first, out) if again else None
        inputs = write_jsonl(annotated(samples, seed, out / "data"), path.with_name(f"inputs-{name}.jsonl"))
        generate(run.method, inputs, path, run.seed, adapter)
        shutil.rmtree(first, ignore_errors=True)
    made = [json.loads(line) for line in path.read_bytes().splitlines()]
    chosen, rejected = (true_responses(made, samples, side) for side in ("chosen", "rejected"))
    figures = {"pairs_made": len(made), "chosen_true": np.mean(chosen), "rejected_true": np.mean(rejected)}
    if again:
        made = [row for row, true in zip(made, rejected) if not true]
        if not made:
            raise ValueError(f"{path}: all {len(rejected)} rejected responses are true, so that no pair is left.")
        path = write_jsonl(made, path.with_name(f"wrong-{name}.jsonl"))
    return path, {name: round(float(value), 5) for name, value in figures.items()}


def first_adapter(run: plan.Run, folder: Path, out: Path) -> Path:
    """Train on the pairs of the first round, and return the adapter that makes those of the second."""
    first = plan.Run(run.method, ROUNDS[0], run.rate, run.seed, (FIRST_STEPS,))
    train(first, training_rows(first, out)[0], folder, out)
    return folder / f"checkpoint-{FIRST_STEPS}"


def annotated(samples: Sequence[world.Sample], seed: int, folder: Path) -> list[dict]:
    """Write the clips and return inputs of `trl-vpo generate`: each clip with its true caption, in the wording drawn.

    The base was taught to take hints for captions only.
    """
    rows = write_rows(samples, seed, folder / f"clips-{seed}", keep=True)
    return [
        {
            "id": row["id"],
            "video": row["videos"][0],
            "question": language.PROMPTS["clip"],
            "answer": row["chosen"][0]["content"][0]["text"],
            "answer_kind": "open",
        }
        for row in rows
    ]


def generate(method: str, inputs: Path, path: Path, seed: int, adapter: Path | None) -> None:
    """Run a method's pipeline and put its rows at `path`."""
    from trl_vpo.generate.run import run_generation

    with TemporaryDirectory(dir=path.parent) as folder:  # two runs may make the same rows at once
        options = {
            "config": f"quickstart/{method}-generate",
            "model_name_or_path": BASE,
            "dataset_name": inputs,
            "output_dir": folder,
            "max_new_tokens": CAPTION_TOKENS,
            "seed": seed,
            **({"from_adapter": adapter} if adapter else {}),
            **OPTIONS[method],
        }
        run_generation(method, as_words(options))
        os.replace(Path(folder) / "rows.jsonl", path)


def true_responses(rows: Sequence[dict], samples: Sequence[world.Sample], side: str) -> list[bool]:
    """Return for each row whether its chosen or rejected response is a true caption. An id ends in a clip's number."""
    found = [(row[side][0]["content"][-1]["text"], samples[int(row["id"].rsplit("-", 1)[1])]) for row in rows]
    return [truth.check_caption(text, sample.things).true for text, sample in found]
