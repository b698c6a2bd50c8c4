"""The doctor's estimate against what the allocator counted for the cells of `gpu_checks.step`.

The estimate's share for CUDA's context and fragmentation is left out: neither is in `max_memory_allocated`. Estimated
and measured are everything: weights, adapter, optimizer, batch, activations.
"""

import time
from typing import Any

import torch
from benchmarks.common import MIB
from trl import ModelConfig

from gpu_checks import models, step
from gpu_checks.trainers import lora, settings
from trl_vpo.doctor.loaded_recipe import LoadedRecipe
from trl_vpo.doctor.memory import estimate, plan_of
from trl_vpo.models.model_size import adapt

NOT_ALLOCATED = "CUDA context, fragmentation"
WITHIN = 0.15


def cells(options: Any) -> list[dict]:
    """Our cells of the step that were measured; `options.measured` has their rows."""
    wanted = ("method", "model", "media", "prompts", "response", "attention", "asked", "peak_mib")
    ours = [row for row in options.measured if row["method"] != "trl" and "peak_mib" in row]
    if options.tiny:
        ours = list({(row["method"], row["model"]): row for row in ours}.values())
    return [{name: row[name] for name in wanted} for row in ours]


def run(cell: dict, options: Any) -> list[dict]:
    begin = time.perf_counter()
    device = options.device
    made = models.whole(cell["model"], options.tiny)
    data = step.rows(cell, made, options.tiny)
    made.config.dtype = torch.bfloat16 if device == "cuda" else torch.float32
    args = settings(cell["method"], device, per_device_train_batch_size=len(data), **step.trainer_options(cell))
    dtype = str(made.config.dtype).removeprefix("torch.")
    model_args = ModelConfig(use_peft=True, dtype=dtype, attn_implementation=cell["attention"])
    recipe = LoadedRecipe(cell["method"], None, args, model_args, None, config=made.config, processor=made.processor)
    recipe.build()
    recipe.model, _ = adapt(recipe.base, lora())
    trees = list(map(recipe.collator().encode, data))
    made_estimate = estimate(plan_of(recipe, trees, device=device), recipe.model)
    estimated = (made_estimate.total - made_estimate.parts.get(NOT_ALLOCATED, 0)) / MIB
    ratio = estimated / cell["peak_mib"]
    row = {"estimated_mib": estimated, "ratio": ratio, "within": abs(ratio - 1) <= WITHIN}
    parts = {name: round(size / MIB, 1) for name, size in made_estimate.parts.items()}
    return [row | {"moment": made_estimate.moment, "parts": parts, "seconds": time.perf_counter() - begin}]
