"""A Qwen2.5-VL of 6.8 M parameters with random weights, and preference rows of a given length for it."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "\n", *VISION]
WORDS = 1900
SIDE = 448  # pixels of an image: 16 x 16 = 256 tokens
LANGUAGE_MODEL = r".*language_model.*_proj"
TEMPLATE = (
    "{%- for m in messages -%}<|im_start|>{{ m['role'] }}\n{%- if m['content'] is string -%}{{ m['content'] }}"
    "{%- else -%}{%- for c in m['content'] -%}{%- if c['type'] == 'image' -%}<|vision_start|><|image_pad|>"
    "<|vision_end|>{%- elif c['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif c['type'] == 'text' -%}{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "<|im_end|>{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def processor() -> Qwen2_5_VLProcessor:
    """One token a word: `w0` to `w1899`, so that lengths are exact."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, "user", "assistant", *(f"w{i}" for i in range(WORDS))])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=SPECIAL[1:]
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": SIDE * SIDE}
    common = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    videos = Qwen2VLVideoProcessor(**common, cap_pixels_per_frame=False)
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**common), fast, videos, chat_template=TEMPLATE)


def model(proc: Qwen2_5_VLProcessor, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(seed)
    ids = proc.tokenizer.convert_tokens_to_ids
    text = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": len(proc.tokenizer),
        "max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
        "pad_token_id": ids("<|pad|>"),
        "bos_token_id": None,
        "eos_token_id": ids("<|im_end|>"),
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 256,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [3],
        "tokens_per_second": 2,
    }
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    tokens = {name: ids(token) for name, token in zip(names, VISION)}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))


def rows(
    prompt: int, response: int, box: bool = False, pairs: int = 1, images: int | None = None, side: int = SIDE
) -> Dataset:
    """`pairs` rows of about `prompt` prompt tokens, most of them images, and `response` tokens in each response.

    `images`: that many, of `side` pixels; without it 448-pixel images as many as fit the prompt.
    """
    rng = np.random.default_rng(0)
    count = images or (1 if box else max(1, (prompt - 16) // 258))
    table = []
    for _ in range(pairs):
        paths = pictures(rng, count, side)
        row = text_row(rng, [{"type": "image"}] * count, max(1, prompt - 258 * count - 5), response)
        more = {"critical_box": [100, 100, 300, 300], "other_images": paths, "other_chosen": row["rejected"]}
        table.append(row | {"images": paths} | (more if box else {}))
    return Dataset.from_list(table)


def clip_row(frames: int, response: int, side: int) -> Dataset:
    """One row with a clip of `frames` frames of `side` pixels, kept as images: no codec in the measurement."""
    rng = np.random.default_rng(0)
    paths = pictures(rng, frames, side)
    return Dataset.from_list([text_row(rng, [{"type": "video"}], 8, response) | {"videos": [paths]}])


def pictures(rng: np.random.Generator, count: int, side: int, **options: int) -> list[str]:
    """Write pictures of noise, as PNG files with Pillow's options; returns their paths."""
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    paths = [str(folder / f"{i:03d}.png") for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path, **options)
    return paths


def text_row(rng: np.random.Generator, media: list[dict], words: int, response: int) -> dict:
    """Return a row without its media; the responses have `response` tokens, with the end of the turn."""
    row = {"prompt": [{"role": "user", "content": [*media, _text(rng, words)]}]}
    sides = ("chosen", "rejected")
    return row | {side: [{"role": "assistant", "content": [_text(rng, response - 1)]}] for side in sides}


def _text(rng: np.random.Generator, words: int) -> dict:
    return {"type": "text", "text": " ".join(f"w{i}" for i in rng.integers(0, WORDS, words))}
