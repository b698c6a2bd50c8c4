"""Models at their published shapes with random weights, made on the device in seconds, and processors for them.

`layers=None` is the whole model. `tiny` keeps the architecture and makes it narrow, for a dry run on a CPU. All
processors share the tokenizer of `benchmarks.model`, one token a word; only the head may have more rows than that.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T
from accelerate import init_empty_weights
from benchmarks import model as bench_model
from torch import nn
from transformers import core_model_loading

if not hasattr(core_model_loading, "apply_renamings"):  # transformers 5.17, which a machine may bring, is older than
    core_model_loading.apply_renamings = None  # the package allows; it is imported for adapters of before 4.52

QWEN_IDS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
LANGUAGE_MODEL = r".*(language_model|text_model)\.(?!.*vision).*\.(q|k|v|o|gate|up|down)_proj"
FAMILIES = ("Qwen2.5-VL", "Qwen3-VL", "LLaVA-OneVision", "Idefics2")
NAMES = {"2B": "Qwen3-VL", "7B": "Qwen2.5-VL"}  # of the whole models
TAKES_VIDEOS = ("Qwen2.5-VL", "Qwen3-VL", "LLaVA-OneVision")

# hidden, intermediate, layers, heads, key-value heads, head size; and the vision tower's first four
TEXT = {
    "Qwen2.5-VL": (3584, 18944, 28, 28, 4, 128),  # 7B
    "Qwen3-VL": (2048, 6144, 28, 16, 8, 128),  # 2B
    "LLaVA-OneVision": (3584, 18944, 28, 28, 4, 128),  # 7B
    "Idefics2": (4096, 14336, 32, 32, 8, 128),  # 8B
}
VISION = {
    "Qwen2.5-VL": (1280, 3420, 32, 16),
    "Qwen3-VL": (1024, 4096, 24, 16),
    "LLaVA-OneVision": (1152, 4304, 26, 16),
    "Idefics2": (1152, 4304, 27, 16),
}
TINY_TEXT, TINY_VISION = (64, 128, 2, 4, 2, 16), (32, 64, 2, 2)
SIDES = {"Qwen2.5-VL": (448, 56), "Qwen3-VL": (512, 64), "LLaVA-OneVision": (384, 56), "Idefics2": (384, 56)}


@dataclass
class Shape:
    """A family at some size: what makes its model, its processor, and the side of its pictures in pixels."""

    family: str
    config: Any
    model_class: type
    processor: Any
    side: int


def shape(family: str, *, layers: int | None = None, vocabulary: int | None = None, tiny: bool = False) -> Shape:
    """Return a family's shape. `vocabulary`: rows of the head; without it as many as the tokenizer has tokens."""
    side = SIDES[family][tiny]
    tokenizer, processor, extra = _PROCESSORS[family](side, tiny)
    hidden, intermediate, depth, heads, groups, head = TINY_TEXT if tiny else TEXT[family]
    text = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": min(depth, layers or depth),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "vocab_size": max(vocabulary or 0, len(tokenizer)),
        "max_position_embeddings": 32768,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    width, feed_forward, tower_layers, tower_heads = TINY_VISION if tiny else VISION[family]
    tower = (width, feed_forward, min(tower_layers, layers or tower_layers), tower_heads)
    config, model_class = _CONFIGS[family](text, tower, side, tiny, tokenizer, extra)
    config.architectures = [model_class.__name__]
    return Shape(family, config, model_class, processor, side)


def whole(name: str, tiny: bool) -> Shape:
    """Return the shape of the "2B" or the "7B" model, with its vocabulary."""
    return shape(NAMES[name], vocabulary=None if tiny else 151_936 if name == "2B" else 152_064, tiny=tiny)


def build(made: Shape, device: str, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0) -> Any:
    """Build a model on the device. Its weights are those of the seed, rounded to bfloat16, whatever the dtype.

    Norms are 1 and biases small. All other weights have the deviation that keeps the size of what they multiply.
    """
    config = copy.deepcopy(made.config)  # it will hold the dtype and the attention of this model
    with init_empty_weights(include_buffers=False):  # buffers, such as rotary frequencies, are computed as usual
        model = made.model_class._from_config(config, dtype=dtype, attn_implementation=attention)
    generator = torch.Generator(device).manual_seed(seed)
    filled: dict[int, nn.Parameter] = {}  # a weight may have several owners
    for module in model.modules():
        for name, empty in module._parameters.items():
            if empty is not None and id(empty) not in filled:
                filled[id(empty)] = nn.Parameter(_weights(name, empty.shape, device, generator).to(dtype))
            module._parameters[name] = None if empty is None else filled[id(empty)]
    model.tie_weights()  # `init_empty_weights` parts what shares a weight
    return model.to(device)


def _weights(name: str, size: torch.Size, device: str, generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1 and name.endswith("weight"):
        return torch.ones(size, device=device, dtype=torch.bfloat16)
    deviation = 0.02 if len(size) == 1 else size[1:].numel() ** -0.5
    return torch.empty(size, device=device, dtype=torch.bfloat16).normal_(0, deviation, generator=generator)


def fastest_attention(device: str) -> str:
    """Return the fastest attention that works here: FlashAttention 3 (Hopper) or 2 where installed, else sdpa."""
    versions = () if device != "cuda" else (3, 2) if torch.cuda.get_device_capability()[0] == 9 else (2,)
    for version in versions:
        try:
            if getattr(T.utils, f"is_flash_attn_{version}_available")() and _attends(f"flash_attention_{version}"):
                return f"flash_attention_{version}"
        except Exception as error:  # whatever an installation that does not fit may raise
            print(f"FlashAttention {version} does not work here: {type(error).__name__}: {error}")
    return "sdpa"


def _attends(name: str) -> bool:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 32}
    config = T.Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = T.Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=name).to("cuda")
    model(torch.arange(16, device="cuda").unsqueeze(0)).logits.sum().backward()
    return True


# --- processors ---------------------------------------------------------------------------------------------------


def _with_tokens(*tokens: str) -> tuple[Any, str]:
    """(tokenizer, chat template) with `<image>` and `<video>` in the place of Qwen's marks."""
    tokenizer = bench_model.processor().tokenizer
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    start, end = "<|vision_start|>", "<|vision_end|>"
    image, video = f"{start}<|image_pad|>{end}", f"{start}<|video_pad|>{end}"
    return tokenizer, bench_model.TEMPLATE.replace(image, "<image>").replace(video, "<video>")


def _qwen2_5_processor(side: int, tiny: bool) -> tuple:
    processor = bench_model.processor()
    return processor.tokenizer, processor, {}


def _qwen3_processor(side: int, tiny: bool) -> tuple:
    tokenizer = bench_model.processor().tokenizer
    common = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    images = T.Qwen2VLImageProcessor(**common, size={"shortest_edge": 32**2, "longest_edge": side**2})
    size = {"shortest_edge": 4 * 32**2, "longest_edge": 64 * side**2}  # of frames x height x width
    videos = T.Qwen3VLVideoProcessor(**common, size=size)
    template = bench_model.TEMPLATE
    return tokenizer, T.Qwen3VLProcessor(images, tokenizer, videos, chat_template=template), {}


def _llava_processor(side: int, tiny: bool) -> tuple:
    tokenizer, template = _with_tokens("<image>", "<video>")
    size = {"height": side, "width": side}
    pinpoints = [[side * i, side * j] for i in (1, 2) for j in (1, 2)]
    processor = T.LlavaOnevisionProcessor(
        T.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        T.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(side // 14) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    return tokenizer, processor, {"image_grid_pinpoints": pinpoints}


def _idefics2_processor(side: int, tiny: bool) -> tuple:
    tokenizer, template = _with_tokens("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    latents = 4 if tiny else 64
    size = {"shortest_edge": side, "longest_edge": side}
    images = T.Idefics2ImageProcessor(size=size, do_image_splitting=False)
    processor = T.Idefics2Processor(images, tokenizer, image_seq_len=latents, chat_template=template)
    return tokenizer, processor, {"resampler_n_latents": latents}


_PROCESSORS = {
    "Qwen2.5-VL": _qwen2_5_processor,
    "Qwen3-VL": _qwen3_processor,
    "LLaVA-OneVision": _llava_processor,
    "Idefics2": _idefics2_processor,
}


# --- configs ------------------------------------------------------------------------------------------------------


def _qwen(text: dict, tower: tuple, tokenizer: Any, kind: str, sections: list[int], theta: float, **vision) -> tuple:
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}
    if kind == "Qwen3VL":
        rope["mrope_interleaved"] = True
    names = ("hidden_size", "intermediate_size", "depth", "num_heads")
    vision |= dict(zip(names, tower)) | {"out_hidden_size": text["hidden_size"]}
    marks = dict(zip(QWEN_IDS, tokenizer.convert_tokens_to_ids(bench_model.VISION)))
    config = getattr(T, f"{kind}Config")(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=kind == "Qwen3VL",
        **marks,
    )
    return config, getattr(T, f"{kind}ForConditionalGeneration")


def _qwen2_5(text: dict, tower: tuple, side: int, tiny: bool, tokenizer: Any, extra: dict) -> tuple:
    full = [i for i in (7, 15, 23, 31) if i < tower[2]] or [tower[2] - 1]
    more = {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": full, "tokens_per_second": 2}
    text = {k: v for k, v in text.items() if k != "head_dim"}
    return _qwen(text, tower, tokenizer, "Qwen2_5_VL", [2, 3, 3] if tiny else [16, 24, 24], 1e6, **more)


def _qwen3(text: dict, tower: tuple, side: int, tiny: bool, tokenizer: Any, extra: dict) -> tuple:
    deep = [i for i in (5, 11, 17) if i < tower[2]] or [0]
    more = {"patch_size": 16, "num_position_embeddings": 16 if tiny else 2304, "deepstack_visual_indexes": deep}
    return _qwen(text, tower, tokenizer, "Qwen3VL", [4, 2, 2] if tiny else [24, 20, 20], 5e6, **more)


def _siglip(tower: tuple, **more) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, tower)) | {"patch_size": 14, **more}


def _llava(text: dict, tower: tuple, side: int, tiny: bool, tokenizer: Any, extra: dict) -> tuple:
    text = {k: v for k, v in text.items() if k != "head_dim"}
    config = T.LlavaOnevisionConfig(
        text_config=text | {"model_type": "qwen2"},
        vision_config=_siglip(tower, model_type="siglip_vision_model", image_size=side, vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        **extra,
    )
    return config, T.LlavaOnevisionForConditionalGeneration


def _idefics2(text: dict, tower: tuple, side: int, tiny: bool, tokenizer: Any, extra: dict) -> tuple:
    perceiver = {"hidden_size": text["hidden_size"], "resampler_depth": min(3, tower[2]), **extra}
    if tiny:
        perceiver |= {"resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2}
    config = T.Idefics2Config(
        text_config=text | {"model_type": "mistral", "sliding_window": 4096},
        vision_config=_siglip(tower, image_size=56 if tiny else 980),
        perceiver_config=perceiver,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return config, T.Idefics2ForConditionalGeneration


_CONFIGS = {"Qwen2.5-VL": _qwen2_5, "Qwen3-VL": _qwen3, "LLaVA-OneVision": _llava, "Idefics2": _idefics2}
