"""Calls that a model does not take as they are, because their sequences have unlike media.

Mixed    images and videos, where the model has one placeholder for both: it scatters the features of images over all
         placeholders, and those of videos again. Both are computed before the call, each trunk's once, and handed
         over in the order of the prompts, as if they were images.
Split    sequences with unlike numbers of images, which are computed in several calls.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trl_vpo.errors import RowError
from trl_vpo.forward.families import FEATURE_METHODS, VISION_INPUTS, family_of


@dataclass
class Mixed:
    """Sequences of a call over trunks with images or videos."""

    trunks: list[int]  # for each sequence of the call, the trunk whose media it reads
    inputs: list[str | None]  # for each trunk, the vision input that it has; None: none
    counts: list[int]  # the placeholders of each trunk

    def in_order(self, backbone: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call with features in place of pixels."""
        of_trunk: dict[int, Tensor] = {}
        for method, name in zip(FEATURE_METHODS, VISION_INPUTS):
            compute = getattr(backbone, method)
            wanted = {k: v for k, v in kwargs.items() if k in inspect.signature(compute).parameters}
            features = torch.cat([*compute(**wanted, return_dict=True).pooler_output])  # (features of the kind, H)
            owners = [trunk for trunk, own in enumerate(self.inputs) if own == name]
            parts = features.flatten(0, -2).split([self.counts[trunk] for trunk in owners])
            of_trunk |= zip(owners, parts)
        ordered = [of_trunk[trunk] for trunk in self.trunks if trunk in of_trunk]
        outputs = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=ordered)}}
        return {k: v for k, v in kwargs.items() if k not in VISION_INPUTS} | outputs


def mixed_kinds(batch: dict, backbone: nn.Module, trunks: list[int]) -> Mixed | None:
    """Return how images and videos lie in a call of such a model; None: it has one kind, or is another model."""
    inputs = [next((name for name in VISION_INPUTS if name in media), None) for media in batch["media"]]
    if not family_of(backbone).one_token or len({*inputs} - {None}) < 2:
        return None
    counts = ((batch["trunk_ids"] == backbone.config.image_token_id) & batch["trunk_mask"]).sum(-1).tolist()
    return Mixed(trunks, inputs, counts)


@dataclass
class Split:
    """Sequences of a call with unlike numbers of images."""

    images: list[int]  # of each sequence
    inputs: dict[str, int]  # the media inputs, (sequences, images, ...) each, and the dimension of their images

    def in_parts(self, model: nn.Module, compute: Callable[..., Tensor], **kwargs: Any) -> Tensor:
        """Return the (R, L, H) hidden states of a call, computed for sequences with as many images together."""
        if any(
            isinstance(p, DTensor) or hasattr(p, "ds_id") or "Flat" in type(p).__name__ for p in model.parameters()
        ):
            raise RowError(
                f"{type(model).__name__} takes prompts with the same number of images in a call, and under FSDP and "
                f"ZeRO-3 all processes make the same calls; these have {sorted(set(self.images))}. Set "
                "per_device_train_batch_size and per_device_eval_batch_size to 1, or use DDP or ZeRO-2."
            )
        rows, parts = [], []
        for count in sorted(set(self.images)):
            own = [row for row, images in enumerate(self.images) if images == count]
            call = {k: v[own] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            media = {k: call[k].narrow(dim, 0, count) for k, dim in self.inputs.items() if count and k in call}
            parts.append(compute(**{k: v for k, v in call.items() if k not in self.inputs} | media))
            rows += own
        return torch.cat(parts)[torch.tensor(rows).argsort().to(parts[0].device)]


def unlike_images(media: list[dict[str, Tensor]], backbone: nn.Module) -> Split | None:
    """Return how to split a call over such sequences; None: they have as many images, or the model takes them."""
    family = family_of(backbone)
    images = [tensors["pixel_values"].size(1) if "pixel_values" in tensors else 0 for tensors in media]
    if not family.same_images or len(set(images)) == 1:
        return None
    return Split(images, {name: 2 if name in family.masks else 1 for name in family.joins})
