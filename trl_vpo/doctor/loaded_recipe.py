"""A parsed recipe with what it names: config, processor, and the model without weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trl_vpo.forward.vision import vision_features
from trl_vpo.models.model_size import empty_model
from trl_vpo.training.launch import launch_options
from trl_vpo.training.methods import method_classes, method_of
from trl_vpo.training.run import make_parser
from trl_vpo.training.sharding import Sharding, launched

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEDIA_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass
class LoadedRecipe:
    """A parsed recipe and what it names; None is what could not be loaded."""

    method: str
    script_args: Any
    args: Any
    model_args: Any
    mixture: Any
    sharding: Sharding = field(default_factory=Sharding)
    gpu_memory: int | None = None  # bytes
    on_cpu: bool = False  # as the recipe asks; `args.use_cpu` is also set for want of a GPU
    config: Any = None
    processor: Any = None
    base: Any = None  # the model on the meta device ...
    model: Any = None  # ... and with its adapter

    @property
    def trainer_class(self) -> Any:
        return method_classes(self.method)[1]

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights as loaded."""
        return DTYPES.get(self.model_args.dtype) or getattr(self.config, "dtype", None) or torch.float32

    def build(self) -> None:
        """Build the model without weights and without adapter."""
        self.config.dtype = self.dtype
        self.base = self.model = empty_model(self.config)

    def collator(self) -> Any:
        """Return the trainer's own collator, without its limit on length."""
        collator = replace(self.trainer_class.make_collator(self.processor, self.args), max_length=None)
        if self.base is not None:
            collator.pixel_dtype = vision_features(self.base.base_model).pixel_dtype
        return collator

    @property
    def media_tokens(self) -> set[int]:
        """The ids that stand for image and video features in a prompt."""
        return {getattr(self.config, name, None) for name in MEDIA_TOKENS} - {None}


def parse_recipe(
    recipe: Path, overrides: list[str], *, method: str | None = None, gpu_memory: float | None = None
) -> LoadedRecipe:
    """Parse a recipe and the options that win over it, `--accelerate_config` and `--num_processes` among them.

    Without `method` it is the one that the recipe's header or path names; without `gpu_memory`, GiB of each GPU, it is
    that of this machine's GPU, if it has one. Raises RecipeError or ValueError.
    """
    method = method or method_of(recipe)
    options, launch = launch_options(["--config", str(recipe), *overrides])
    if gpu_memory is not None:
        size = int(gpu_memory * 2**30)
    else:
        size = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    parser = make_parser(method, any_device=True)
    parsed = parser.parse(options)
    return LoadedRecipe(method, *parsed, launched(launch), size, on_cpu="use_cpu" in parser.given)
