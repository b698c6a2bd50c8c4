"""Attention over a shared layout: a trunk, then branches that see the trunk and themselves but not each other.

The trunk is plain causal attention without a mask, so the flash kernel of SDPA serves it. The branches' rows attend
under a mask of their own; it has a row for each branch token and never one for a trunk token. They do so some hundred
at a time, to the keys up to the last of them: what lies behind is masked for all, and long branches hold much of it.

The mask of a shared layout travels as a keyword argument of the language model (`TREE`). transformers hands it on to
every attention function, also when gradient checkpointing runs a layer again. The function of the implementation that
the model uses is taught to read it, under its own name. Every other call goes to that function as it was, so that
generation, evaluation and towers run on flash attention, or whatever the user named.
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
    """Attention of a shared layout.

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
    key, value = _repeat(key, groups), _repeat(value, groups)
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


def _repeat(states: Tensor, groups: int) -> Tensor:
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


class TreeMask:
    """The mask of the call that a language model computes now; None: an ordinary call."""

    def __init__(self):
        self._mask: Tensor | None = None

    @contextlib.contextmanager
    def given(self, mask: Tensor | None) -> Iterator[None]:
        """While a model is called with this mask; only that of a shared layout has four dimensions."""
        self._mask = mask if mask is not None and mask.dim() == 4 else None
        try:
            yield
        finally:
            self._mask = None

    def hand_on(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A hook of the language model. (The arguments of the whole model would reach its vision tower, too.)"""
        return None if self._mask is None else (args, kwargs | {TREE: self._mask})


def use_tree_attention(model: PreTrainedModel) -> None:
    """Let the language model of `model` understand shared layouts; all other calls run as before."""
    _teach(model.config.get_text_config()._attn_implementation)
    if not hasattr(model, "_trl_vpo_tree"):
        model._trl_vpo_tree = TreeMask()  # a deep copy of the model, and of its hook, has one of its own
        model.base_model.get_decoder().register_forward_pre_hook(model._trl_vpo_tree.hand_on, with_kwargs=True)


def _teach(name: str) -> None:
    """The global table keeps the plain function: `del ALL_ATTENTION_FUNCTIONS[name]` brings it back."""
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
    """The eager attention of a module's own file: the function that its `forward` names as the default."""
    named = re.search(r"get_interface\([^,]+,\s*(\w+)", inspect.getsource(kind.forward))
    return getattr(sys.modules[kind.__module__], named.group(1) if named else "eager_attention_forward")


def why_not(model: PreTrainedModel) -> str | None:
    """Why a model cannot have the shared layout, as far as its config tells; None if it may."""
    config = model.config.get_text_config()
    if getattr(config, "use_bidirectional_attention", None) or "gemma3" in config.model_type:
        return "its image tokens see each other in both directions"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        return f"its layers are {', '.join(sorted(kinds))}, some of which pass a state along the sequence"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None or "sliding_attention" in kinds:
        return f"its attention has a sliding window ({window} tokens), which would cut branches off their prompt"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention caps its logits, which fused attention kernels do not"
    if not model._supports_attention_backend:
        return "its attention is not taken from transformers' AttentionInterface"
    return None
