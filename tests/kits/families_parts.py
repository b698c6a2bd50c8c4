"""What the builders of newer families share: a family's description, tokenizers with BOS, and few sizes."""

from collections.abc import Callable
from typing import NamedTuple

import families
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIGLIP = {"vision_use_head": False}
WINDOWS = {"head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}


class Family(NamedTuple):
    """A tiny model. The first two fields are those of the older families.

    Attributes:
        build: gives (model, processor).
        video: takes videos.
        both: takes images and videos in one prompt.
        text: takes prompts without media.
        images: takes several images in one prompt.
        alike: the images of a prompt must have one shape.
        chat: has a chat template; without one, prompts are strings, and the processor gets the response as `suffix`.
        projector: has layers between tower and decoder.
        adapter: takes an adapter that PEFT can load.
        scale: of fresh weights, see `families_newer.build`.
        slow: one of the rarer ones.
    """

    build: Callable
    video: bool = False
    both: bool = False
    text: bool = True
    images: bool = True
    alike: bool = False
    chat: bool = True
    projector: bool = True
    adapter: bool = True
    scale: float = 4
    slow: bool = False


def bos_tokenizer(special=(), named=None, bos="<s>", eos="</s>", pad="<pad>", adds=True) -> PreTrainedTokenizerFast:
    """A tokenizer with a BOS token, which it adds by itself, as those of Llama, Gemma and Mistral do."""
    own = list(dict.fromkeys([bos, eos, pad, *special, *(named or {}).values()]))
    tok = families.tokenizer(own, named, vocab_size=360 + len(own))
    tok.bos_token, tok.eos_token, tok.pad_token = bos, eos, pad
    if adds:
        pair = f"{bos} $A {bos}:1 $B:1"
        begin = processors.TemplateProcessing(single=f"{bos} $A", pair=pair, special_tokens=[(bos, tok.bos_token_id)])
        tok.backend_tokenizer.post_processor = begin
    return tok


def bos_template(image="", video=""):
    return "{{ bos_token }}" + families.template(image, video)


def numbers(tok, end="id", /, **tokens):
    """Token numbers for the fields of a config: `image="<image>"` is its `image_token_id`."""
    return {f"{name}_token_{end}": number(tok, token) for name, token in tokens.items()}


def number(tok, token):
    assert token in tok.get_vocab(), token
    return tok.convert_tokens_to_ids(token)
