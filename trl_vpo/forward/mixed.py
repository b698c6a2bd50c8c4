"""Images and videos in one call of a model that has one placeholder for both: their features, in the order of prompts.

Such a model scatters the features of images over all placeholders, and those of videos again. Here both are computed
before the call, each trunk's once, and handed over as if they were images.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trl_vpo.forward.families import FEATURE_METHODS, VISION_INPUTS, family_of


@dataclass
class Mixed:
    """Sequences of a call over trunks with images or videos.

    Attributes:
        trunks: for each sequence of the call, the trunk whose media it reads.
        inputs: for each trunk, the vision input that it has; None: none.
        counts: the placeholders of each trunk.
    """

    trunks: list[int]
    inputs: list[str | None]
    counts: list[int]

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
