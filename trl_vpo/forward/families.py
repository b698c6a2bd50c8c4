"""The differences between model families: the one place where a new family is made known.

Most of a family needs no entry. Processor, chat template and model class come from transformers; the modules that LoRA
adapts go by their names (`trl_vpo.forward.parts`), and what a model does with its logits is tried
(`trl_vpo.forward.head`). What is left stands in the table below: how media are batched, what a response adds to the
inputs of its prompt, and what a call of the model does not take.

    family                    images (`pixel_values`)       videos
    Qwen2-VL, 2.5-VL, 3-VL    (patches, D)                  `pixel_values_videos` (patches, D)
    LLaVA-1.5, -NeXT-Video,
      -OneVision              (images, ..., C, H, W)        `pixel_values_videos` (N, frames, C, H, W)
    InternVL                  (images, C, H, W)             frames are images
    Idefics2, Idefics3        (rows, images, C, H, W)       none
    SmolVLM                   (rows, images, C, H, W)       frames are images

A new family also gets a tiny model in `tests/kits`: all tests of families then run on it.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

PIXELS = {"pixel_values": "image", "pixel_values_videos": "video", "pixel_values_images": "image"}  # Video-LLaVA's
# Each takes one pass of the vision tower. The last is Phi-4-multimodal's, which computes its features in its decoder.
VISION_INPUTS = {**PIXELS, "image_pixel_values": "image"}
FEATURE_METHODS = ("get_image_features", "get_video_features")  # of a backbone: what its tower and projector give
FLOAT32_PIXELS = ("gemma4_vision", "radio")  # types of towers that compute with pixels before they cast them
OTHER_NAMES = {"second_per_grids": "video_second_per_grid"}  # of arguments of `get_rope_index`: what processors say
STATE = ("linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding")  # kinds of layers


@dataclass(frozen=True)
class Join:
    """How the tensors of several sequences become one."""

    dim: int = 0  # the dimension along which they are joined
    flat: bool = False  # the first two dimensions count the same; they become one behind a 1
    rows: bool = False  # the first dimension counts sequences, and one without media has a row without images
    apart: bool = False  # they are not joined: a list, see `take_list`
    # The tensor whose first two dimensions these numbers count; they move on by those of the sequences before.
    into: str | None = None


@dataclass(frozen=True)
class Family:
    """What cannot be read off a model."""

    joins: dict[str, Join] = field(default_factory=dict)  # media tensors not just joined along the first dimension
    response_types: dict[str, int] = field(default_factory=dict)  # token types of responses that are not 0
    masks: tuple[str, ...] = ()  # media tensors, (1, P, ...) for the tokens of a prompt; a response repeats the last
    one_token: bool = False  # images and videos have the same placeholder, and the model takes one kind in a call
    same_images: bool = False  # all sequences of a call need the same number of images
    causal_flag: bool = False  # transformers marks its tower's attention as causal, and it is not
    repeats: bool = True  # its methods give one feature for each placeholder, which may be repeated
    padded: str | None = None  # why rows are not packed


BOTH_WAYS = "its image tokens see each other in both directions"
LAST = Join(dim=-1)
TILES = Join(dim=1, flat=True)
ROWS = Join(rows=True)
APART = Join(apart=True)
IDEFICS = Family(joins={"pixel_values": ROWS, "pixel_attention_mask": ROWS})
MINICPM = Family(joins={"pixel_values": LAST, "pixel_values_videos": LAST})
ONE_TOKEN = Family(one_token=True)

FAMILIES = {  # by `config.model_type`
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm", "granite_docling"), IDEFICS),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), MINICPM),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"), ONE_TOKEN),
    **dict.fromkeys(("gemma3", "shieldgemma2"), Family(padded=BOTH_WAYS)),
    "paligemma": Family(response_types={"token_type_ids": 1}, padded=BOTH_WAYS),
    "mllama": Family(
        joins=dict.fromkeys(("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"), ROWS),
        masks=("cross_attention_mask",),
        same_images=True,  # tokens that see no image attend to all, the padding of other sequences too
        padded="it reads its images by cross-attention",
    ),
    "molmo2": Family(
        joins={
            "image_token_pooling": Join(into="pixel_values"),
            "video_token_pooling": Join(into="pixel_values_videos"),
        },
        one_token=True,
        padded=BOTH_WAYS,
    ),
    "phi4_multimodal": Family(causal_flag=True),
    "emu3": Family(joins={"pixel_values": APART, "image_sizes": APART}),  # the padding of an image moves its features
    "perception_lm": Family(joins={"pixel_values": TILES, "pixel_values_videos": TILES}),
    # More features than placeholders; features with numbers of layers.
    **dict.fromkeys(("video_llama_3", "granite4_vision"), Family(repeats=False)),
}
PROMPT_MASKS = {name for family in FAMILIES.values() for name in family.masks}
# Processors whose models fail in transformers itself: (processor, kinds of media in a prompt) -> why.
UPSTREAM = {
    ("Kimi_K25Processor", "video"): "Kimi K2.5 splits the features of a video as if no frames were pooled",
    ("NemotronH_Omni_Reasoning_V3Processor", "video"): "it takes the features of a video for a list of features",
    **{
        (f"{name}Processor", "image and video"): "the model takes images and videos for the same"
        for name in ("Glm4v", "Glm46V", "Molmo2")
    },
}


def family_of(model: nn.Module) -> Family:
    """Return the entry of a model or backbone."""
    return FAMILIES.get(model.config.model_type, Family())


def vision_inputs(media: list[dict[str, Tensor]]) -> list[str]:
    """Return which inputs of the vision tower the media of some trunks make."""
    return [name for name in VISION_INPUTS if any(name in tensors for tensors in media)]


def placeholders(batch: dict, backbone: nn.Module) -> dict[str, list[int]] | None:
    """Return how many features each trunk of a batch takes, by the method that computes them; None: not known."""
    if not family_of(backbone).repeats:
        return None
    counts = {}
    for method, kind in zip(FEATURE_METHODS, PIXELS.values()):
        reads = [any(PIXELS.get(name) == kind for name in tensors) for tensors in batch["media"]]
        if any(reads):
            ids = [getattr(backbone.config, f"{kind}_token_{end}", None) for end in ("id", "index")]
            token = next((i for i in ids if i is not None), None)
            if token is None or not hasattr(backbone, method):
                return None
            counts[method] = ((batch["trunk_ids"] == token) & batch["trunk_mask"]).sum(-1).tolist()
            if reads != [count > 0 for count in counts[method]]:
                return None  # GLM-4V has frames of videos under the token of images
    if any(media and not PIXELS.keys() & media.keys() for media in batch["media"]):
        return None  # Phi-4-multimodal's tower lies in its decoder
    return counts


def merge_media(
    items: list[dict[str, Tensor]],
    backbone: nn.Module | None = None,
    only: tuple[str, ...] | None = None,
    length: int | None = None,
) -> dict[str, Tensor]:
    """Merge the media of several sequences into one set of model inputs, in the order of the sequences.

    Where the first dimension counts patches or images, a sequence without media adds nothing; where it counts rows, it
    adds a row without images. Other dimensions are padded with zeros on the right, which every family takes for "no
    image here". Videos of (N, frames, C, H, W) that differ in shape become a list, see [`take_video_list`]. `only` is
    the tensors to keep; None: all. `length` is that of the sequences, for masks over prompts.
    """
    family = Family() if backbone is None else family_of(backbone)
    merged = {}
    for name in dict.fromkeys(name for item in items for name in item if only is None or name in only):
        join = family.joins.get(name, Join())
        tensors = [item[name] for item in items if name in item]
        ragged = len({t.shape[1:] for t in tensors}) > 1
        if name == "pixel_values_videos" and name not in family.joins and ragged and tensors[0].dim() == 5:
            merged[name] = [video for tensor in tensors for video in tensor]
            continue
        if join.apart and len(tensors) > 1:
            merged[name] = tensors
            continue
        if join.rows:
            empty = tensors[0].new_zeros((1, 0, *tensors[0].shape[2:]))
            tensors = [item.get(name, empty) for item in items]
        if join.flat:
            tensors = [t.flatten(0, 1).unsqueeze(0) for t in tensors]
        if join.into:
            counts = [item[join.into].shape[:2].numel() for item in items if name in item]
            tensors = [torch.where(t < 0, t, t + sum(counts[:i])) for i, t in enumerate(tensors)]
        if name in family.masks and length:
            tensors = [torch.cat([t, t[:, -1:].repeat_interleave(length - t.size(1), 1)], dim=1) for t in tensors]
        merged[name] = _cat(tensors, join.dim)
    return merged


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    """Join tensors along a dimension, the others padded with zeros on the right."""
    if len(tensors) == 1:  # is not copied
        return tensors[0]
    sizes = [max(dims) for dims in zip(*(t.shape for t in tensors))]
    sizes[dim] = None
    missing = [[0 if size is None else size - n for size, n in zip(sizes, t.shape)] for t in tensors]
    pads = [[n for size in reversed(sizes) for n in (0, size)] for sizes in missing]  # the last dimension first
    return torch.cat([F.pad(t, p) if any(p) else t for t, p in zip(tensors, pads)], dim=dim)


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


def take_list(method: Callable) -> Callable:
    """Let a family's `get_image_features` take a list for each of its arguments: the images of each sequence apart."""

    @functools.wraps(method)
    def features(self, pixel_values, *args, **kwargs):
        if not isinstance(pixel_values, list):
            return method(self, pixel_values, *args, **kwargs)
        outputs = [method(self, *own, **kwargs) for own in zip(pixel_values, *args)]
        outputs[0].pooler_output = [features for output in outputs for features in output.pooler_output]
        return outputs[0]

    return features


def padded_layout_reason(model: PreTrainedModel) -> str | None:
    """Return why a model cannot have packed rows, as far as its code and config tell; None if it may."""
    if reason := family_of(model).padded:
        return reason
    config, decoder = model.config.get_text_config(), model.get_decoder()
    if getattr(config, "use_bidirectional_attention", None):
        return BOTH_WAYS
    kinds = set(getattr(config, "layer_types", None) or [])
    if "chunked_attention" in kinds:
        return f"its attention stays within chunks of {config.attention_chunk_size} tokens"
    if kinds & set(STATE):
        return f"some of its layers ({', '.join(sorted(kinds & set(STATE)))}) pass a state along the sequence"
    if any(name.endswith(".indexer") for name, _ in decoder.named_modules()):
        return "its attention chooses the tokens that it sees"
    if kinds - {"full_attention", "sliding_attention"}:
        return f"its layers are {', '.join(sorted(kinds))}, and packed rows have full and sliding attention"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention caps its logits, which fused attention kernels do not"
    if not decoder._supports_attention_backend:
        return "its attention is not taken from transformers' AttentionInterface"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and not kinds and not _hands_window(model):
        return f"its sliding window ({window} tokens) is in its mask only"
    return None


def rope_limit(model: PreTrainedModel) -> int | None:
    """Return the length beyond which positions depend on the longest sequence of a call; None: they never do."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):  # one for all layers, or one for each type of layer
        if isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope"):
            return kind.get("original_max_position_embeddings") or config.max_position_embeddings
    return None


def _hands_window(model: PreTrainedModel) -> bool:
    """Tell whether the attention layers hand their window to the attention function."""
    layers = {type(m) for m in model.get_decoder().modules() if hasattr(m, "layer_idx")}
    return any("sliding_window" in inspect.getsource(layer.forward) for layer in layers)
