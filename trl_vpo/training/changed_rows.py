"""Rows that were mended or taken out after a training stopped on them: it goes on as far as that changes nothing.

A bad row ends a training at some step of the first epoch, and the remedy changes the data. The steps until then stay
what they were if the rows of those steps are all there, the same, and still come in the same order. The order of an
epoch is a shuffle of as many rows as there are; so a shorter dataset keeps the shuffle of the whole one, with the
rows that are gone left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

FILE = "rows.npy"  # in a checkpoint: the hashes of all rows that the order is of


@dataclass
class Rows:
    """The rows that a run began with.

    Attributes:
        digests: of each, (rows,) uint64; None for a stream.
        gone: positions of those that were taken out when it was continued.
    """

    digests: np.ndarray | None
    gone: list[int] = field(default_factory=list)

    def left(self) -> list[int]:
        """The positions that are still trained on, in the order of the dataset."""
        gone = set(self.gone)
        return [i for i in range(len(self.digests)) if i not in gone]


def read_rows(checkpoint: Path, gone: Sequence[int]) -> Rows | None:
    """Those of a checkpoint; None where it does not say, as one of an earlier version or of a stream."""
    path = checkpoint / FILE
    return Rows(np.load(path, allow_pickle=False), list(gone)) if path.is_file() else None


def compare_rows(saved: Rows, now: np.ndarray, trained: Sequence[int]) -> tuple[Rows, str | None, str | None]:
    """What the rows of the rest of a run are: (rows, what is refused, what has changed).

    Args:
        saved: of the checkpoint.
        now: the hashes of the dataset as it is.
        trained: positions in `saved` that were trained on.
    """
    left, seen = saved.left(), set(trained)
    if len(now) == len(left):
        changed = [i for i, digest in zip(left, now) if digest != saved.digests[i]]
        digests = saved.digests.copy()
        digests[left] = now
        rows, done = Rows(digests, saved.gone), "changed"
    else:
        changed = _missing(saved.digests, left, now)
        if changed is None:
            return saved, (
                f"rows: {len(left)} when it was saved, {len(now)} now, and more has changed than that (a split by "
                "test_split_size changes with every row that is taken out: mend the row, or set on_bad_media: skip)"
            ), None  # fmt: skip
        rows, done = Rows(saved.digests, sorted([*saved.gone, *changed])), "taken out"
    if not changed:
        return rows, None, None
    shown = ", ".join(map(str, changed[:5])) + (", ..." if len(changed) > 5 else "")
    text = f"{len(changed)} of {len(left)} rows were {done} (counted from 0: {shown})"
    if bad := seen.intersection(changed):
        return saved, (
            f"rows: {text}, and {len(bad)} of them were trained on before, row {min(bad)} for one. Only rows of the "
            "first epoch that were not yet reached may change"
        ), None  # fmt: skip
    return rows, None, f"{text}. None of them was trained on yet, and the others come in the order that they had."


def _missing(digests: np.ndarray, left: list[int], now: np.ndarray) -> list[int] | None:
    """Which of the rows `left` are not in `now`, if nothing else has changed."""
    missing, at = [], 0
    for i in left:
        if at < len(now) and digests[i] == now[at]:
            at += 1
        else:
            missing.append(i)
    return missing if at == len(now) else None


def trained_rows(args: Any, rows: Rows, steps: int) -> list[int]:
    """The positions of the rows that the first steps of a run were on; after its first epoch, of all."""
    count = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    left = set(rows.left())
    if count >= len(left) or not args.accelerator_config.use_seedable_sampler:
        return sorted(left)
    order = range(len(rows.digests)) if args.train_sampling_strategy == "sequential" else _shuffle(args, rows)
    return [position for position in order if position in left][:count]


def _shuffle(args: Any, rows: Rows) -> SeedableRandomSampler:
    """What accelerate puts in the place of `Trainer`'s own sampler."""
    return SeedableRandomSampler(range(len(rows.digests)), data_seed=args.data_seed)


class RemainingRows(Sampler):
    """A dataset in the shuffle of the longer one that it is from."""

    def __init__(self, args: Any, rows: Rows):
        self._all = _shuffle(args, rows)
        self._place = {position: place for place, position in enumerate(rows.left())}

    def __len__(self) -> int:
        return len(self._place)

    def __iter__(self) -> Iterator[int]:
        return (self._place[position] for position in self._all if position in self._place)

    def set_epoch(self, epoch: int) -> None:
        """As accelerate calls it."""
        self._all.set_epoch(epoch)
