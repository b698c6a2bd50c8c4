"""The micro-batch that takes the most memory, as the shapes that a step sees."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trl_vpo.doctor.activation_estimate import Call
from trl_vpo.doctor.loaded_recipe import LoadedRecipe
from trl_vpo.forward.families import padded_layout_reason
from trl_vpo.forward.layouts import Layout, packed, padded
from trl_vpo.forward.tree import Tree, tree_batch


@dataclass
class Workload:
    """One micro-batch.

    Attributes:
        call: its model call.
        inputs: bytes of the batch; `laid_out`: of the call's inputs, which are gone before the backward pass.
        media: inputs of the call, with its pixels and what else the vision tower takes.
        layout: the call itself.
    """

    call: Call
    inputs: int
    laid_out: int = 0
    media: dict[str, Tensor] = field(default_factory=dict)
    layout: Layout | None = None

    def halved(self) -> Workload:
        """Return it with half as many tokens of media. `media` itself stays as it is."""
        call = self.call
        less = call.features // max(len(call.trunks) or call.rows, 1) // 2
        halved = replace(
            call,
            length=call.length - less * (len(call.trunks) or 1),
            features=call.features // 2,
            trunks=[(prompt - less, responses) for prompt, responses in call.trunks],
        )
        return replace(self, call=halved, inputs=self.inputs // 2, laid_out=self.laid_out // 2)


def workload_of(trees: list[Tree], recipe: LoadedRecipe) -> Workload:
    """Lay encoded rows out as the recipe's trainer would; rows are taken for packed where the model may."""
    args, tokenizer = recipe.args, recipe.tokenizer
    batch = tree_batch(trees, tokenizer.pad_token_id)
    multiple = args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else None
    if padded_layout_reason(recipe.base) is None:
        layout = packed(batch, recipe.base.base_model, shared=args.layout != "separate")
    else:
        padding = {"pad_token_id": tokenizer.pad_token_id, "pad_to_multiple_of": multiple}
        layout = padded(batch, recipe.base.base_model, **padding)
    masks = not str(recipe.model_args.attn_implementation).startswith("flash")  # which takes lengths instead
    sides = args.kl_sides if recipe.trainer_class.needs_kl else ()
    compared = torch.cat([batch["chosen"][:0], *(batch[side] for side in sides)])
    media_ids = torch.tensor(sorted(recipe.media_tokens), dtype=torch.long)
    call = _call(layout, media_ids, compared, masks)
    held = {id(x) for x in tree_leaves(batch["media"])}  # alone, they are the call's inputs themselves
    own = [x for x in tree_leaves(layout.inputs) if id(x) not in held]
    return Workload(call, _bytes(batch), _bytes(own), layout.inputs, layout)


def _call(layout: Layout, media_ids: Tensor, compared: Tensor, masks: bool) -> Call:
    ids, mask = layout.inputs["input_ids"], layout.inputs["attention_mask"]
    return Call(
        rows=ids.size(0),
        length=ids.size(1),
        masked=layout.segments is None and masks and not bool(mask.all()),
        scored=int(layout.mask.sum()),
        compared=int(layout.mask[torch.isin(layout.branches, compared)].sum()),
        features=int(torch.isin(ids, media_ids).sum()),
        trunks=layout.lengths,
    )


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))
