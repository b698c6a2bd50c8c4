"""The micro-batch that takes the most memory, as the shapes that a step sees."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trl_vpo.doctor.activation_estimate import Call
from trl_vpo.forward.families import stackable, why_separate
from trl_vpo.forward.layouts import Layout, separate, shared
from trl_vpo.forward.tree import Tree, tree_batch


@dataclass
class Load:
    """One micro-batch.

    Attributes:
        calls: its model calls.
        inputs: bytes of the batch; `laid_out`: of the calls' inputs, which are gone before the backward pass.
        patches: of images and frames in each call, before any are merged.
        videos: whether it has any.
    """

    calls: list[Call]
    inputs: int
    laid_out: int = 0
    patches: list[int] = field(default_factory=list)
    videos: bool = False

    def halved(self) -> Load:
        """With media of half as many tokens."""
        calls = [
            replace(
                call,
                length=call.length - call.features // call.rows // 2,
                masked=call.masked - (call.features // call.rows // 2 if call.masked == call.length else 0),
                features=call.features // 2,
            )
            for call in self.calls
        ]
        fewer = [count // 2 for count in self.patches]
        return replace(self, calls=calls, inputs=self.inputs // 2, laid_out=self.laid_out // 2, patches=fewer)


def load_of(
    trees: list[Tree],
    model: nn.Module,
    *,
    layout: str,
    media_tokens: set[int],
    pad_token_id: int,
    compares: bool,
    processes: int = 1,
    pad_to_multiple_of: int | None = None,
    masks: bool = True,
) -> Load:
    """What the trainer would make of some rows.

    Args:
        trees: the rows, as the collator encodes them.
        model: without PEFT and without weights.
        layout: "auto", "shared" or "separate"; "auto" is taken for shared where a model's config allows it.
        media_tokens: ids that stand for vision features.
        pad_token_id, pad_to_multiple_of: as `Scorer` takes them.
        compares: whether the loss has a KL with a gradient at chosen tokens.
        processes: several make one call where one process may make two.
        masks: whether attention takes masks; flash-attention takes lengths instead.
    """
    batch = tree_batch(trees, pad_token_id)
    if processes > 1:
        batch["calls"] = stackable(batch["media"])
    padding = {"pad_token_id": pad_token_id, "pad_to_multiple_of": pad_to_multiple_of}
    if layout != "separate" and why_separate(model) is None:
        layouts = shared(batch, model.base_model, **padding)
    else:
        layouts = separate(batch, **padding)
    wanted = batch["chosen"] if compares else batch["chosen"][:0]
    media = torch.tensor(sorted(media_tokens), dtype=torch.long)
    return Load(
        [_call(made, media, wanted, masks) for made in layouts],
        _bytes(batch),
        sum(_bytes(made.inputs) for made in layouts),
        [patches(made.inputs, model.config) for made in layouts],
        any("pixel_values_videos" in media for media in batch["media"]),
    )


def _call(layout: Layout, media: Tensor, compared: Tensor, masks: bool) -> Call:
    ids, mask = layout.inputs["input_ids"], layout.inputs["attention_mask"]
    masked = mask.size(2) if mask.dim() == 4 else 0 if mask.all() or not masks else ids.size(1)
    return Call(
        rows=ids.size(0),
        length=ids.size(1),
        masked=masked,
        scored=int(layout.mask.sum()),
        compared=int(layout.mask[torch.isin(layout.branches, compared)].sum()),
        features=int(torch.isin(ids, media).sum()),
    )


def patches(inputs: dict[str, Tensor], config: Any) -> int:
    """How many patches the vision tower takes: all pixels by those of a patch, in whatever shape they come."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return 0
    side = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    numbers = 3 * side * side * getattr(vision, "temporal_patch_size", 1)
    return sum(x.numel() for name, x in inputs.items() if name in ("pixel_values", "pixel_values_videos")) // numbers


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))
