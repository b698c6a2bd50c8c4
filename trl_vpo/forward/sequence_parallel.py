"""Sequence parallelism (Ulysses): the ranks of a group compute one packed row together.

Each rank has the same batch. It embeds the whole row, with its media, and keeps a slice of the columns: layers, norms
and MLPs of the language model see L / size columns. Attention needs all columns, but not all heads. So the ranks trade
columns for heads in front of it, and back behind it:

    (H, L / size)  ->  (H / size, L)  ->  attention of the packed row  ->  (H / size, L)  ->  (H, L / size)

Then each rank scores its share of the response tokens, and all get all scores. So the loss is the same on all ranks of
a group, and whatever counts pairs or tokens must not count them once per rank.

Gradients need no factor. Every exchange has its true adjoint, so what the ranks' backward passes give is the gradient
of the sum of their losses, in parts: added up, `size` times that of one loss. DDP, FSDP and DeepSpeed average over all
ranks, which is that sum divided by `size`, and averages over the groups.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

COLUMNS = {"input_ids": 1, "inputs_embeds": 1, "visual_pos_masks": 1, "position_ids": -1}  # argument: its dimension
DEEPSTACK = "deepstack_visual_embeds"  # one state for each true entry of `visual_pos_masks`, for some layers
WHOLE = ("attention_mask",)  # a packed row's is empty


class _Exchange(torch.autograd.Function):
    """Send the first `sent[0]` rows to rank 0, the next to rank 1, ...; get rows in the order of the ranks."""

    @staticmethod
    def forward(ctx, rows, sent, received, group):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, ctx.received, ctx.sent, ctx.group), None, None, None


class SequenceRanks:
    """A group of `size` ranks with the same batches; this one is number `index` of them."""

    def __init__(self, group: Any, size: int, index: int):
        self.group, self.size, self.index = group, size, index

    # --- the language model ---------------------------------------------------------------------------------------

    def cut(self, arguments: dict) -> dict:
        """Return the arguments of a language model with this rank's columns of the row.

        Raises ValueError for an argument that is not known, as neither is how to cut it.
        """
        row = arguments["input_ids"] if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
        begin, end = self._slice(row.size(1))
        kept = {}
        for name, value in arguments.items():
            if name in COLUMNS and value is not None:
                kept[name] = value.narrow(COLUMNS[name], begin, end - begin)
            elif name == DEEPSTACK and value is not None:
                seen = arguments["visual_pos_masks"][0]  # (L,)
                first, count = int(seen[:begin].sum()), int(seen[begin:end].sum())
                kept[name] = [states[first : first + count] for states in value]
            elif name in WHOLE or value is None or isinstance(value, (bool, int, float, str)):
                kept[name] = value
            else:
                raise ValueError(
                    f"sequence parallelism cannot cut the argument {name!r} of this language model. Set sp_size to 1."
                )
        return kept

    @torch.compiler.disable
    def attend(self, attend: Callable[..., Tensor], length: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention, (1, L', H, D), of a packed row of L = `length` columns, of which this rank has L'.

        `query` is (1, H, L', D), `key` and `value` are (1, G, L', D). `attend` computes that of some of the heads:
        (1, h, L, D), (1, g, L, D) twice -> (1, L, h, D).
        """
        copies = math.lcm(key.size(1), self.size) // key.size(1)  # fewer key heads than ranks: some have the same
        if copies > 1:
            key, value = (states.repeat_interleave(copies, dim=1) for states in (key, value))
        shares = self._shares(length)
        own = [shares[self.index]] * self.size
        whole = []
        for states in (query, key, value):
            states = states[0].unflatten(0, (self.size, -1)).transpose(1, 2)  # (size, L', H / size, D)
            states = _Exchange.apply(states.flatten(0, 1), own, shares, self.group)  # (L, H / size, D)
            whole.append(states.transpose(0, 1).unsqueeze(0))
        out = attend(*whole)[0]  # (L, H / size, D)
        out = _Exchange.apply(out, shares, own, self.group)  # (size * L', H / size, D)
        return out.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1, 2).unsqueeze(0)

    # --- scores ---------------------------------------------------------------------------------------------------

    def share(self, tokens: Tensor) -> Tensor:
        """Return this rank's share, (N', ...), of what all ranks have of N response tokens, (N, ...)."""
        return tokens[slice(*self._slice(len(tokens)))]

    def hand_out(self, hidden: Tensor, positions: Tensor, length: int) -> Tensor:
        """Return the states, (N', H), that predict this rank's share of the response tokens.

        `hidden`, (L', H), has the states of this rank's columns of L = `length`; `positions`, (N,), the columns whose
        states predict the tokens, in ascending order.
        """
        device = positions.device
        columns, tokens = (torch.tensor(self._shares(n), device=device).cumsum(0) for n in (length, len(positions)))
        owner = torch.bucketize(positions, columns, right=True)
        taker = torch.bucketize(torch.arange(len(positions), device=device), tokens, right=True)
        counts = torch.bincount(owner * self.size + taker, minlength=self.size**2).view(self.size, self.size).tolist()
        rows = hidden[positions[owner == self.index] - self._slice(length)[0]]
        return _Exchange.apply(rows, counts[self.index], [row[self.index] for row in counts], self.group)

    def collect(self, scores: Tensor, count: int) -> Tensor:
        """Return the scores of all N = `count` tokens, (N, K), from those of this rank's share, (N', K)."""
        copies = scores.repeat(self.size, 1)
        return _Exchange.apply(copies, [len(scores)] * self.size, self._shares(count), self.group)

    def mean(self, gradient: Tensor) -> Tensor:
        """Return the mean of a gradient over the ranks, as their optimizer takes it."""
        dist.all_reduce(gradient, group=self.group)
        return gradient / self.size

    # --- shares ---------------------------------------------------------------------------------------------------

    def _shares(self, count: int) -> list[int]:
        """Return how many of `count` things each rank has."""
        return [count * (i + 1) // self.size - count * i // self.size for i in range(self.size)]

    def _slice(self, count: int) -> tuple[int, int]:
        return count * self.index // self.size, count * (self.index + 1) // self.size


def check_heads(model: PreTrainedModel, size: int) -> None:
    """Raise ValueError for a language model whose attention heads cannot be shared out between `size` ranks."""
    config = model.config.get_text_config()
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if heads % math.lcm(groups or heads, size):
        raise ValueError(
            f"sp_size is {size}, but {type(model).__name__} has {heads} attention heads"
            f"{f' on {groups} key heads' if groups else ''}, which so many processes cannot share. "
            f"Possible: {', '.join(str(n) for n in range(1, heads + 1) if heads % math.lcm(groups or heads, n) == 0)}."
        )
