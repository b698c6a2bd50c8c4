"""Preference data of the small world: training pairs of each kind, and held-out pairs, with their media on disk.

    near      the rejected response is the chosen one with one fact wrong
    wording   it is that in another wording
    flip20    as near, and 20 % of the pairs have changed places; flip40 likewise
    policy    it is what the base said, sampled, where that is wrong
    scenes    as near, about scenes; all others are about clips
    made, made_again
              the base makes them itself: see `made`

The chosen response is true, in a wording that was drawn, unless the base made it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from studies.testbed import truth
from trl_vpo.testbed import world
from trl_vpo.testbed.rows import write_jsonl, write_rows

FLIPPED = {"flip20": 0.2, "flip40": 0.4}  # those of the smaller share are among those of the larger one
PAIRS = ("near", "wording", *FLIPPED, "policy", "scenes", "made", "made_again")
Sampler = Callable[[Sequence[dict]], list[str]]  # prompts with media, as rows -> a sampled response to each


def training_rows(
    pairs: str, kind: str, count: int, seed: int, folder: Path, sampler: Sampler | None = None, *, boxed: bool = False
) -> Path:
    """Write the rows of a run, unless they are there: without habits, and without combinations that are held out.

    Raises:
        ValueError: a base that says so little that is wrong that there are too few pairs.
    """
    path = folder / f"{'boxed-' if boxed else ''}{pairs}-{kind}-{seed}-{count}.jsonl"
    if path.is_file():
        return path
    drawn = 3 * count if pairs == "policy" else count
    samples = world.draw_samples(kind, drawn, seed, habits=False)
    where = folder / f"{kind}s-{seed}"
    rows = write_rows(samples, seed, where, reworded=pairs == "wording", boxed=boxed, keep=True)
    if pairs == "policy":
        rows = _sampled(rows, samples, count, sampler)
    for number in np.random.default_rng([seed, 21]).permutation(count)[: round(FLIPPED.get(pairs, 0) * count)]:
        rows[number]["chosen"], rows[number]["rejected"] = rows[number]["rejected"], rows[number]["chosen"]
    return write_jsonl(rows, path)


def with_whole_phrases(path: Path) -> Path:
    """Write the rows anew with whole responses as their phrases."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_phrases"] = [[0, len(row[side][0]["content"][0]["text"])]]
    return write_jsonl(rows, path.with_name(f"whole-{path.name}"))


def _sampled(rows: list[dict], samples: Sequence[world.Sample], count: int, sampler: Sampler) -> list[dict]:
    """Return the first `count` rows to which the base responds wrongly, with that response as the rejected one."""
    kept = []
    for start in range(0, len(rows), count):
        batch = rows[start : start + count]
        for row, sample, said in zip(batch, samples[start:], sampler(batch)):
            if not truth.check_caption(said, sample.things).true:
                kept.append(row | {"rejected": _said(said)})
        if len(kept) >= count:
            return kept[:count]
    raise ValueError(f"of {len(rows)} samples the base describes only {len(kept)} wrongly, and {count} are needed.")


def _said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": [_text(text)]}]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
