"""The differences between model families: the one place where a new family is made known.

Most of a family needs no entry. Processor, chat template and model class come from transformers; the modules that LoRA
adapts are read off the model (`trl_vpo.models.adapters`), and so is what it does with its logits
(`trl_vpo.forward.head`). What is left is how its media are batched, and whether its attention can share a prompt:

    family                    images (`pixel_values`)       videos
    Qwen2-VL, 2.5-VL, 3-VL    (patches, D)                  `pixel_values_videos` (patches, D)
    LLaVA-1.5, -NeXT-Video,
      -OneVision              (images, ..., C, H, W)        `pixel_values_videos` (N, frames, C, H, W)
    InternVL                  (images, C, H, W)             frames are images
    Idefics2, Idefics3        (rows, images, C, H, W)       none
    SmolVLM                   (rows, images, C, H, W)       frames are images

A new family also gets a tiny model in `tests/kits/families.py`: all tests of families then run on it.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

VISION_INPUTS = {"pixel_values": "image", "pixel_values_videos": "video"}  # each takes one pass of the vision tower
FEATURE_METHODS = ("get_image_features", "get_video_features")  # of a backbone: what its tower and projector give
FLOAT32_PIXELS = ("gemma4_vision", "radio")  # types of towers that compute with pixels before they cast them
ROWS_FIRST = "pixel_attention_mask"  # with this input (Idefics, SmolVLM), the media have one entry per row

# Of whole names of modules and parameters: vision tower and projector; the projector alone.
VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|vision_resampler|connector)\.")
PROJECTOR = re.compile(
    r"(^|\.)(visual\.(merger|deepstack_merger_list)|multi_modal_projector|vision_resampler|connector)\."
)


def part_of(name: str) -> str:
    """Return the part of a model that a module or parameter belongs to: "vision", "projector" or "language"."""
    return "projector" if PROJECTOR.search(name) else "vision" if VISION.search(name) else "language"


def vision_inputs(media: list[dict[str, Tensor]]) -> list[str]:
    """Return which inputs of the vision tower the media of some trunks make."""
    return [name for name in VISION_INPUTS if any(name in tensors for tensors in media)]


def stackable(media: list[dict[str, Tensor]]) -> list[list[int]]:
    """Group trunks whose media fit into one model call; trunks without videos go with the first group.

    Families that take videos as (N, frames, C, H, W) need them in one shape.
    """
    shapes: dict[tuple | None, list[int]] = {}
    for trunk, tensors in enumerate(media):
        video = tensors.get("pixel_values_videos")
        shape = tuple(video.shape[1:]) if video is not None and video.dim() == 5 else None
        shapes.setdefault(shape, []).append(trunk)
    rest = shapes.pop(None, [])
    groups = list(shapes.values()) or [[]]
    groups[0] = sorted(groups[0] + rest)
    return groups


def merge_media(items: list[dict[str, Tensor]], only: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Merge the media of several sequences into one set of model inputs, in the order of the sequences.

    Where the first dimension counts patches or images, a sequence without media adds nothing; where it counts rows, it
    adds a row without images. Other dimensions are padded with zeros on the right, which every family takes for "no
    image here". `only` names the tensors to keep; None: all.
    """
    names = list(dict.fromkeys(name for item in items for name in item if only is None or name in only))
    merged = {}
    for name in names:
        tensors = [item[name] for item in items if name in item]
        if ROWS_FIRST in names:
            empty = tensors[0].new_zeros((1, 0, *tensors[0].shape[2:]))
            tensors = [item.get(name, empty) for item in items]
        sizes = [max(dims) for dims in zip(*(t.shape[:0:-1] for t in tensors))]  # last dimension first, as in F.pad
        missing = [[n for size, own in zip(sizes, t.shape[:0:-1]) for n in (0, size - own)] for t in tensors]
        padded = [F.pad(t, pads) if any(pads) else t for t, pads in zip(tensors, missing)]
        merged[name] = torch.cat(padded) if len(padded) > 1 else padded[0]  # one alone is not copied
    return merged


def separate_layout_reason(model: PreTrainedModel) -> str | None:
    """Return why a model cannot have the shared layout, as far as its config tells; None if it may."""
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
