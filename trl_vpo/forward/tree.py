"""The tree batch: trunks (prompts with their media) that carry branches (responses).

A collator makes it from rows with [`tree_batch`]; `trl_vpo.forward.layouts` lays it out in the model's input.

    trunk_ids, trunk_mask    (R, P)   prompts, padded on the right
    trunk_types              dict of (R, P): mm_token_type_ids and the like, where the processor gives them
    branch_ids, branch_mask  (S, T)   responses, padded on the right
    branch_trunk             (S,)     the trunk of each branch
    phrase_ids               (S, T)   k on the tokens of phrase k, 0 outside of the phrases that differ (DPA)
    phrase_mask              (S, T)   true on the tokens of any phrase (RRPO)
    chosen, rejected         (B,)     their branches, one pair a row
    weights                  (B,)     of the pairs' losses
    image_branches           (B, N)   the branch of y_w behind each of a row's media, most visible first, -1 where
                                      none is (LPOI, mDPO, SymMPO)
    other_branches           (B, 2)   the branch of y' behind each of them (SymMPO)
    score_margins            (B,)     score of y_w minus that of y_l, where the rows have scores
    ref_sums                 (S,)     precomputed summed log-probs of the reference, where the rows carry them
    media                    R dicts of the tensors that the processor made of a trunk's images and videos
    names                    B strings for messages
    totals                   (2,) pairs and chosen tokens of the whole optimizer step, in training
    padded                   the batch with the padding rows of its rank, see `trl_vpo.forward.ranks`
"""

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor


@dataclass
class Trunk:
    """A prompt: P token ids, token types by name, and media tensors by name."""

    ids: list[int]
    types: dict[str, list[int]] = field(default_factory=dict)
    media: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Branch:
    """A response: T token ids behind trunk number `trunk` of its row; `phrases` has their phrase numbers, or 0.

    `side`: which of the row's responses it is.
    """

    ids: list[int]
    trunk: int = 0
    phrases: list[int] | None = None
    side: str | None = None


@dataclass
class Tree:
    """One row: its trunks, and its branches as chosen, rejected, then the responses behind its other media."""

    name: str
    trunks: list[Trunk]
    branches: list[Branch]
    ref_sums: list[float] | None = None
    weight: float = 1.0
    score_margin: float | None = None


def _pad(rows: list[list[int]], value: int = 0) -> Tensor:
    width = max(len(r) for r in rows)
    return torch.tensor([r + [value] * (width - len(r)) for r in rows])


def _mask(rows: list[list[int]]) -> Tensor:
    return _pad([[1] * len(r) for r in rows]).bool()


def tree_batch(trees: list[Tree], pad_token_id: int) -> dict:
    """Batch rows. The (B,) tensors come first: accelerate and transformers read the batch size off the first one."""
    trunks = [trunk for tree in trees for trunk in tree.trunks]
    branches = [branch for tree in trees for branch in tree.branches]
    *first_trunk, _ = accumulate((len(tree.trunks) for tree in trees), initial=0)
    *first_branch, _ = accumulate((len(tree.branches) for tree in trees), initial=0)
    owner = [t for t, tree in zip(first_trunk, trees) for _ in tree.branches]
    batch = {
        "chosen": torch.tensor(first_branch),
        "rejected": torch.tensor(first_branch) + 1,
        "weights": torch.tensor([tree.weight for tree in trees]),
        "trunk_ids": _pad([t.ids for t in trunks], pad_token_id),
        "trunk_mask": _mask([t.ids for t in trunks]),
        "trunk_types": {
            k: _pad([t.types.get(k, [0] * len(t.ids)) for t in trunks])
            for k in dict.fromkeys(k for t in trunks for k in t.types)
        },
        "branch_ids": _pad([b.ids for b in branches], pad_token_id),
        "branch_mask": _mask([b.ids for b in branches]),
        "branch_trunk": torch.tensor([first + b.trunk for first, b in zip(owner, branches)]),
        "media": [t.media for t in trunks],
        "names": [tree.name for tree in trees],
    }
    if branches[0].phrases is not None:
        batch["phrase_ids"] = _pad([b.phrases for b in branches])
        batch["phrase_mask"] = batch["phrase_ids"].bool()
    if trees[0].score_margin is not None:
        batch["score_margins"] = torch.tensor([tree.score_margin for tree in trees])
    if trees[0].ref_sums is not None:
        batch["ref_sums"] = torch.tensor([value for tree in trees for value in tree.ref_sums])
    for name, side in (("image_branches", "chosen"), ("other_branches", "other_chosen")):
        lists = [[s + i for i, b in enumerate(t.branches) if b.side == side] for s, t in zip(first_branch, trees)]
        if any(len(listed) > 1 for listed in lists):
            batch[name] = _pad(lists, -1)
    return batch
