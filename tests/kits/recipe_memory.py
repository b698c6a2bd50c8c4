"""The memory of the recipes for GPUs, as `trl-vpo doctor` computes it without weights and data: a line of the header.

    python tests/kits/recipe_memory.py recipes/*/*_*b*.yaml    # writes the lines

The row is the one that a recipe is for: a video that fills `num_frames` and `max_pixels`, or for LPOI a photo.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from published_models import PUBLISHED
from trl import get_peft_config

from trl_vpo.doctor.loaded_recipe import LoadedRecipe, parse_recipe
from trl_vpo.doctor.memory import GIB, estimate, plan_of
from trl_vpo.models.model_size import adapt
from trl_vpo.runs.recipe_list import MEMORY
from trl_vpo.trainers.setup import set_pad_token
from trl_vpo.training.run import freeze_vision

WORDS = 128  # tokens of text in a prompt, and of each response
FRAME, PHOTO = (1024, 1024), (1024, 768)
CARD = r"written for \d+ GPUs? of (\d+) GB"
LINE = (
    "# Memory: the doctor computes {gib:.1f} GiB for {row} of {tokens:,} tokens: {media}, 128 of text, 128 a response."
)


@dataclass
class RecipeMemory:
    """Bytes on each GPU, for a micro-batch of so many rows of so many tokens, and what they show."""

    total: int
    rows: int
    tokens: int
    media: str

    @property
    def line(self) -> str:
        row = "a row" if self.rows == 1 else f"{self.rows} rows"
        shown = f"{self.media}, {WORDS} of text, {WORDS} a response"
        return (
            f"# Memory: the doctor computes {self.total / GIB:.1f} GiB for {row} of {self.tokens:,} tokens: {shown}."
        )


def row_of(recipe: LoadedRecipe) -> tuple[dict, str]:
    """Return the row that a recipe is for, and what it shows."""
    args, lists_images = recipe.args, recipe.method == "lpoi"
    if lists_images:
        media = {"images": [Image.new("RGB", PHOTO)], "critical_box": [100, 100, 300, 300]}
    else:
        media = {"videos": [[Image.new("RGB", FRAME)] * args.num_frames]}
    prompt = [{"type": "image" if lists_images else "video"}, {"type": "text", "text": "x" * WORDS}]
    row = {"prompt": [{"role": "user", "content": prompt}]}
    row |= {side: [{"role": "assistant", "content": x * WORDS}] for side, x in (("chosen", "x"), ("rejected", "y"))}
    return row | media, f"{args.num_images} images" if lists_images else f"{args.num_frames} frames"


def recipe_memory(path: Path) -> RecipeMemory:
    """Estimate a recipe's memory as the doctor does, with the published config and a processor of ours."""
    recipe = parse_recipe(path, [])
    recipe.config, recipe.processor = PUBLISHED[recipe.model_args.model_name_or_path]()
    set_pad_token(recipe.processor, recipe.args)
    recipe.build()
    if (peft_config := get_peft_config(recipe.model_args)) is not None:
        recipe.model, _ = adapt(recipe.model, peft_config)
    elif recipe.script_args.freeze_vision:
        freeze_vision(recipe.model)
    row, media = row_of(recipe)
    rows = recipe.args.per_device_train_batch_size
    plan = plan_of(recipe, [recipe.collator().encode(row)] * rows)
    return RecipeMemory(estimate(plan, recipe.model).total, rows, plan.pair.call.length, media)


def card_of(path: Path) -> int:
    """Return the bytes of the GPU that a recipe is written for."""
    return int(re.search(CARD, path.read_text())[1]) * GIB


def write_line(path: Path) -> str:
    """Write the line in front of the sources, in the place of an old one, and return it."""
    line = recipe_memory(path).line
    text = re.sub(MEMORY.replace("$", "\n"), "", path.read_text(), flags=re.MULTILINE)
    path.write_text(text.replace("# Source: ", f"{line}\n# Source: ", 1))
    return line


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}\n  {write_line(Path(name))}", flush=True)
