"""Scores of a tree batch as plain numbers, one for each response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_vpo.forward.tree import Tree

if TYPE_CHECKING:
    from trl_vpo.forward.scoring import Scores


@dataclass(frozen=True)
class Scored:
    """A response under one model: its summed log-prob and KL(base || model) in nats, and the tokens summed over."""

    logp: float
    tokens: int
    kl: float = 0.0


def by_tree(scores: Scores, trees: Sequence[Tree]) -> list[list[Scored]]:
    """Return the scores of all branches, tree by tree. Without a reference, the KL is 0."""
    kl = scores.kl.sum(-1).tolist() if scores.kl is not None else [0.0] * len(scores.mask)
    values = zip(scores.sums.tolist(), scores.mask.sum(-1).tolist(), kl, strict=True)
    return [[Scored(*next(values)) for _ in tree.branches] for tree in trees]
