"""The tree batch: trunks (prompts with their media) that carry branches (responses).

A collator makes it from rows with [`tree_batch`]; it does not say how the branches are laid out in the model's input.
[`separate`] writes every branch out as a sequence of its own behind its own copy of the trunk.

    trunk_ids, trunk_mask    (R, P)   prompts, padded on the right
    trunk_types              dict of (R, P): mm_token_type_ids and the like, where the processor gives them
    branch_ids, branch_mask  (S, T)   responses, padded on the right
    branch_trunk             (S,)     the trunk of each branch
    phrase_mask              (S, T)   tokens of the phrases that differ (RRPO)
    chosen, rejected         (B,)     their branches, one pair a row
    image_branches           (B, N)   the branch of y_w on each image, most visible first, -1 where none is (LPOI)
    media                    R dicts of the tensors that the processor made of a trunk's images and videos
    names                    B strings for messages
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

BATCH_FIRST = ("pixel_attention_mask",)  # its presence says that `pixel_values` has one entry per row (Idefics family)


@dataclass
class Trunk:
    """A prompt: P token ids, token types by name, and media tensors by name."""

    ids: list[int]
    types: dict[str, list[int]] = field(default_factory=dict)
    media: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Branch:
    """A response: T token ids behind trunk number `trunk` of its row; `phrases` marks phrase tokens."""

    ids: list[int]
    trunk: int = 0
    phrases: list[int] | None = None


@dataclass
class Tree:
    """One row: its trunks, and its branches as chosen, rejected, then the chosen response on images 2 to N."""

    name: str
    trunks: list[Trunk]
    branches: list[Branch]


def _pad(rows: list[list[int]], value: int = 0) -> Tensor:
    width = max(len(r) for r in rows)
    return torch.tensor([r + [value] * (width - len(r)) for r in rows])


def _mask(rows: list[list[int]]) -> Tensor:
    return _pad([[1] * len(r) for r in rows]).bool()


def tree_batch(trees: list[Tree], pad_token_id: int) -> dict:
    """Batch rows. The (B,) tensors come first: accelerate and transformers read the batch size off the first one."""
    trunks = [trunk for tree in trees for trunk in tree.trunks]
    branches = [branch for tree in trees for branch in tree.branches]
    first_trunk = _starts(len(tree.trunks) for tree in trees)
    first_branch = _starts(len(tree.branches) for tree in trees)
    owner = [t for t, tree in zip(first_trunk, trees) for _ in tree.branches]
    batch = {
        "chosen": torch.tensor(first_branch),
        "rejected": torch.tensor(first_branch) + 1,
        "trunk_ids": _pad([t.ids for t in trunks], pad_token_id),
        "trunk_mask": _mask([t.ids for t in trunks]),
        "trunk_types": {k: _pad([t.types[k] for t in trunks]) for k in trunks[0].types},
        "branch_ids": _pad([b.ids for b in branches], pad_token_id),
        "branch_mask": _mask([b.ids for b in branches]),
        "branch_trunk": torch.tensor([first + b.trunk for first, b in zip(owner, branches)]),
        "media": [t.media for t in trunks],
        "names": [tree.name for tree in trees],
    }
    if branches[0].phrases is not None:
        batch["phrase_mask"] = _pad([b.phrases for b in branches]).bool()
    if any(len(tree.trunks) > 1 for tree in trees):
        lists = [[s, *range(s + 2, s + len(t.branches))] for s, t in zip(first_branch, trees)]
        batch["image_branches"] = _pad(lists, -1)
    return batch


def _starts(lengths: Iterator[int]) -> list[int]:
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts


# --- layouts ----------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """One model call: its inputs, and where each response token is predicted.

    Attributes:
        inputs: keyword arguments of the model: (S', L) ids and masks, media.
        positions: (S', T) column whose hidden state predicts the token; 0 where `mask` is false.
        mask: (S', T) true on response tokens.
        labels: (S', T) response tokens.
        branches: (S',) the branches of the batch that this call scores.
    """

    inputs: dict
    positions: Tensor
    mask: Tensor
    labels: Tensor
    branches: Tensor


def separate(batch: dict, *, pad_token_id: int, pad_to_multiple_of: int | None = None) -> list[Layout]:
    """Every branch behind its own copy of its trunk: S sequences of prompt and response, padded on the right.

    One model call for the whole batch, or several where its videos cannot be stacked (families that take videos as
    (N, frames, C, H, W) need the same number of frames in a call).
    """
    return [
        _separate(batch, branches, pad_token_id, pad_to_multiple_of)
        for branches in _stackable(batch["media"], batch["branch_trunk"])
    ]


def _stackable(media: list[dict], branch_trunk: Tensor) -> list[Tensor]:
    """Branches grouped by the frame shape of their trunk's videos; trunks without videos go with the first group."""
    shapes: dict = {}
    owners = branch_trunk.tolist()
    for s, t in enumerate(owners):
        video = media[t].get("pixel_values_videos")
        shape = tuple(video.shape[1:]) if video is not None and video.dim() == 5 else None
        shapes.setdefault(shape, []).append(s)
    rest = shapes.pop(None, [])
    groups = list(shapes.values()) or [[]]
    groups[0] = sorted(groups[0] + rest)
    return [torch.tensor(group, device=branch_trunk.device) for group in groups]


def _separate(batch: dict, branches: Tensor, pad_token_id: int, multiple: int | None) -> Layout:
    trunk = batch["branch_trunk"][branches]  # (S',)
    trunk_mask, branch_mask = batch["trunk_mask"][trunk], batch["branch_mask"][branches]
    prompt, response = trunk_mask.sum(-1, keepdim=True), branch_mask.sum(-1, keepdim=True)  # (S', 1)
    length = int((prompt + response).max())
    if multiple:
        length = -(-length // multiple) * multiple
    column = torch.arange(length, device=trunk.device).expand(len(trunk), -1)  # (S', L)
    # Column c reads prompt token c, then response token c - prompt, then padding (the appended last column).
    width = trunk_mask.size(1)
    source = torch.where(column < prompt, column, width + column - prompt)
    source = torch.where(column < prompt + response, source, width + branch_mask.size(1))

    def lay_out(trunk_values: Tensor, branch_values: Tensor, padding: int) -> Tensor:
        fill = torch.full_like(prompt, padding)
        return torch.cat([trunk_values[trunk], branch_values, fill], dim=1).gather(1, source)

    branch_ids = batch["branch_ids"][branches]
    inputs = {
        "input_ids": lay_out(batch["trunk_ids"], branch_ids, pad_token_id),
        "attention_mask": (column < prompt + response).long(),
    }
    zeros = torch.zeros_like(branch_ids)
    for key, types in batch["trunk_types"].items():
        inputs[key] = lay_out(types, zeros, 0)
    inputs |= merge_media([batch["media"][t] for t in trunk.tolist()])
    positions = prompt - 1 + torch.arange(branch_mask.size(1), device=trunk.device)  # (S', T)
    return Layout(
        inputs=inputs,
        positions=positions.masked_fill(~branch_mask, 0),
        mask=branch_mask,
        labels=branch_ids,
        branches=branches,
    )


def merge_media(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Media of several sequences as one set of model inputs, in the order of the sequences.

    Families differ in what the first dimension counts: patches (Qwen), images (LLaVA, InternVL) or rows (Idefics).
    In the first two kinds a sequence without media adds nothing; in the last it adds a row without images. Other
    dimensions are padded with zeros on the right, which every family recognises as "no image here".
    """
    keys = list(dict.fromkeys(key for item in items for key in item))
    batch_first = any(key in BATCH_FIRST for key in keys)
    merged = {}
    for key in keys:
        tensors = [item[key] for item in items if key in item]
        if batch_first:
            empty = tensors[0].new_zeros((1, 0, *tensors[0].shape[2:]))
            tensors = [item.get(key, empty) for item in items]
        merged[key] = _pad_and_cat(tensors)
    return merged


def _pad_and_cat(tensors: list[Tensor]) -> Tensor:
    sizes = [max(dims) for dims in zip(*(t.shape[1:] for t in tensors))]
    if all(list(t.shape[1:]) == sizes for t in tensors):
        return torch.cat(tensors)
    padded = []
    for tensor in tensors:
        room = tensor.new_zeros((tensor.size(0), *sizes))
        room[tuple(slice(0, size) for size in tensor.shape)] = tensor
        padded.append(room)
    return torch.cat(padded)
