"""Speed and peak memory of a training step: stock `trl.DPOTrainer` against ours, on the same rows and weights.

A step is the reference pass, the policy's forward and backward under gradient checkpointing (not reentrant), clipping
and the optimizer's. LoRA on the language model, bfloat16 weights under autocast, batches collated before the clock
starts. "image" prompts are pictures of 256 tokens each, "text" prompts words alone. The most telling cells come first.
"""

from typing import Any

import torch
from benchmarks.common import MIB
from torch.utils._pytree import tree_leaves

from gpu_checks import models
from gpu_checks.trainers import (
    attention_kernels,
    free,
    held_mib,
    make_trainer,
    peak_mib,
    preference_row,
    table,
    timed,
    training_step,
)

SIZES = (2048, 4096, 8192, 16384)
UNEVEN = [4000, 300, 300, 300]
RESPONSE = 128
LPOI_IMAGES = 5


def cells(options: Any) -> list[dict]:
    """The cells in their order."""
    attention = models.fastest_attention(options.device)
    found: list[dict] = []

    def add(methods: str, model: str, prompts: list[int], media: str = "image", layout: str = "auto") -> None:
        for method in methods.split():
            kind = None if method == "trl" else layout
            cell = {"method": method, "model": model, "media": media, "prompts": prompts, "response": RESPONSE}
            found.append(cell | {"attention": attention, "asked": kind})

    add("trl dpo", "2B", [4096])
    add("trl dpo", "2B", [16384])
    add("trl dpo", "7B", [4096])
    add("rrpo leanpo", "2B", [4096])
    add("trl dpo", "2B", UNEVEN)
    add("lpoi", "2B", [512])
    add("lpoi", "2B", [512], layout="separate")
    add("trl dpo", "2B", [4096], "text")
    if options.tiny:
        return [cell for cell in found if cell["prompts"] != [16384] and cell["asked"] != "separate"]
    if attention != "sdpa":
        found += [found[1] | {"attention": "sdpa"}, found[3] | {"attention": "sdpa"}]
    add("trl dpo", "2B", [16384], "text")
    for size in (8192, 2048):
        add("trl dpo rrpo leanpo", "2B", [size])
    add("rrpo leanpo", "2B", [16384])
    for size in (8192, 2048, 16384):
        add("trl dpo", "7B", [size])
    add("rrpo leanpo", "7B", [4096])
    add("dpo", "2B", [4096], layout="separate")
    return found


def rows(cell: dict, made: models.Shape, tiny: bool) -> list[dict]:
    """The rows of a cell. A picture takes 256 tokens and two marks, the chat five; a dry run has a hundredth."""
    picture, chat, response = (4, 5, 12) if tiny else (256, 5, cell["response"])
    found = []
    for i, prompt in enumerate(cell["prompts"]):
        prompt = max(20, prompt // 100) if tiny else prompt
        images = 1 if cell["method"] == "lpoi" else max(1, (prompt - 2 * chat) // (picture + 2))
        images = 0 if cell["media"] == "text" else images
        words = max(1, prompt - images * (picture + 2) - chat)
        options = {"images": images, "side": made.side, "box": cell["method"] == "lpoi", "seed": i}
        found.append(preference_row(words, response, **options))
    return found


def trainer_options(cell: dict) -> dict:
    """What a cell sets besides the settings of all."""
    layout = {} if cell["method"] == "trl" else {"layout": cell["asked"]}
    return layout | ({"num_images": LPOI_IMAGES} if cell["method"] == "lpoi" else {})


def run(cell: dict, options: Any) -> list[dict]:
    device = options.device
    made = models.whole(cell["model"], options.tiny)
    data = table(rows(cell, made, options.tiny))
    free(device)
    before = held_mib(device)
    model = models.build(made, device, torch.bfloat16 if device == "cuda" else torch.float32, cell["attention"])
    trainer, policy, batch = make_trainer(cell["method"], made, model, data, device, **trainer_options(cell))
    step = training_step(trainer, policy, batch)
    warm_up, repeats = (1, 1) if options.tiny else (2, 5)
    row = {"tokens": _tokens(batch), "layout": "stock" if cell["method"] == "trl" else None}
    row |= timed(step, device, warm_up=warm_up, repeats=repeats)
    if cell["method"] != "trl":
        row["layout"] = trainer.scorer.layout
    held = tree_leaves([dict(batch), list(trainer.optimizer.state.values())])
    tensors = [*policy.parameters(), *policy.buffers(), *(x for x in held if isinstance(x, torch.Tensor))]
    row["peak_mib"] = peak_mib(step, device, tensors) - before
    row["activations_mib"] = row["peak_mib"] - sum(p.nbytes for p in policy.parameters()) / MIB
    if device == "cuda" and cell["prompts"] == [4096]:
        row["kernels"] = attention_kernels(step)
    return [row | ({"left_over_mib": before} if before > 1 else {})]


def _tokens(batch: dict) -> int:
    """How many tokens the method's sequences have, every response behind its own copy of the prompt."""
    if "trunk_mask" in batch:
        return int(batch["trunk_mask"].sum(-1)[batch["branch_trunk"]].sum() + batch["branch_mask"].sum())
    return int(batch["attention_mask"].sum())
