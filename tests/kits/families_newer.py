"""Tiny models of the newer families, beside those of `families`: the same fields and more, see `Family`."""

import torch
from families_gemma import GEMMA
from families_grids import GRIDS
from families_labs import LABS
from families_llama import LLAMA
from families_others import OTHERS
from families_qwen import QWEN
from families_rarer import RARER
from families_readers import READERS
from families_squares import SQUARES
from families_tiles import TILES
from helpers import message, row

SIDES = ("chosen", "rejected")
NEWER = {**GEMMA, **LLAMA, **QWEN, **TILES, **GRIDS, **SQUARES, **RARER, **READERS, **OTHERS, **LABS}


def build(name, seed=0):
    """(model, processor) of a newer family, its weights as in `families.build`.

    What is zero at initialisation is drawn: no picture would pass Gemma 3's projector or Mllama's gates.
    """
    torch.manual_seed(seed)
    model, processor = NEWER[name].build()
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.1)
            elif weight.dim() == 4:  # towers of many convolutions would lose the picture
                torch.nn.init.kaiming_normal_(weight)
            elif weight.dim() > 1:
                weight.mul_(NEWER[name].scale)
    return model.eval(), processor


def example(family, kind, media):
    """A row whose responses differ in length."""
    square, wide = media["image"]
    several = [square, square if family.alike else wide]
    sources = {"text": (None, ()), "image": ("image", [wide]), "images": ("image", several)}
    sources["string"] = sources["image"]
    clip = media["video"][1 if kind == "both" else 0]
    made = row(*sources.get(kind, ("video", [clip])), "a red square.", "left.")
    if kind == "both":
        made["prompt"] = message("user", "<image>", "<video>", "What is in the picture?")
        made["images"] = media["image"][:1]
    if kind == "string" or not family.chat:
        made |= {part: made[part][0]["content"][-1]["text"] for part in ("prompt", *SIDES)}
    return made
