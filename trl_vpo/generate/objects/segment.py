"""LPOI's image list with the object's own outline instead of a box: a SAM 2 mask, prompted with the box.

Item k hides the part of the mask that lies in what the box's list would hide: the mask disappears from the side of its
box that is nearest to the image's border, and what is around the object stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trl_vpo.errors import GenerateError
from trl_vpo.generate.objects.boxes import Box
from trl_vpo.media.masking import hidden_box, masked_image_list

if TYPE_CHECKING:
    from PIL import Image

KINDS = ("sam2", "sam2_video")  # the published checkpoints are of the second type, and hold the first


class Segmenter:
    """SAM 2 and its processor.

    Args:
        name: a Hub name, such as facebook/sam2.1-hiera-tiny, or a folder.
        revision, device, dtype: as of `detectors.Detector`.

    Raises:
        GenerateError: it cannot be loaded, or is no SAM 2.
    """

    def __init__(self, name: str, *, revision: str = "main", device: str | None = None, dtype: str = "float32"):
        from transformers import AutoConfig, Sam2Model, Sam2Processor

        from trl_vpo.generate.objects.detectors import pick_device
        from trl_vpo.models.load import LOAD_ERRORS, OWN_CODE

        try:
            kind = AutoConfig.from_pretrained(name, revision=revision, **OWN_CODE).model_type
            if kind in KINDS:
                self.processor = Sam2Processor.from_pretrained(name, revision=revision, **OWN_CODE)
                model = Sam2Model.from_pretrained(
                    name, revision=revision, dtype=dtype, use_safetensors=True, **OWN_CODE
                )
        except LOAD_ERRORS as error:
            raise GenerateError(f"the mask model {name} cannot be loaded: {error}") from error
        if kind not in KINDS:
            raise GenerateError(f"the mask model {name} is of type {kind!r}: name a SAM 2.")
        self.model = model.to(pick_device(device)).eval()

    def masks(self, images: Sequence[Image.Image], boxes: Sequence[Box]) -> list[np.ndarray]:
        """The object in each box: (H, W) bool, True only inside of the box; all False where there is none."""
        import torch

        found = []
        for image, box in zip(images, boxes, strict=True):
            inputs = self.processor(images=image, input_boxes=[[list(map(float, box))]], return_tensors="pt")
            sizes = inputs["original_sizes"]
            inputs = inputs.to(self.model.device, self.model.dtype)
            with torch.no_grad():
                outputs = self.model(**inputs, multimask_output=False)
            (mask,) = self.processor.post_process_masks([outputs.pred_masks[0].float().cpu()], sizes)
            inside = np.zeros((image.height, image.width), bool)
            inside[box[1] : box[3], box[0] : box[2]] = True
            found.append(mask.reshape(image.height, image.width).numpy() & inside)
        return found


def mask_box(mask: np.ndarray) -> Box:
    """The smallest box around the True pixels of a mask (H, W) that has some."""
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def masked_by(image: Image.Image, mask: np.ndarray, n: int, *, visual_prompt: bool = True) -> list[Image.Image]:
    """As `trl_vpo.media.masking.masked_image_list` with the mask's box, but only the mask's pixels turn black.

    Args:
        image: RGB.
        mask: (H, W) bool, at least one pixel True.
        n: images, from fully visible to fully masked.
        visual_prompt: draw the same red ellipses.
    """
    from PIL import Image

    box = mask_box(mask)
    plain = masked_image_list(image, box, n, visual_prompt=False)
    drawn = masked_image_list(image, box, n, visual_prompt=visual_prompt)
    items = [plain[0]]
    for k in range(1, n):
        x0, y0, x1, y1 = hidden_box(box, image.size, k, n)
        pixels = np.array(plain[0])
        pixels[y0:y1, x0:x1][mask[y0:y1, x0:x1]] = 0
        ellipse = (np.asarray(drawn[k]) != np.asarray(plain[k])).any(-1)
        pixels[ellipse] = np.asarray(drawn[k])[ellipse]
        items.append(Image.fromarray(pixels))
    return items
