"""Trainers on tiny models, and their rows."""

import copy
import functools
import shutil
from pathlib import Path

import families_newer
import pytest
import torch
from datasets import Dataset
from families import FAMILIES, LANGUAGE_MODEL, build, text_model
from helpers import message, row
from peft import LoraConfig

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.training import methods

METHODS = {method: methods.method_classes(method) for method in methods.METHODS}  # (config, trainer)
QUICK = ("dpo", "leanpo", "rrpo", "lpoi")  # of the default job, where a test goes through many models


def by_speed(cases, quick=QUICK):
    """Return the cases as parameters; those that are not quick are of the slow job."""
    return [pytest.param(case, marks=[pytest.mark.slow] * (case not in quick)) for case in cases]


BY_SPEED = by_speed(METHODS)
TEXT_METHODS = [method for method, (config, _) in METHODS.items() if config.media_form in (None, "pair")]
PAIRS = [  # responses of different lengths, so that every batch is ragged; some words are replaced in each
    ("a red square moves left.", "a blue circle moves left."),
    ("a square.", "two red circles and a blue circle move to the right."),
    ("the red circle moves right and then left again.", "nothing."),
    ("What is in the picture? a red square.", "a blue square."),
    ("a blue circle moves right.", "a red circle moves right, and so does a square."),
    ("left.", "right."),
    ("it moves left, then right, then left.", "a picture."),
    ("blue.", "a circle that is red."),
]
QUIET = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def text_rows(n=8, start=0):
    pairs = [PAIRS[i % len(PAIRS)] for i in range(start, start + n)]
    return [row(None, (), chosen, rejected, id=f"t{start + i}") for i, (chosen, rejected) in enumerate(pairs)]


def image_rows(images, n=4, **more):
    """Rows that every method takes, but for LPOI's box or list."""
    rows = []
    for i, pair in enumerate(PAIRS[:n]):
        image, source = [images[i % len(images)]], Path(images[(i + 1) % len(images)])
        other = [str(shutil.copy(source, source.with_name(f"other-{source.name}")))]  # whatever image a test puts in
        symmetric = {"other_images": other, "other_chosen": message("assistant", PAIRS[i - 1][0])}
        rows.append(row("image", image, *pair, id=f"i{i}", **symmetric | more))
    return rows


def lora(text=False, **more):
    target = r".*\.(q|k|v|o|gate|up|down)_proj" if text else LANGUAGE_MODEL
    return LoraConfig(**{"r": 4, "target_modules": target, **more})


@functools.cache
def _built(name):
    torch.manual_seed(0)
    if name == "text":
        return text_model()
    return build(name) if name in FAMILIES else families_newer.build(name)


def fresh(name="text"):
    """(model, processor): a copy of the same random weights at every call."""
    return copy.deepcopy(_built(name))


def config(method, folder, **more):
    return METHODS[method][0](str(folder), **{**QUIET, **more})


def trainer_of(
    method, folder, rows=None, name="text", model=None, processor=None, peft="new", args=None, proves=False, **more
):
    """A trainer of a tiny model, which is proven where its layout is "auto", or with `proves`.

    `more`: its class (`kind`), its arguments where it knows them, or config fields.
    """
    if model is None:
        model, own = fresh(name)
        processor = processor or own
    elif processor is None:
        processor = fresh(name)[1]
    kind = more.pop("kind", METHODS[method][1])
    init = {k: more.pop(k) for k in INIT if k in more}
    if peft == "new":
        init["peft_config"] = lora(text=name == "text")
    data = Dataset.from_list(rows or text_rows()) if not hasattr(rows, "map") else rows
    args = args or config(method, folder, **more)
    trainer = kind(model, args=args, train_dataset=data, processing_class=processor, **init)
    if args.layout != "auto" and not proves:
        take_for_proven(trainer)
    return trainer


def take_for_proven(trainer):
    """Spare a trainer the proof of its model, whose calls tests would count, and the time."""
    trainer.scorer.to_prove.clear()
    trainer.scorer.packs = trainer.scorer.packs is not False
    if isinstance(trainer.data_collator, PreferenceCollator):
        trainer.data_collator.proven = None


INIT = ("eval_dataset", "ref_model", "data_collator", "compute_metrics", "callbacks", "optimizers", "peft_config")


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shake(model, seed=1, scale=0.05):
    """Move the trainable weights (a new LoRA is the identity) so that policy and reference differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p))


def draw_lora(model, std):
    """Draw the weights of a new LoRA that are zero, the same at each call."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)


def collated(trainer, n=None):
    """The first n rows of the training set as one batch."""
    n = n or len(trainer.train_dataset)
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(n)]))
