"""LPOI's image list with the object's own outline instead of a box: a SAM 2 mask, prompted with the box.

Item k hides the part of the mask that lies in what the box's list would hide: the mask disappears from the side of its
box that is nearest to the image's border, and everything around the object stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from trl_vpo.generate.objects.boxes import Box
from trl_vpo.generate.objects.detectors import load_model
from trl_vpo.media.masking import masked_image_list

KINDS = ("sam2", "sam2_video")  # the published checkpoints are of the second type, and hold the first


class Segmenter:
    """SAM 2, such as facebook/sam2.1-hiera-tiny; options and errors are those of `load_model`."""

    def __init__(self, name: str, **options: Any):
        loaded = load_model(name, "Sam2Processor", "Sam2Model", KINDS, "mask model", **options)
        _, self.processor, self.model = loaded

    def masks(self, images: Sequence[Image.Image], boxes: Sequence[Box]) -> list[np.ndarray]:
        """Return the object in each box: (H, W) bool, True only inside of the box; all False if there is none."""
        import torch

        masks = []
        for image, box in zip(images, boxes, strict=True):
            inputs = self.processor(images=image, input_boxes=[[list(map(float, box))]], return_tensors="pt")
            sizes = inputs["original_sizes"]
            inputs = inputs.to(self.model.device, self.model.dtype)
            with torch.no_grad():
                outputs = self.model(**inputs, multimask_output=False)
            (mask,) = self.processor.post_process_masks([outputs.pred_masks[0].float().cpu()], sizes)
            inside = np.zeros((image.height, image.width), bool)
            inside[box[1] : box[3], box[0] : box[2]] = True
            masks.append(mask.reshape(image.height, image.width).numpy() & inside)
        return masks


def masked_by(image: Image.Image, mask: np.ndarray, n: int, *, visual_prompt: bool = True) -> list[Image.Image]:
    """Return the image list of a mask's box, in which only the mask's pixels turn black. At least one is True."""
    ys, xs = np.nonzero(mask)
    box = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    return masked_image_list(image, box, n, visual_prompt=visual_prompt, mask=mask)
