"""The micro-batch that takes the most memory, as the shapes that a step sees."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trl_vpo.doctor.activation_estimate import Call
from trl_vpo.doctor.loaded_recipe import LoadedRecipe
from trl_vpo.forward.families import separate_layout_reason, stackable
from trl_vpo.forward.layouts import Layout, separate, shared
from trl_vpo.forward.tree import Tree, tree_batch


@dataclass
class Workload:
    """One micro-batch.

    Attributes:
        calls: its model calls.
        inputs: bytes of the batch; `laid_out`: of the calls' inputs, which are gone before the backward pass.
        media: inputs of each call, with its pixels and what else the vision tower takes.
    """

    calls: list[Call]
    inputs: int
    laid_out: int = 0
    media: list[dict[str, Tensor]] = field(default_factory=list)

    def halved(self) -> Workload:
        """Return it with half as many tokens of media. `media` itself stays as it is."""
        calls = []
        for call in self.calls:
            less = call.features // call.rows // 2
            masked = call.masked - less if call.masked == call.length else call.masked
            calls.append(replace(call, length=call.length - less, masked=masked, features=call.features // 2))
        return replace(self, calls=calls, inputs=self.inputs // 2, laid_out=self.laid_out // 2)


def workload_of(trees: list[Tree], recipe: LoadedRecipe) -> Workload:
    """Lay encoded rows out as the recipe's trainer would; `layout: auto` is taken for shared where the model may."""
    args, tokenizer = recipe.args, recipe.tokenizer
    batch = tree_batch(trees, tokenizer.pad_token_id)
    if recipe.sharding.processes > 1:  # they make one call where one process may make two
        batch["calls"] = stackable(batch["media"])
    multiple = args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else None
    padding = {"pad_token_id": tokenizer.pad_token_id, "pad_to_multiple_of": multiple}
    if args.layout != "separate" and separate_layout_reason(recipe.base) is None:
        layouts = shared(batch, recipe.base.base_model, **padding)
    else:
        layouts = separate(batch, **padding)
    masks = not str(recipe.model_args.attn_implementation).startswith("flash")  # which takes lengths instead
    compared = batch["chosen"] if recipe.trainer_class.needs_kl else batch["chosen"][:0]
    media_ids = torch.tensor(sorted(recipe.media_tokens), dtype=torch.long)
    inputs = [laid_out.inputs for laid_out in layouts]
    return Workload(
        [_call(laid_out, media_ids, compared, masks) for laid_out in layouts], _bytes(batch), _bytes(inputs), inputs
    )


def _call(layout: Layout, media_ids: Tensor, compared: Tensor, masks: bool) -> Call:
    ids, mask = layout.inputs["input_ids"], layout.inputs["attention_mask"]
    masked = mask.size(2) if mask.dim() == 4 else 0 if mask.all() or not masks else ids.size(1)
    return Call(
        rows=ids.size(0),
        length=ids.size(1),
        masked=masked,
        scored=int(layout.mask.sum()),
        compared=int(layout.mask[torch.isin(layout.branches, compared)].sum()),
        features=int(torch.isin(ids, media_ids).sum()),
    )


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))
