"""The layouts of a tree batch in the model's input: the arguments of its one call, and where to read its scores.

packed   one row without padding. Shared, it holds every trunk once, its branches behind it:

             trunk 0 without its last token | last token, response | last token, response | trunk 1 ...

         A branch begins with its own copy of the prompt's last token, which predicts its first token. Separate, every
         branch has a trunk of its own. `trl_vpo.forward.attention` keeps the branches apart.
padded   every branch behind its own copy of its trunk: S rows, padded on the right, for models that cannot be packed
"""

import inspect
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_vpo.forward.attention import Segments
from trl_vpo.forward.families import OTHER_NAMES, family_of, merge_media, placeholders
from trl_vpo.forward.mixed import Mixed, Split, mixed_kinds, unlike_images
from trl_vpo.forward.vision import Copies


@dataclass
class Layout:
    """A model call: its inputs, and where each response token is predicted. S branches of T response tokens."""

    inputs: dict  # keyword arguments of the model: (1, L) or (S, L) ids and types, positions, masks, media
    branches: Tensor  # (S,) the branches of the batch, in the order of the call
    rows: Tensor  # (S,) row of the call that holds each of them
    positions: Tensor  # (S, T) column whose hidden state predicts each token; 0 where `mask` is false
    mask: Tensor  # (S, T) true on response tokens
    labels: Tensor  # (S, T) response tokens
    lengths: list[tuple[int, list[int]]] = field(default_factory=list)  # of a packed row, see [`spans_of`]
    segments: Segments | None = None  # the attention of a packed row
    copies: Copies | Mixed | Split | None = None  # sequences that read the same media, or media of unlike kinds


def packed(batch: dict, backbone: nn.Module, *, shared: bool) -> Layout:
    """One row without padding. `backbone`, the model without its head, gives M-RoPE models their positions.

    A branch has the positions that it would have alone behind its prompt.
    """
    tokens = _Tokens(batch, backbone)
    owners = batch["branch_trunk"].tolist()
    groups = [(trunk, [branch]) for branch, trunk in enumerate(owners)]
    if shared:
        groups = [(t, [s for s, owner in enumerate(owners) if owner == t]) for t in range(len(tokens.prompts))]
    columns = []
    for trunk, branches in groups:
        columns.append(tokens.trunk(trunk)[:, :-1])
        for branch in branches:
            columns += [tokens.trunk(trunk)[:, -1:], tokens.branch(branch, trunk)]
    order = [s for _, branches in groups for s in branches]
    lengths = [(tokens.prompts[t], [tokens.responses[s] for s in branches]) for t, branches in groups]
    spans = spans_of(lengths)
    starts = [end - 1 - tokens.responses[s] for s, (_, end, *_) in zip(order, spans)]
    device = batch["trunk_ids"].device
    source, trunk, place = torch.cat(columns, dim=1).to(device)  # (L,) each
    inputs = tokens.inputs(source.unsqueeze(0))
    inputs["position_ids"] = _positions(batch, backbone, trunk.unsqueeze(0), place.unsqueeze(0))
    # Four dimensions: the model passes it on and builds none. Empty: attention that does not get its segments fails,
    # where a mask that fits, or none, would let branches see each other without a word.
    inputs["attention_mask"] = torch.zeros(1, 1, 0, 0, dtype=torch.bool, device=device)
    media, copies = _media(batch, backbone, [t for t, _ in groups])
    layout = _layout(batch, inputs | media, order, [0] * len(order), starts)
    layout.lengths, layout.segments, layout.copies = lengths, Segments.of(spans, device), copies
    return layout


def spans_of(trunks: list[tuple[int, list[int]]]) -> list[tuple[int, int, int, int]]:
    """Return the spans of `Segments` for trunks of P tokens, each with the lengths of its responses."""
    spans, length = [], 0
    for prompt, responses in trunks:
        begin, length = length, length + prompt - 1
        for i, response in enumerate(responses):
            end = length + 1 + response
            spans.append((length, end, begin, begin + prompt - 1) if i else (begin, end, begin, begin))
            length = end
    return spans


def padded(batch: dict, backbone: nn.Module, *, pad_token_id: int, pad_to_multiple_of: int | None = None) -> Layout:
    """Every branch behind its own copy of its trunk: S rows of prompt and response, padded on the right."""
    tokens, owners = _Tokens(batch, backbone), batch["branch_trunk"].tolist()
    rows = [torch.cat([tokens.trunk(t), tokens.branch(s, t)], dim=1) for s, t in enumerate(owners)]
    length, multiple = max(row.size(1) for row in rows), pad_to_multiple_of or 1
    length = -(-length // multiple) * multiple
    fill = torch.tensor([[tokens.padding], [0], [0]])
    columns = torch.stack([torch.cat([r, fill.expand(3, length - r.size(1))], dim=1) for r in rows], dim=1)
    source, trunk, place = columns.to(batch["trunk_ids"].device)  # (S, L) each
    inputs = tokens.inputs(source, pad_token_id) | {"attention_mask": (source != tokens.padding).long()}
    if hasattr(backbone, "get_rope_index"):  # the model would look for the grids of every row
        inputs["position_ids"] = _positions(batch, backbone, trunk, place)
    media, copies = _media(batch, backbone, owners, length)
    starts = [tokens.prompts[t] - 1 for t in owners]
    branches = list(range(len(owners)))
    layout = _layout(batch, inputs | media, branches, branches, starts)
    layout.copies = copies
    return layout


def _media(
    batch: dict, backbone: nn.Module, trunks: list[int], length: int | None = None
) -> tuple[dict, Copies | Mixed | Split | None]:
    """Return the media of the sequences of a call, which read those of `trunks`: each trunk's once, if it can be."""
    if split := unlike_images([batch["media"][t] for t in trunks], backbone):
        return merge_media([batch["media"][t] for t in trunks], backbone, length=length), split
    if mixed := mixed_kinds(batch, backbone, trunks):
        return merge_media(batch["media"], backbone), mixed
    counts = None if len(set(trunks)) == len(trunks) else placeholders(batch, backbone)
    if counts is None:
        return merge_media([batch["media"][t] for t in trunks], backbone, length=length), None
    return merge_media(batch["media"], backbone), Copies(trunks, counts)


def _positions(batch: dict, backbone: nn.Module, trunk: Tensor, place: Tensor) -> Tensor:
    """Return position ids, (R, L), or (3, R, L) for M-RoPE, of columns at places (R, L) behind the begin of trunks."""
    if not hasattr(backbone, "get_rope_index"):
        return place
    # One token of text behind each prompt stands for its responses, which count on from there. Each trunk in a call of
    # its own: Hunyuan-VL numbers the images of all rows.
    prompts = batch["trunk_mask"].sum(-1)  # (R,)
    tokens = {"input_ids": batch["trunk_ids"], "attention_mask": batch["trunk_mask"].long(), **batch["trunk_types"]}
    wanted = inspect.signature(backbone.get_rope_index).parameters
    tables, width = [], batch["trunk_ids"].size(1)
    for row, (length, media) in enumerate(zip(prompts.tolist(), batch["media"])):
        inputs = {name: F.pad(values[row : row + 1, :length], (0, 1)) for name, values in tokens.items()} | media
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        named = {name: inputs.get(OTHER_NAMES.get(name, name)) for name in wanted}
        positions, _ = backbone.get_rope_index(**{k: v for k, v in named.items() if v is not None})  # (3, 1, P + 1)
        tables.append(F.pad(positions, (0, width - length)))
    table = torch.cat(tables, dim=1)  # (3, R, longest P + 1)
    end = prompts[trunk]
    return table[:, trunk, place.minimum(end)] + (place - end).clamp(min=0)


class _Tokens:
    """The tokens of a batch as columns of a layout, (3, L) each.

    A column says what it reads (an index into all trunk tokens, all branch tokens, one padding token), its trunk, and
    its place behind the begin of that trunk.
    """

    def __init__(self, batch: dict, backbone: nn.Module):
        self._batch = batch
        self._response_types = family_of(backbone).response_types
        self.prompts, self.responses = (batch[f"{part}_mask"].sum(-1).tolist() for part in ("trunk", "branch"))
        self.padding = batch["trunk_ids"].numel() + batch["branch_ids"].numel()

    def trunk(self, trunk: int) -> Tensor:
        return self._columns(trunk * self._batch["trunk_ids"].size(1), self.prompts[trunk], trunk, 0)

    def branch(self, branch: int, trunk: int) -> Tensor:
        first = self._batch["trunk_ids"].numel() + branch * self._batch["branch_ids"].size(1)
        return self._columns(first, self.responses[branch], trunk, self.prompts[trunk])

    def inputs(self, source: Tensor, pad_token_id: int = 0) -> dict[str, Tensor]:
        """The model's ids and token types for what each column reads."""
        batch = self._batch

        def read(trunk_values: Tensor, branch_values: Tensor, padding: int = 0) -> Tensor:
            flat = torch.cat([trunk_values.flatten(), branch_values.flatten(), trunk_values.new_tensor([padding])])
            return flat[source]

        def read_types(name: str, values: Tensor) -> Tensor:
            own = self._response_types.get(name, 0)
            return read(values, torch.full_like(batch["branch_ids"], own), own)

        types = {name: read_types(name, values) for name, values in batch["trunk_types"].items()}
        return {"input_ids": read(batch["trunk_ids"], batch["branch_ids"], pad_token_id), **types}

    @staticmethod
    def _columns(source: int, count: int, trunk: int, place: int) -> Tensor:
        steps = torch.arange(count)
        return torch.stack([source + steps, torch.full_like(steps, trunk), place + steps])


def _layout(batch: dict, inputs: dict, branches: list[int], rows: list[int], starts: list[int]) -> Layout:
    device = batch["branch_ids"].device
    index = torch.tensor(branches, device=device)
    mask = batch["branch_mask"][index]
    begin = torch.tensor(starts, device=device).unsqueeze(1)  # (S, 1)
    return Layout(
        inputs=inputs,
        branches=index,
        rows=torch.tensor(rows, device=device),
        positions=(begin + torch.arange(mask.size(1), device=device)).masked_fill(~mask, 0),
        mask=mask,
        labels=batch["branch_ids"][index],
    )
