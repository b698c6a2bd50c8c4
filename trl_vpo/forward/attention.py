"""Attention over a shared layout: a trunk, then branches that see the trunk and themselves but not each other.

The trunk is plain causal attention without a mask, so the flash kernel of SDPA serves it. The branches' rows attend
under a mask of their own; it has a row for each branch token and never one for a trunk token. They do so some hundred
at a time, to the keys up to the last of them: what lies behind is masked for all, and long branches hold much of it.

The mask of a shared layout travels as a keyword argument of the language model (`TREE`). transformers passes it on to
every attention function, also when gradient checkpointing runs a layer again. The attention function that the model
uses is wrapped, under its own name, to read it. Every other call goes to that function unchanged, so that generation,
evaluation and towers run on flash attention, or whatever the user named.
"""

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TREE = "tree_mask"
QUERIES = 256  # branch tokens to one call of SDPA


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Compute the attention of a shared layout.

    Args:
        query: (R, H, L, D).
        key, value: (R, G, L, D), H a multiple of G.
        mask: (R, 1, Q, L) bool, true where a branch token may look. The first L - Q columns are trunk in every row.
        scaling: of the scores; None: 1 / sqrt(D).

    Returns:
        (R, L, H, D).
    """
    groups = query.size(1) // key.size(1)
    trunk = query.size(2) - mask.size(2)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    options = {"scale": scaling, "dropout_p": dropout}
    parts = []
    if trunk:
        prompt = (x[:, :, :trunk] for x in (query, key, value))
        parts = [F.scaled_dot_product_attention(*prompt, is_causal=True, **options)]
    for begin in range(trunk, query.size(2), QUERIES):
        end = min(begin + QUERIES, query.size(2))
        seen = mask[:, :, begin - trunk : end - trunk, :end]
        queries, keys, values = query[:, :, begin:end], key[:, :, :end], value[:, :, :end]
        parts.append(F.scaled_dot_product_attention(queries, keys, values, seen, **options))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


class TreeMask:
    """The mask of the call that a language model computes now; None: an ordinary call."""

    def __init__(self):
        self._mask: Tensor | None = None

    @contextlib.contextmanager
    def during(self, mask: Tensor | None) -> Iterator[None]:
        """Hold the mask while a model is called with it; only that of a shared layout has four dimensions."""
        self._mask = mask if mask is not None and mask.dim() == 4 else None
        try:
            yield
        finally:
            self._mask = None

    def hand_on(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Add the mask to a call of the language model. (Given to the whole model, it would reach the tower.)"""
        return None if self._mask is None else (args, kwargs | {TREE: self._mask})


def use_tree_attention(model: PreTrainedModel) -> None:
    """Let the language model of `model` understand shared layouts; all other calls run as before.

    `del ALL_ATTENTION_FUNCTIONS[name]` undoes the wrapping of an attention: the global table is unchanged.
    """
    if not hasattr(model, "_trl_vpo_tree"):
        model._trl_vpo_tree = TreeMask()  # a deep copy of the model, and of its hook, has one of its own
        model.base_model.get_decoder().register_forward_pre_hook(model._trl_vpo_tree.hand_on, with_kwargs=True)
    name = model.config.get_text_config()._attn_implementation
    plain = ALL_ATTENTION_FUNCTIONS.get(name)
    if getattr(plain, "reads_tree", False):
        return

    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        mask = kwargs.pop(TREE, None)
        if mask is not None:
            return tree_attention(query, key, value, mask, kwargs.get("scaling"), kwargs.get("dropout", 0.0)), None
        return (plain or _eager(type(module)))(module, query, key, value, attention_mask, *args, **kwargs)

    attention.reads_tree = True
    ALL_ATTENTION_FUNCTIONS[name] = attention


@functools.cache
def _eager(kind: type) -> Callable:
    """Return the eager attention of a module's own file: the default that its `forward` names."""
    named = re.search(r"get_interface\([^,]+,\s*(\w+)", inspect.getsource(kind.forward))
    return getattr(sys.modules[kind.__module__], named.group(1) if named else "eager_attention_forward")
