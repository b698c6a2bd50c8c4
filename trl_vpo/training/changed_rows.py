"""Rows that were fixed or taken out after a training stopped on them: it continues as far as that changes nothing.

The steps until then stay what they were if their rows are all present, the same, and come in the same order. The order
of an epoch is a shuffle of as many rows as there are. So a shorter dataset keeps the shuffle of the whole one, without
the rows that were removed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

FILE = "rows.npy"  # in a checkpoint: the digests of all rows that the order is of


@dataclass
class Rows:
    """The rows that a run began with."""

    digests: np.ndarray | None  # of each, (rows,) uint64; None for a stream that is not compared by rows
    removed: list[int] = field(default_factory=list)  # positions of those that were taken out when it was continued

    def left(self) -> list[int]:
        """The positions that are still trained on, in the order of the dataset."""
        removed = set(self.removed)
        return [i for i in range(len(self.digests)) if i not in removed]


def compare_rows(saved: Rows, now: np.ndarray, trained: Sequence[int]) -> tuple[Rows, str | None, str | None]:
    """Return (the rows of the rest of a run, what is refused, what has changed).

    `now` are the digests of the dataset as it is, `trained` the positions in `saved` that were trained on.
    """
    left = saved.left()
    if len(now) == len(left):
        changed = [i for i, digest in zip(left, now) if digest != saved.digests[i]]
        digests = saved.digests.copy()
        digests[left] = now
        rows, what = Rows(digests, saved.removed), "changed"
    else:
        changed, rest = [], deque(now)
        for i in left:
            if rest and saved.digests[i] == rest[0]:
                rest.popleft()
            else:
                changed.append(i)
        if rest:
            refused = (
                f"rows: {len(left)} when it was saved, {len(now)} now, and more has changed than that (a split by "
                "test_split_size changes with every row that is taken out: fix the row, or set on_bad_media: skip)"
            )
            return saved, refused, None
        rows, what = Rows(saved.digests, sorted([*saved.removed, *changed])), "taken out"
    if not changed:
        return rows, None, None
    shown = ", ".join(map(str, changed[:5])) + (", ..." if len(changed) > 5 else "")
    text = f"{len(changed)} of {len(left)} rows were {what} (counted from 0: {shown})"
    if bad := set(trained).intersection(changed):
        refused = (
            f"rows: {text}, and {len(bad)} of them were trained on before, for example row {min(bad)}. Only rows of "
            "the first epoch that were not reached yet may change"
        )
        return saved, refused, None
    return rows, None, f"{text}. None of them was trained on yet, and the others keep their order."


def trained_rows(args: Any, rows: Rows, count: int, stream: dict | None = None) -> list[int]:
    """The positions of the rows that a run was on, of which there were `count`; after its first epoch, of all.

    `stream`: of a stream, what its order depends on (see `describe_stream`).
    """
    left = rows.left()
    if stream:
        return left[:count] if stream["workers"] is None else left
    if count >= len(left) or not args.accelerator_config.use_seedable_sampler:
        return left
    if args.train_sampling_strategy == "sequential":
        return left[:count]
    remaining = set(left)
    return [position for position in _shuffle(args, rows) if position in remaining][:count]


def _shuffle(args: Any, rows: Rows) -> SeedableRandomSampler:
    """The sampler that accelerate puts in the place of `Trainer`'s own."""
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
        """Begin an epoch; accelerate calls this."""
        self._all.set_epoch(epoch)
