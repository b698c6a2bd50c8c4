"""Attention over a packed row: one variable-length call, in which a branch sees its trunk and itself.

The row holds all branches of a micro-batch side by side, without padding (see `trl_vpo.forward.layouts`). `Segments`
says which columns each branch attends to. It travels as one keyword argument of the language model (`SEGMENTS`):
transformers passes it on to every attention function, also when gradient checkpointing runs a layer again. The
attention function that the model uses is wrapped, under its own name, to read it. Every other call goes to that
function unchanged, so that generation, evaluation and towers run on whatever the user named.

    FlashAttention 2, 3, 4    transformers' own variable-length call, where the model asks for it
    CUDA, 16 bits             torch's variable-length FlashAttention (torch >= 2.11)
    all else                  a call of SDPA per branch, the first branch of each trunk without a mask
"""

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from trl_vpo.forward.sequence_parallel import SequenceRanks

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

SEGMENTS = "tree_segments"
QUERIES = 256  # of one SDPA call that needs a mask


@dataclass
class Segments:
    """Who attends to what in a packed row of L columns: S segments of queries, one for each branch.

    The keys of a segment are its prompt and its response, in order, so that its last query meets its last key: causal
    attention, aligned at the bottom right. A sliding window therefore counts the keys of a separate sequence.
    """

    # S tuples (begin, end, prefix_begin, prefix_end) of columns, on the host. A segment's queries are `begin:end`, its
    # keys those of the prefix and the queries' own. The first branch of a trunk takes the trunk along, which lies
    # before it, and has no prefix.
    spans: list[tuple[int, int, int, int]]
    cu_q: Tensor  # (S + 1,) int32, where segments begin among all queries
    cu_k: Tensor  # (S + 1,) int32, where they begin among the keys of all segments
    max_q: int  # the most queries of a segment
    max_k: int  # the most keys of a segment
    ranks: SequenceRanks | None = None  # those that compute the row together; None: this one does alone

    @classmethod
    def of(cls, spans: list[tuple[int, int, int, int]], device: torch.device | str = "cpu") -> "Segments":
        """Return the segments of some spans, which cover the row in order."""
        queries = [end - begin for begin, end, *_ in spans]
        keys = [end - begin + prefix_end - prefix_begin for begin, end, prefix_begin, prefix_end in spans]
        # Two tensors, although they may be equal: torch hands self-attention to cuDNN where they are one.
        cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (queries, keys))
        return cls(spans, cu_q, cu_k, max(queries), max(keys))

    @property
    def length(self) -> int:
        """L, the columns of the row."""
        return self.spans[-1][1]

    def to(self, device: Any, **options: Any) -> "Segments":
        """Move the tensors: accelerate does so with each argument of a layer, in models split over devices."""
        return replace(self, cu_q=self.cu_q.to(device, **options), cu_k=self.cu_k.to(device, **options))

    def keys(self, states: Tensor, dim: int) -> list[list[Tensor]]:
        """Return the keys (or values) of each segment in one or two pieces, out of those of the row.

        Views, whose gradients are added in a fixed order; `index_select` would add 16-bit numbers in any.
        """
        pieces, first = [], states
        for own, span in zip(states.split([end - begin for begin, end, *_ in self.spans], dim), self.spans):
            prefix = span[3] - span[2]
            if prefix:
                pieces.append([first.narrow(dim, 0, prefix), own])
            else:
                pieces.append([own])
                first = own  # a branch with its trunk: those after it begin with the same keys
        return pieces

    def gather(self, states: Tensor, dim: int) -> Tensor:
        """Return the keys (or values) of all segments, one behind the other."""
        return torch.cat([*chain(*self.keys(states, dim))], dim=dim)


class PackedCall:
    """The segments of the call that a language model computes now; None: an ordinary call."""

    def __init__(self):
        self._segments: Segments | None = None

    @contextlib.contextmanager
    def during(self, segments: Segments | None) -> Iterator[None]:
        """Hold the segments while a model is called with them."""
        self._segments = segments
        try:
            yield
        finally:
            self._segments = None

    def hand_on(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Add the segments to a call of the language model. (Given to the whole model, they would reach the tower.)"""
        segments = self._segments
        if segments is None:
            return None
        kwargs = kwargs if segments.ranks is None else segments.ranks.cut(kwargs)
        return args, kwargs | {SEGMENTS: segments}


def use_segments(model: PreTrainedModel) -> None:
    """Let the language model of `model` understand packed rows; all other calls run as before.

    `del ALL_ATTENTION_FUNCTIONS[name]` undoes the wrapping of an attention: the global table is unchanged.
    """
    if not hasattr(model, "_trl_vpo_packed"):
        model._trl_vpo_packed = PackedCall()  # a deep copy of the model, and of its hook, has one of its own
        model.base_model.get_decoder().register_forward_pre_hook(model._trl_vpo_packed.hand_on, with_kwargs=True)
    name = model.config.get_text_config()._attn_implementation
    plain = ALL_ATTENTION_FUNCTIONS.get(name)
    if getattr(plain, "reads_segments", False):
        return
    flash = is_flash_attention_requested(requested_attention_implementation=name)

    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        segments = kwargs.pop(SEGMENTS, None)
        if segments is None:
            return (plain or _eager(type(module)))(module, query, key, value, attention_mask, *args, **kwargs)
        kwargs["sliding_window"] = _window(module, kwargs.get("sliding_window"))

        def attend(*states):
            if flash:
                return _flash(plain, module, *states, segments, **kwargs)[0]
            return segment_attention(module, *states, segments, **kwargs)

        if segments.ranks is not None:
            attend = functools.partial(segments.ranks.attend, attend, segments.length)
        return attend(query, key, value), None

    attention.__dict__ |= vars(plain) if plain else {}  # the marks of other wrappers
    attention.reads_segments = True
    ALL_ATTENTION_FUNCTIONS[name] = attention


@functools.cache
def _eager(kind: type) -> Callable:
    """Return the eager attention of a module's own file: the default that its `forward` names."""
    named = re.search(r"get_interface\([^,]+,\s*(\w+)", inspect.getsource(kind.forward))
    return getattr(sys.modules[kind.__module__], named.group(1) if named else "eager_attention_forward")


def _window(module: nn.Module, given: int | None) -> int | None:
    """Return the sliding window of a layer. Some models (Qwen2-MoE) have it in their masks only."""
    kinds = getattr(module.config, "layer_types", None)
    if given is None and kinds and kinds[module.layer_idx] == "sliding_attention":
        return module.config.sliding_window
    return given


@torch.compiler.disable
def _flash(plain, module, query, key, value, segments: Segments, **kwargs):
    """Call FlashAttention through transformers, with its casts and options."""
    key, value = (segments.gather(states, dim=2) for states in (key, value))
    where = {"cu_seq_lens_q": segments.cu_q, "cu_seq_lens_k": segments.cu_k}
    longest = {"max_length_q": segments.max_q, "max_length_k": segments.max_k}
    return plain(module, query, key, value, None, **kwargs, **where, **longest)


@torch.compiler.disable
def segment_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, L, D)
    key: Tensor,  # (1, G, L, D), H a multiple of G
    value: Tensor,  # (1, G, L, D)
    segments: Segments,
    scaling: float | None = None,  # of the scores; None: 1 / sqrt(D)
    dropout: float = 0.0,
    sliding_window: int | None = None,  # how many keys a query sees, its own one included; None: all before it
    **kwargs: Any,
) -> Tensor:
    """Return the attention of a packed row, (1, L, H, D). `module` tells the dtype of quantized weights."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("capped scores and attention sinks need attn_implementation='flash_attention_2' or later.")
    if varlen_takes(module, query, value, dropout):
        return _varlen(module, query, key, value, segments, scaling, sliding_window)
    return _sdpa(query, key, value, segments, scaling, dropout, sliding_window)


# --- torch's variable-length kernel ---------------------------------------------------------------------------------


def varlen_takes(module: nn.Module, query: Tensor, value: Tensor, dropout: float) -> bool:
    """Tell whether torch's kernel runs here (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp)."""
    if not (query.is_cuda and _varlen_runs_on(query.device.index) and torch.backends.cuda.flash_sdp_enabled()):
        return False
    size = query.size(-1)
    largest = 256 if torch.cuda.get_device_capability(query.device)[1] == 0 else 192  # sm_86, 89: of the backward pass
    sizes_fit = size == value.size(-1) and size % 8 == 0 and size <= largest
    return sizes_fit and not dropout and dtype_of(module, query) in (torch.float16, torch.bfloat16)


@functools.cache
def _varlen_runs_on(device: int) -> bool:
    known = varlen_attn is not None and "window_size" in inspect.signature(varlen_attn).parameters  # torch >= 2.11
    return known and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _grouped_heads() -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch >= 2.12


def dtype_of(module: nn.Module, query: Tensor) -> torch.dtype:
    """Return the dtype to compute in. Rotary embeddings leave queries in float32 under autocast."""
    try:
        return get_target_dtype(query, module) or query.dtype
    except StopIteration:  # it looks for a linear layer, and not every attention has one
        return query.dtype


def _varlen(module, query, key, value, segments: Segments, scaling, window) -> Tensor:
    where = (segments.cu_q, segments.cu_k, segments.max_q, segments.max_k)
    seen = (window - 1 if window else -1, 0)  # keys before and behind the own one; (-1, 0) is causal
    gather = functools.partial(segments.gather, dim=0)
    return varlen(module, query, key, value, *where, gather, scale=scaling, window_size=seen)


def varlen(module, query, key, value, cu_q, cu_k, max_q, max_k, gather: Callable | None = None, **options) -> Tensor:
    """Call torch's kernel with (1, H, L, D) queries and (1, G, L, D) keys and values; returns (1, L, H, D).

    `gather` makes the keys (K, G, D) of all sequences out of those of the row, (L, G, D).
    """
    dtype, groups = dtype_of(module, query), query.size(1) // key.size(1)
    query, key, value = (states.transpose(1, 2)[0].to(dtype) for states in (query, key, value))  # (L, H, D)
    key, value = (gather(states) if gather else states for states in (key, value))
    if groups > 1 and _grouped_heads():
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    return varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, **options).unsqueeze(0)


# --- SDPA -----------------------------------------------------------------------------------------------------------


def _sdpa(query, key, value, segments: Segments, scaling, dropout, window) -> Tensor:
    """Call SDPA per segment: without a mask where it is a whole sequence, else for some queries at a time."""
    attend = functools.partial(F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout)
    groups = query.size(1) // key.size(1)
    if query.is_cpu:  # elsewhere grouped heads under a mask take the slowest kernel
        attend = functools.partial(attend, enable_gqa=groups > 1)
    elif groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    all_queries = query.split([end - begin for begin, end, *_ in segments.spans], dim=2)
    parts = []
    for queries, keys, values in zip(all_queries, segments.keys(key, 2), segments.keys(value, 2)):
        whole = len(keys) == 1 and not (window and queries.size(2) > window)
        keys, values = (torch.cat(x, dim=2) if len(x) > 1 else x[0] for x in (keys, values))
        if whole:
            parts.append(attend(queries, keys, values, is_causal=True))
        else:
            parts += _masked(attend, queries, keys, values, window)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _masked(attend: Callable, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Iterator[Tensor]:
    """Attend under a mask, some queries at a time, to the keys that any of them sees."""
    before = key.size(2) - query.size(2)  # keys of the prompt
    for begin in range(0, query.size(2), QUERIES):
        end = min(begin + QUERIES, query.size(2))
        first, last = max(0, before + begin + 1 - window) if window else 0, before + end
        own = torch.arange(before + begin, last, device=query.device).unsqueeze(1)
        keys = torch.arange(first, last, device=query.device)
        seen = keys <= own
        if window:
            seen &= keys > own - window
        yield attend(query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last], seen)
