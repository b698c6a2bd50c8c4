"""The layouts of a tree batch in the model's input: the arguments of each call, and where to read its scores.

separate   every branch behind its own copy of its trunk: S sequences
shared     every trunk once, its branches behind it: R sequences, see `trl_vpo.forward.attention`
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trl_vpo.forward.families import merge_media, stackable

CALL_TOKENS = 128  # what one more model call costs, in tokens computed
TRUNK, PADDING = -1, -2  # owners of columns that belong to no branch


@dataclass
class Layout:
    """One model call: its inputs, and where each response token is predicted."""

    inputs: dict  # keyword arguments of the model: (R, L) ids, masks, media
    branches: Tensor  # (S',) the branches of the batch that this call scores
    rows: Tensor  # (S',) row of the call that holds each branch
    positions: Tensor  # (S', T) column whose hidden state predicts each token; 0 where `mask` is false
    mask: Tensor  # (S', T) true on response tokens
    labels: Tensor  # (S', T) response tokens
    tokens: int  # how many the call computes, padding not counted


# --- separate -----------------------------------------------------------------------------------------------------


def separate(batch: dict, *, pad_token_id: int, pad_to_multiple_of: int | None = None) -> list[Layout]:
    """Every branch behind its own copy of its trunk: S sequences of prompt and response, padded on the right.

    One model call for the whole batch, or several: where its videos cannot be stacked, or as the ranks agreed.
    """
    owners, calls = batch["branch_trunk"].tolist(), batch.get("calls") or stackable(batch["media"])
    groups = [[branch for branch, trunk in enumerate(owners) if trunk in call] for call in calls]
    return [_separate(batch, branches, pad_token_id, pad_to_multiple_of) for branches in groups]


def _separate(
    batch: dict,
    branches: list[int],
    pad_token_id: int,
    multiple: int | None = None,
    only: tuple[str, ...] | None = None,
) -> Layout:
    tokens, trunks = _Tokens(batch), batch["branch_trunk"].tolist()
    rows = [torch.cat([tokens.trunk(trunks[s], s), tokens.branch(s, trunks[s])], dim=1) for s in branches]
    source, owner, _ = tokens.pad(rows, multiple)
    inputs = tokens.inputs(source, pad_token_id) | {"attention_mask": (owner != PADDING).long()}
    inputs |= merge_media([batch["media"][trunks[s]] for s in branches], only)
    starts = [tokens.prompts[trunks[s]] - 1 for s in branches]
    return _layout(batch, inputs, owner, branches, list(range(len(branches))), starts)


# --- shared -------------------------------------------------------------------------------------------------------


def shared(
    batch: dict, backbone: nn.Module, *, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> list[Layout]:
    """Every trunk once, its branches behind it: R sequences of a prompt and all its responses.

        trunk without its last token | last token, response 1 | last token, response 2 | ... | padding

    A branch begins with its own copy of the prompt's last token, which predicts its first token. It has the positions
    that it would have alone behind the prompt. The attention mask, (R, 1, Q, L) bool, has rows for the columns after
    the shortest trunk only; `trl_vpo.forward.attention` reads it. M-RoPE models give the positions through the
    `get_rope_index` of `backbone`, the model without its head.
    """
    tokens = _Tokens(batch)
    carried: list[list[int]] = [[] for _ in tokens.prompts]
    for branch, trunk in enumerate(batch["branch_trunk"].tolist()):
        carried[trunk].append(branch)
    lengths = [
        prompt - 1 + sum(tokens.responses[s] + 1 for s in branches)
        for prompt, branches in zip(tokens.prompts, carried)
    ]
    calls = batch.get("calls") or [call for group in stackable(batch["media"]) for call in _calls(group, lengths)]
    return [_shared(batch, backbone, trunks, carried, pad_token_id, pad_to_multiple_of) for trunks in calls]


def _calls(trunks: list[int], lengths: list[int]) -> list[list[int]]:
    """Split trunks into the calls that compute least, padding included.

    A text-only row next to a long video, or LPOI's first image with its two responses next to the others with one,
    would be mostly padding. (Several ranks make as few calls as they can instead: see `trl_vpo.forward.ranks`.)
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


def _shared(batch, backbone, trunks, carried, pad_token_id, multiple) -> Layout:
    tokens = _Tokens(batch)
    branches = [s for t in trunks for s in carried[t]]
    rows, starts = [], []
    for t in trunks:
        parts = [tokens.trunk(t, TRUNK)[:, :-1]]
        for s in carried[t]:
            starts.append(sum(part.size(1) for part in parts))
            parts += [tokens.trunk(t, s)[:, -1:], tokens.branch(s, t)]
        rows.append(torch.cat(parts, dim=1))
    source, owner, place = tokens.pad(rows, multiple)
    inputs = tokens.inputs(source, pad_token_id)
    inputs["attention_mask"] = _tree_mask(owner, min(tokens.prompts[t] for t in trunks) - 1)
    inputs["position_ids"] = _positions(batch, backbone, carried, trunks, owner, place, pad_token_id)
    inputs |= merge_media([batch["media"][t] for t in trunks])
    return _layout(batch, inputs, owner, branches, [r for r, t in enumerate(trunks) for _ in carried[t]], starts)


def _tree_mask(owner: Tensor, trunk: int) -> Tensor:
    """Return (R, 1, L - trunk, L): a column sees its row's trunk and earlier columns of its own branch."""
    column = torch.arange(owner.size(1), device=owner.device)
    causal = column <= column[trunk:].unsqueeze(-1)  # (Q, L)
    seen = (owner.unsqueeze(1) == TRUNK) | (owner.unsqueeze(1) == owner[:, trunk:].unsqueeze(-1))  # (R, Q, L)
    return (seen & causal).unsqueeze(1)


def _positions(batch, backbone, carried, trunks, owner, place, pad_token_id) -> Tensor:
    """Return position ids, (R, L), or (3, R, L) for M-RoPE: as if each branch stood alone behind its prompt."""
    if not hasattr(backbone, "get_rope_index"):
        return place
    branches = [s for t in trunks for s in carried[t]]
    parameters = tuple(inspect.signature(backbone.get_rope_index).parameters)
    alone = _separate(batch, branches, pad_token_id, only=parameters).inputs
    positions, _ = backbone.get_rope_index(**{k: v for k, v in alone.items() if k in parameters})  # (3, S', L')
    # A trunk column reads any of its branches, padding reads column 0 of the first.
    first = torch.tensor([carried[t][0] for t in trunks], device=owner.device).unsqueeze(1)
    index = torch.tensor(branches, device=owner.device)
    sequence = torch.searchsorted(index, torch.where(owner >= 0, owner, first))  # (R, L)
    return positions[:, sequence, place]


# --- both ---------------------------------------------------------------------------------------------------------


class _Tokens:
    """The tokens of a batch as columns of a layout, (3, L) each.

    A column says what it reads (an index into all trunk tokens, all branch tokens, one padding token), which branch it
    belongs to, and its place in a sequence that holds only that branch.
    """

    def __init__(self, batch: dict):
        self._batch = batch
        self.prompts, self.responses = (batch[f"{part}_mask"].sum(-1).tolist() for part in ("trunk", "branch"))

    def trunk(self, trunk: int, owner: int) -> Tensor:
        return self._columns(trunk * self._batch["trunk_ids"].size(1), self.prompts[trunk], owner, 0)

    def branch(self, branch: int, trunk: int) -> Tensor:
        first = self._batch["trunk_ids"].numel() + branch * self._batch["branch_ids"].size(1)
        return self._columns(first, self.responses[branch], branch, self.prompts[trunk])

    def pad(self, rows: list[Tensor], multiple: int | None) -> Tensor:
        """(3, R, L) columns of all rows, on the batch's device."""
        length = max(row.size(1) for row in rows)
        length = -(-length // multiple) * multiple if multiple else length
        padding = self._batch["trunk_ids"].numel() + self._batch["branch_ids"].numel()
        fill = torch.tensor([[padding], [PADDING], [0]])
        padded = [torch.cat([row, fill.expand(3, length - row.size(1))], dim=1) for row in rows]
        return torch.stack(padded, dim=1).to(self._batch["trunk_ids"].device)

    def inputs(self, source: Tensor, pad_token_id: int) -> dict[str, Tensor]:
        """The model's ids and token types, (R, L) each, for what each column reads."""
        batch = self._batch

        def read(trunk_values: Tensor, branch_values: Tensor, padding: int) -> Tensor:
            flat = torch.cat([trunk_values.flatten(), branch_values.flatten(), trunk_values.new_tensor([padding])])
            return flat[source]

        zeros = torch.zeros_like(batch["branch_ids"])
        types = {name: read(values, zeros, 0) for name, values in batch["trunk_types"].items()}
        return {"input_ids": read(batch["trunk_ids"], batch["branch_ids"], pad_token_id), **types}

    @staticmethod
    def _columns(source: int, count: int, owner: int, place: int) -> Tensor:
        steps = torch.arange(count)
        return torch.stack([source + steps, torch.full_like(steps, owner), place + steps])


def _layout(
    batch: dict, inputs: dict, owner: Tensor, branches: list[int], rows: list[int], starts: list[int]
) -> Layout:
    index = torch.tensor(branches, device=owner.device)
    mask = batch["branch_mask"][index]
    begin = torch.tensor(starts, device=owner.device).unsqueeze(1)  # (S', 1)
    return Layout(
        inputs=inputs,
        branches=index,
        rows=torch.tensor(rows, device=owner.device),
        positions=(begin + torch.arange(mask.size(1), device=owner.device)).masked_fill(~mask, 0),
        mask=mask,
        labels=batch["branch_ids"][index],
        tokens=int((owner != PADDING).sum()),
    )
