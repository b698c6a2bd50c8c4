"""Attention over a shared layout: a trunk, then branches that see the trunk and themselves but not each other.

The trunk is plain causal attention without a mask, so the flash kernel of SDPA serves it. The branches' rows attend
under a mask of their own; it has a row for each branch token and never one for a trunk token. They do so some hundred
at a time, to the keys up to the last of them: what lies behind is masked for all, and long branches hold much of it.

The function is registered with transformers' `AttentionInterface`, one for each implementation that a model may use.
It recognises a shared layout by its mask, (R, 1, Q, L) with Q < L; every other call goes to the implementation it
stands for, so generation and evaluation run as before.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "trl_vpo_tree_"
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


def use_tree_attention(model: PreTrainedModel) -> None:
    """Let the language model of `model` understand shared layouts; all other calls run as before."""
    config = model.config.get_text_config()
    name = config._attn_implementation
    if name.startswith(PREFIX):
        return
    _register(name)
    config._attn_implementation = PREFIX + name


def _register(name: str) -> None:
    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        if attention_mask is None or attention_mask.dim() != 4 or attention_mask.size(2) == query.size(2):
            plain = ALL_ATTENTION_FUNCTIONS.get_interface(name, _eager(module))
            return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        return tree_attention(query, key, value, attention_mask, scaling, dropout), None

    AttentionInterface.register(PREFIX + name, forward)
    masks = AttentionMaskInterface()
    if name in masks:
        AttentionMaskInterface.register(PREFIX + name, masks[name])


def _eager(module):
    """The eager attention of the module's own file."""
    import importlib

    return importlib.import_module(type(module).__module__).eager_attention_forward


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
