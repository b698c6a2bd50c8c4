"""The differences between model families: the one place where a new family is made known.

Most of a family needs no entry. Processor, chat template and model class come from transformers; the modules that LoRA
adapts are read off the model (`trl_vpo.models.adapters`), and so is what it does with its logits
(`trl_vpo.forward.head`). What is left is how its media are batched, and whether its attention can be packed:

    family                    images (`pixel_values`)       videos
    Qwen2-VL, 2.5-VL, 3-VL    (patches, D)                  `pixel_values_videos` (patches, D)
    LLaVA-1.5, -NeXT-Video,
      -OneVision              (images, ..., C, H, W)        `pixel_values_videos` (N, frames, C, H, W)
    InternVL                  (images, C, H, W)             frames are images
    Idefics2, Idefics3        (rows, images, C, H, W)       none
    SmolVLM                   (rows, images, C, H, W)       frames are images

A new family also gets a tiny model in `tests/kits/families.py`: all tests of families then run on it.
"""

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

VISION_INPUTS = {"pixel_values": "image", "pixel_values_videos": "video"}  # each takes one pass of the vision tower
FEATURE_METHODS = ("get_image_features", "get_video_features")  # of a backbone: what its tower and projector give
FLOAT32_PIXELS = ("gemma4_vision", "radio")  # types of towers that compute with pixels before they cast them
ROWS_FIRST = "pixel_attention_mask"  # with this input (Idefics, SmolVLM), the media have one entry per row


def vision_inputs(media: list[dict[str, Tensor]]) -> list[str]:
    """Return which inputs of the vision tower the media of some trunks make."""
    return [name for name in VISION_INPUTS if any(name in tensors for tensors in media)]


def placeholders(batch: dict, backbone: nn.Module) -> dict[str, list[int]] | None:
    """Return how many features each trunk of a batch takes, by the method that computes them; None: not known."""
    counts = {}
    for method, (name, kind) in zip(FEATURE_METHODS, VISION_INPUTS.items()):
        if any(name in tensors for tensors in batch["media"]):
            ids = [getattr(backbone.config, f"{kind}_token_{end}", None) for end in ("id", "index")]
            token = next((i for i in ids if i is not None), None)
            if token is None or not hasattr(backbone, method):
                return None
            counts[method] = ((batch["trunk_ids"] == token) & batch["trunk_mask"]).sum(-1).tolist()
            if [name in tensors for tensors in batch["media"]] != [count > 0 for count in counts[method]]:
                return None  # GLM-4V has frames of videos under the token of images
    return counts


def merge_media(items: list[dict[str, Tensor]], only: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """Merge the media of several sequences into one set of model inputs, in the order of the sequences.

    Where the first dimension counts patches or images, a sequence without media adds nothing; where it counts rows, it
    adds a row without images. Other dimensions are padded with zeros on the right, which every family takes for "no
    image here". Videos of (N, frames, C, H, W) that differ in shape become a list, see [`take_video_list`]. `only` is
    the tensors to keep; None: all.
    """
    names = list(dict.fromkeys(name for item in items for name in item if only is None or name in only))
    merged = {}
    for name in names:
        tensors = [item[name] for item in items if name in item]
        if name == "pixel_values_videos" and len({t.shape[1:] for t in tensors}) > 1 and tensors[0].dim() == 5:
            merged[name] = [video for tensor in tensors for video in tensor]
            continue
        if ROWS_FIRST in names:
            empty = tensors[0].new_zeros((1, 0, *tensors[0].shape[2:]))
            tensors = [item.get(name, empty) for item in items]
        sizes = [max(dims) for dims in zip(*(t.shape[:0:-1] for t in tensors))]  # last dimension first, as in F.pad
        missing = [[n for size, own in zip(sizes, t.shape[:0:-1]) for n in (0, size - own)] for t in tensors]
        padded = [F.pad(t, pads) if any(pads) else t for t, pads in zip(tensors, missing)]
        merged[name] = torch.cat(padded) if len(padded) > 1 else padded[0]  # one alone is not copied
    return merged


def take_video_list(method: Callable) -> Callable:
    """Let a family's `get_video_features` take a list of (frames, C, H, W): one pass of the tower for all lengths.

    LLaVA's videos pass the tower frame by frame, and only their end differs: LLaVA-OneVision puts a newline behind
    each. So every frame goes in as a video of its own, and the newlines of all but the last of a video are left out.
    """

    @functools.wraps(method)
    def features(self, pixel_values_videos, *args, **kwargs):
        if not isinstance(pixel_values_videos, list):
            return method(self, pixel_values_videos, *args, **kwargs)
        frames = torch.cat(pixel_values_videos).unsqueeze(1)  # (frames of all, 1, C, H, W)
        out = method(self, frames, *args, **kwargs)
        tokens = out.pooler_output  # (frames of all, tokens of one, H)
        keep = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if self.config.model_type == "llava_onevision":
            last = torch.tensor([len(video) for video in pixel_values_videos], device=tokens.device).cumsum(0) - 1
            keep[:, -1] = False
            keep[last, -1] = True
        out.pooler_output = tokens[keep].unsqueeze(0)
        return out

    return features


def padded_layout_reason(model: PreTrainedModel) -> str | None:
    """Return why a model cannot have packed rows, as far as its code and config tell; None if it may."""
    config = model.config.get_text_config()
    if getattr(config, "use_bidirectional_attention", None) or "gemma3" in config.model_type:
        return "its image tokens see each other in both directions"
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"}:
        return f"its layers are {', '.join(sorted(kinds))}, some of which pass a state along the sequence"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention caps its logits, which fused attention kernels do not"
    if not model._supports_attention_backend:
        return "its attention is not taken from transformers' AttentionInterface"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and not kinds and not _hands_window(model):
        return f"its sliding window ({window} tokens) is in its mask only"
    return None


def _hands_window(model: PreTrainedModel) -> bool:
    """Tell whether the attention layers hand their window to the attention function."""
    layers = {type(m) for m in model.base_model.get_decoder().modules() if hasattr(m, "layer_idx")}
    return any("sliding_window" in inspect.getsource(layer.forward) for layer in layers)
