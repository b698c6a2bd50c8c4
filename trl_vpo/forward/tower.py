"""Vision towers that attend within windows, frames or images: one call of the attention for all of them.

In every layer, transformers splits queries, keys and values by `cu_seqlens` and calls the attention once for each
part, unless it is FlashAttention: some 4,000 small calls for a pass of Qwen2.5-VL. Here an attention module that does
so is told that everything is one part, and the parts travel as a keyword argument (`PARTS`) to the attention function.
That computes them in one variable-length call on CUDA, and elsewhere in one batched call for each length.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_vpo.forward import attention
from trl_vpo.forward.families import family_of
from trl_vpo.forward.parts import part_of

PARTS = "tower_parts"
ATTENTION = "sdpa"  # eager attention is for looking at the weights, and FlashAttention takes `cu_seqlens` itself
SPLIT = "torch.split(tensor, lengths.tolist(), dim=2)"  # the line of an attention module that this replaces


@dataclass
class Parts:
    """The parts of a sequence of L columns that attend within themselves."""

    # (N + 1,) int32, where they begin and end: the `cu_seqlens` of transformers. Twice, because torch hands attention
    # to cuDNN where queries and keys have one tensor.
    bounds: tuple[Tensor, Tensor]
    longest: int  # the most columns of a part
    runs: list[tuple[int, int]]  # how many parts of how many columns lie side by side once the columns are in `order`
    order: Tensor | None  # (L,) the columns such that parts of one length lie side by side; None: they do


def parts_of(bounds: Tensor) -> Parts:
    """Sort the parts by length, unless that gains nothing."""
    ends = bounds.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    runs = _runs(lengths)
    order = None
    if len(runs) > len(set(lengths)):
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        order = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in by_length]).to(bounds.device)
        runs = _runs(sorted(lengths))
    bounds = bounds.int()
    return Parts((bounds, bounds.clone()), max(lengths), runs, order)


def _runs(lengths: list[int]) -> list[tuple[int, int]]:
    return [(len(list(group)), length) for length, group in itertools.groupby(lengths)]


class PartsOnce:
    """A hook before attention modules that tells them of one part, and their attention function of all."""

    def __init__(self):
        self._seen: list[tuple[Tensor, Parts]] = []  # a tower has one tensor for all layers, or two

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        bounds = kwargs.get("cu_seqlens")
        if bounds is None or len(bounds) < 3 or kwargs.get("attention_mask") is not None:
            return None
        if module.config._attn_implementation != ATTENTION:
            return None
        parts = next((parts for tensor, parts in self._seen if tensor is bounds), None)
        if parts is None:
            parts = parts_of(bounds)
            self._seen = [*self._seen[-3:], (bounds, parts)]
        # On the CPU: the module reads the numbers.
        whole = torch.tensor([0, sum(n * length for n, length in parts.runs)], dtype=torch.int32)
        return args, kwargs | {"cu_seqlens": whole, PARTS: parts}


def use_whole_towers(model: PreTrainedModel) -> None:
    """Let the towers of `model` attend in one call a layer; other calls run as before.

    `del ALL_ATTENTION_FUNCTIONS["sdpa"]` undoes the wrapping of the attention function: the global table is unchanged.
    """
    splitting = [module for module in model.modules() if _splits(type(module))]
    if not splitting or hasattr(model, "_trl_vpo_parts"):
        return
    model._trl_vpo_parts = PartsOnce()
    for module in splitting:
        module.register_forward_pre_hook(model._trl_vpo_parts, with_kwargs=True)
    plain = ALL_ATTENTION_FUNCTIONS[ATTENTION]
    if getattr(plain, "reads_parts", False):
        return

    @functools.wraps(plain)
    def reading(module, query, key, value, attention_mask=None, *args, **kwargs):
        parts = kwargs.pop(PARTS, None)
        if parts is None:
            return plain(module, query, key, value, attention_mask, *args, **kwargs)
        return part_attention(plain, module, query, key, value, parts, **kwargs), None

    reading.reads_parts = True
    ALL_ATTENTION_FUNCTIONS[ATTENTION] = reading


def clear_causal_flags(model: PreTrainedModel) -> None:
    """Let the tower of Phi-4-multimodal attend in both directions in every call, as it was trained.

    transformers marks its attention as causal. SDPA goes by that where a call has no padding to mask, FlashAttention
    always: with SDPA, the features of an image without padding depend on the images beside it.
    """
    if family_of(model).causal_flag:
        for name, module in model.named_modules():
            if part_of(name) == "vision" and hasattr(module, "is_causal"):
                module.is_causal = False


@functools.cache
def _splits(kind: type) -> bool:
    """True for attention modules that call their attention function once for each part."""
    try:
        return SPLIT in inspect.getsource(inspect.unwrap(kind.forward))
    except (OSError, TypeError):  # code without a source file
        return False


@torch.compiler.disable
def part_attention(
    plain: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, parts: Parts, **kwargs: Any
) -> Tensor:
    """Return the attention of all parts, each within itself, (B, L, H, D). `plain` is a function of transformers.

    `query` is (B, H, L, D), `key` and `value` are (B, G, L, D), H a multiple of G.
    """
    if len(query) == 1 and attention.varlen_takes(module, query, value, kwargs.get("dropout", 0.0)):
        where = (*parts.bounds, parts.longest, parts.longest)
        return attention.varlen(module, query, key, value, *where, scale=kwargs.get("scaling"))
    states, outputs, begin = [query, key, value], [], 0
    if parts.order is not None:
        states = [x.index_select(2, parts.order) for x in states]
    for count, length in parts.runs:
        end = begin + count * length
        batch = [x[:, :, begin:end].unflatten(2, (count, length)).transpose(1, 2).flatten(0, 1) for x in states]
        output = plain(module, *batch, None, **kwargs)[0]  # (B * count, length, H, D)
        outputs.append(output.unflatten(0, (-1, count)).flatten(1, 2))
        begin = end
    whole = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    return whole if parts.order is None else whole.index_select(1, parts.order.argsort())
