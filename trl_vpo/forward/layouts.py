"""How the branches of a tree batch are written into the model's input: one call's arguments, and where to read.

separate   every branch behind its own copy of its trunk: S sequences
shared     every trunk once, its branches behind it: R sequences, see `trl_vpo.forward.attention`
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trl_vpo.forward.ranks import stackable

BATCH_FIRST = ("pixel_attention_mask",)  # its presence says that `pixel_values` has one entry per row (Idefics family)
CALL_TOKENS = 128  # what one more model call costs, in tokens computed
TRUNK, PADDING = -1, -2  # owners of columns that belong to no branch


@dataclass
class Layout:
    """One model call: its inputs, and where each response token is predicted.

    Attributes:
        inputs: keyword arguments of the model: (R, L) ids, masks, media.
        branches: (S',) the branches of the batch that this call scores.
        rows: (S',) row of the call that holds each branch.
        positions: (S', T) column whose hidden state predicts each token; 0 where `mask` is false.
        mask: (S', T) true on response tokens.
        labels: (S', T) response tokens.
        tokens: number of tokens that the call computes, padding not counted.
    """

    inputs: dict
    branches: Tensor
    rows: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor
    tokens: int


# --- separate -----------------------------------------------------------------------------------------------------


def separate(batch: dict, *, pad_token_id: int, pad_to_multiple_of: int | None = None) -> list[Layout]:
    """Every branch behind its own copy of its trunk: S sequences of prompt and response, padded on the right.

    One model call for the whole batch, or several where its videos cannot be stacked (families that take videos as
    (N, frames, C, H, W) need the same number of frames in a call), or those that the ranks agreed on.
    """
    owners, calls = batch["branch_trunk"], batch.get("calls") or stackable(batch["media"])
    groups = [torch.isin(owners, torch.tensor(call, device=owners.device)) for call in calls]
    return [_separate(batch, group.nonzero().flatten(), pad_token_id, pad_to_multiple_of) for group in groups]


def _separate(
    batch: dict, branches: Tensor, pad_token_id: int, multiple: int | None = None, only: tuple[str, ...] | None = None
) -> Layout:
    trunk = batch["branch_trunk"][branches]  # (S',)
    trunk_mask, branch_mask = batch["trunk_mask"][trunk], batch["branch_mask"][branches]
    prompt, response = trunk_mask.sum(-1, keepdim=True), branch_mask.sum(-1, keepdim=True)  # (S', 1)
    length = _rounded(int((prompt + response).max()), multiple)
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
    inputs |= merge_media([batch["media"][t] for t in trunk.tolist()], only)
    positions = prompt - 1 + torch.arange(branch_mask.size(1), device=trunk.device)  # (S', T)
    return Layout(
        inputs=inputs,
        branches=branches,
        rows=torch.arange(len(branches), device=trunk.device),
        positions=positions.masked_fill(~branch_mask, 0),
        mask=branch_mask,
        labels=branch_ids,
        tokens=int((prompt + response).sum()),
    )


# --- shared -------------------------------------------------------------------------------------------------------


def shared(
    batch: dict, backbone: nn.Module, *, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> list[Layout]:
    """Every trunk once, its branches behind it: R sequences of a prompt and all its responses.

        trunk without its last token | last token, response 1 | last token, response 2 | ... | padding

    A branch begins with its own copy of the prompt's last token, which predicts its first token. It has the positions
    that it would have alone behind the prompt. The attention mask, (R, 1, Q, L) bool, has rows for the columns after
    the shortest trunk only; `trl_vpo.forward.attention` reads it.

    Args:
        batch: see `trl_vpo.forward.tree`.
        backbone: the model without its head; M-RoPE models give the positions through its `get_rope_index`.
    """
    prompts, responses = (batch[f"{part}_mask"].sum(-1).tolist() for part in ("trunk", "branch"))
    carried: list[list[int]] = [[] for _ in prompts]
    for branch, trunk in enumerate(batch["branch_trunk"].tolist()):
        carried[trunk].append(branch)
    lengths = [prompt - 1 + sum(responses[s] + 1 for s in branches) for prompt, branches in zip(prompts, carried)]
    calls = batch.get("calls") or [call for group in stackable(batch["media"]) for call in _calls(group, lengths)]
    padding = (pad_token_id, pad_to_multiple_of)
    return [_shared(batch, backbone, trunks, carried, prompts, responses, *padding) for trunks in calls]


def _calls(trunks: list[int], lengths: list[int]) -> list[list[int]]:
    """Trunks that go into one call: the split that computes least, padding included.

    A text-only row next to a long video, or LPOI's first image with its two responses next to the others with one,
    would be mostly padding. (Several processes that train make as few calls as they can, and all the same number: see
    `trl_vpo.forward.ranks`.)
    """
    order = sorted(trunks, key=lambda t: -lengths[t])
    best: list[tuple[int, list[list[int]]]] = [(0, [])]  # for the first 0, 1, ... trunks: their cost and groups
    for end in range(1, len(order) + 1):
        options = []
        for begin in range(end):
            cost = best[begin][0] + lengths[order[begin]] * (end - begin) + CALL_TOKENS
            options.append((cost, [*best[begin][1], sorted(order[begin:end])]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def _shared(batch, backbone, trunks, carried, prompts, responses, pad_token_id, multiple) -> Layout:
    branches = [s for t in trunks for s in carried[t]]
    table, starts = _columns(batch, trunks, carried, prompts, responses, multiple)
    source, owner, place = table.to(batch["trunk_ids"].device).unbind(0)  # (R, L) each
    branch_ids = batch["branch_ids"]

    def lay_out(trunk_values: Tensor, branch_values: Tensor, padding: int) -> Tensor:
        flat = torch.cat([trunk_values.flatten(), branch_values.flatten(), trunk_values.new_tensor([padding])])
        return flat[source]

    inputs = {
        "input_ids": lay_out(batch["trunk_ids"], branch_ids, pad_token_id),
        "attention_mask": _tree_mask(owner, min(prompts[t] for t in trunks) - 1),
        "position_ids": _positions(batch, backbone, carried, trunks, owner, place, pad_token_id),
    }
    zeros = torch.zeros_like(branch_ids)
    for key, types in batch["trunk_types"].items():
        inputs[key] = lay_out(types, zeros, 0)
    inputs |= merge_media([batch["media"][t] for t in trunks])
    index = torch.tensor(branches, device=source.device)
    mask = batch["branch_mask"][index]
    begin = torch.tensor(starts, device=source.device).unsqueeze(1)  # (S', 1)
    return Layout(
        inputs=inputs,
        branches=index,
        rows=torch.tensor([r for r, t in enumerate(trunks) for _ in carried[t]], device=source.device),
        positions=(begin + torch.arange(mask.size(1), device=source.device)).masked_fill(~mask, 0),
        mask=mask,
        labels=branch_ids[index],
        tokens=int((owner != PADDING).sum()),
    )


def _columns(batch, trunks, carried, prompts, responses, multiple) -> tuple[Tensor, list[int]]:
    """(3, R, L): what each column reads (an index into all trunk tokens, all branch tokens, one padding token), whose
    it is, and its place in a sequence that holds its branch only. And the first column of each branch."""
    width, depth = batch["trunk_ids"].size(1), batch["branch_ids"].size(1)
    after_trunks, padding = batch["trunk_ids"].numel(), batch["trunk_ids"].numel() + batch["branch_ids"].numel()
    rows, starts = [], []
    for t in trunks:
        last = prompts[t] - 1
        parts, length = [_part(t * width, last, TRUNK, 0)], last
        for s in carried[t]:
            starts.append(length)
            parts += [_part(t * width + last, 1, s, last)]
            parts += [_part(after_trunks + s * depth, responses[s], s, last + 1)]
            length += 1 + responses[s]
        rows.append(torch.cat(parts, dim=1))
    length = _rounded(max(row.size(1) for row in rows), multiple)
    fill = torch.tensor([[padding], [PADDING], [0]])
    return torch.stack([torch.cat([r, fill.expand(3, length - r.size(1))], 1) for r in rows], dim=1), starts


def _rounded(length: int, multiple: int | None) -> int:
    return -(-length // multiple) * multiple if multiple else length


def _part(source: int, count: int, owner: int, place: int) -> Tensor:
    steps = torch.arange(count)
    return torch.stack([source + steps, torch.full_like(steps, owner), place + steps])


def _tree_mask(owner: Tensor, trunk: int) -> Tensor:
    """(R, 1, L - trunk, L): a column sees its row's trunk and earlier columns of its own branch."""
    column = torch.arange(owner.size(1), device=owner.device)
    causal = column <= column[trunk:].unsqueeze(-1)  # (Q, L)
    seen = (owner.unsqueeze(1) == TRUNK) | (owner.unsqueeze(1) == owner[:, trunk:].unsqueeze(-1))  # (R, Q, L)
    return (seen & causal).unsqueeze(1)


def _positions(batch, backbone, carried, trunks, owner, place, pad_token_id) -> Tensor:
    """Position ids, (R, L), or (3, R, L) of an M-RoPE model: as if each branch stood alone behind its prompt."""
    if not hasattr(backbone, "get_rope_index"):
        return place
    branches = torch.tensor([s for t in trunks for s in carried[t]], device=owner.device)
    wanted = tuple(inspect.signature(backbone.get_rope_index).parameters)
    alone = _separate(batch, branches, pad_token_id, only=wanted).inputs
    positions, _ = backbone.get_rope_index(**{k: v for k, v in alone.items() if k in wanted})  # (3, S', L')
    # A trunk column reads any of its branches, padding reads column 0 of the first.
    first = torch.tensor([carried[t][0] for t in trunks], device=owner.device).unsqueeze(1)
    sequence = torch.searchsorted(branches, torch.where(owner >= 0, owner, first))  # (R, L)
    return positions[:, sequence, place]


# --- media --------------------------------------------------------------------------------------------------------


def merge_media(items: list[dict[str, Tensor]], only: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Media of several sequences as one set of model inputs, in the order of the sequences.

    Families differ in what the first dimension counts: patches (Qwen), images (LLaVA, InternVL) or rows (Idefics).
    In the first two kinds a sequence without media adds nothing; in the last it adds a row without images. Other
    dimensions are padded with zeros on the right, which every family recognises as "no image here".

    Args:
        items: the tensors of each sequence by name.
        only: names to keep; None: all.
    """
    keys = list(dict.fromkeys(key for item in items for key in item if only is None or key in only))
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
