"""A training step: forward and backward of the policy, and the reference pass where the method has one.

The same rows and weights for all. Stock TRL has no videos, so the frames are images. Batches are collated before the
clock starts; LoRA on the language model, gradient checkpointing. The prompts of a batch of several pairs differ in
length, evenly from the given one down to about half of it.
"""

import tempfile
from argparse import Namespace

import torch
import trl
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig

from benchmarks import model as bench_model
from benchmarks.common import in_turn, memory_of, peak_mib, show, summary
from trl_vpo.training.methods import method_classes

LAYOUTS = ("shared", "separate")
COLUMNS = {
    "method": "method",
    "layout": "layout",
    "prompt": "prompt",
    "response": "response",
    "batch": "pairs",
    "seconds": "seconds (min-max)",
    "peak_mib": "peak MiB",
    "ratio_vs_trl": "TRL / this",
    "memory_vs_trl": "memory / TRL's",
    "ideal_ratio": "token ideal",
    "share_of_ideal": "share of ideal",
}


def settings(device: str) -> dict:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 1,
        "max_length": None,
        "gradient_checkpointing": True,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
    }


def make_rows(prompt: int, response: int, batch: int = 1) -> Dataset:
    """A row for each pair of the batch."""
    lengths = [prompt - i * prompt // (2 * batch) for i in range(batch)]
    return concatenate_datasets([bench_model.rows(length, response) for length in lengths])


def build(trainer_class: type, args: object, data: Dataset):
    """(trainer, policy, batch) for single steps on all rows, as `train` would set them up."""
    processor = bench_model.processor()
    trainer = trainer_class(
        model=bench_model.model(processor),
        args=args,
        train_dataset=data,
        processing_class=processor,
        peft_config=LoraConfig(r=16, target_modules=bench_model.LANGUAGE_MODEL),
    )
    trainer.current_gradient_accumulation_steps = 1
    if trainer.args.gradient_checkpointing:
        options = dict(trainer.args.gradient_checkpointing_kwargs or {})
        more = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        trainer.model.activation_checkpointing_enable(options or None, **more)
    policy = trainer.accelerator.prepare_model(trainer.model)
    return trainer, policy, next(iter(trainer.get_train_dataloader()))


def make_trainer(method: str, layout: str, data: Dataset, response: int, device: str, **options: object):
    """(trainer, a function that takes one training step on all rows, the number of prompt tokens of each row)."""
    args = settings(device) | {"per_device_train_batch_size": len(data)} | options
    config, trainer_class = (trl.DPOConfig, trl.DPOTrainer) if method == "trl" else method_classes(method)
    if method != "trl":
        args |= {"layout": layout, "num_frames": 1024}  # all frames that a clip has
    trainer, policy, batch = build(trainer_class, config(**args), data)

    def step() -> None:
        trainer.training_step(policy, {key: value for key, value in batch.items() if key != "layout"}, None)
        policy.zero_grad(set_to_none=True)

    # TRL's first sequences are the chosen ones.
    tokens = batch["attention_mask"].sum(1)[: len(data)] - response if method == "trl" else batch["trunk_mask"].sum(1)
    return trainer, step, tokens.tolist()


def measure_memory(args: Namespace) -> dict:
    method, layout, prompt = args.candidate.split(":")
    data = make_rows(int(prompt), args.response, args.batch)
    _, step, _ = make_trainer(method, layout, data, args.response, args.device)
    return {"peak_mib": peak_mib(step, args.device)}


def run(args: Namespace) -> list[dict]:
    rows = []
    for prompt in args.prompt:
        rows += _at(prompt, args)
        show(f"training step, {args.device}, {torch.get_num_threads()} threads", rows, COLUMNS)
    return rows


def _at(prompt: int, args: Namespace) -> list[dict]:
    candidates = [("trl", "separate"), *((m, lay) for m in args.method.split(",") for lay in LAYOUTS)]
    data = make_rows(prompt, args.response, args.batch)
    steps, prompts = {}, []
    for method, layout in candidates:
        _, step, tokens = make_trainer(method, layout, data, args.response, args.device)
        steps[f"{method}:{layout}:{prompt}"], prompts = step, prompts or tokens
    timed = in_turn(steps, args.repeats, args.device)
    ideal = 2 * sum(p + args.response for p in prompts) / sum(p + 2 * args.response for p in prompts)
    sizes = {"prompt": max(prompts), "response": args.response, "batch": args.batch}
    rows = []
    for name, seconds in timed.items():
        method, layout, _ = name.split(":")
        row = {"method": method, "layout": layout, **sizes, **summary(seconds)}
        rows.append(row | memory_of(args, name, batch=args.batch))
    for row in rows:
        row["ratio_vs_trl"] = rows[0]["seconds"] / row["seconds"]
        row["memory_vs_trl"] = row["peak_mib"] / rows[0]["peak_mib"]
        if row["layout"] == "shared":
            row["ideal_ratio"] = ideal
            row["share_of_ideal"] = row["ratio_vs_trl"] / ideal
    return rows
