"""Rows encoded with blank media of the right shapes: their lengths, and every refusal, without decoding a video.

How many tokens a prompt has depends on the sizes of its images, and on the sizes, numbers and times of its frames.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import make_batched_metadata

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.rows import Row
from trl_vpo.forward.tree import Tree
from trl_vpo.media.load import Clip

REMEMBERED = 64  # shapes


def blank_image(size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size)


def blank_clip(clip: Clip) -> Clip:
    """Return a clip of the same shape and times that takes no memory."""
    return replace(clip, frames=np.broadcast_to(np.uint8(0), clip.frames.shape))


def blank_encoder(collator: PreferenceCollator) -> Callable[[Row], Tree]:
    """Return `collator.encode_row` for rows whose media are blank: processors work once for each shape."""
    collator, processor = copy.copy(collator), copy.copy(collator.processing_class)
    for name in ("image_processor", "video_processor"):
        inner = getattr(processor, name, None)
        # A video processor with a `preprocess` of its own may choose frames by the metadata.
        plain = name == "image_processor" or getattr(type(inner), "preprocess", 0) is BaseVideoProcessor.preprocess
        if inner is not None and plain:
            setattr(processor, name, _Remembering(inner))
    collator.processing_class = processor
    return collator.encode_row


class _Remembering:
    """An image or video processor that keeps what it gave for a shape, with tensors that take no memory."""

    def __init__(self, inner: Any):
        self._inner, self._known = inner, {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __call__(self, media: Any = None, **kwargs) -> BatchFeature:
        media = kwargs.pop("images", kwargs.pop("videos", media))  # Nemotron-H-Omni's processor names them
        metadata = kwargs.get("video_metadata")
        key = repr([_shape(media), sorted((k, repr(v)) for k, v in kwargs.items() if k != "video_metadata")])
        if key not in self._known:
            output = self._inner(_real(media), **kwargs)
            floats = {k: v for k, v in output.items() if torch.is_tensor(v) and v.is_floating_point()}
            self._known[key] = dict(output) | {k: v.new_zeros(1).expand(v.shape) for k, v in floats.items()}
            if len(self._known) > REMEMBERED:
                del self._known[next(iter(self._known))]
        output = {name: copy.copy(value) for name, value in self._known[key].items()}
        if "video_metadata" in output:
            output["video_metadata"] = make_batched_metadata(media, video_metadata=metadata)
        return BatchFeature(output)


def _shape(media: Any) -> Any:
    if isinstance(media, (list, tuple)):
        return [_shape(item) for item in media]
    return media.size if isinstance(media, Image.Image) else media.shape if hasattr(media, "shape") else repr(media)


def _real(media: Any) -> Any:
    if isinstance(media, (list, tuple)):
        return [_real(item) for item in media]
    return np.ascontiguousarray(media) if isinstance(media, np.ndarray) else media
