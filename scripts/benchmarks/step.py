"""A training step: forward and backward of the policy, and the reference pass where the method has one.

The same rows and weights for all. Stock TRL has no videos, so the frames are images. Batches are collated before the
clock starts; LoRA on the language model, gradient checkpointing, one pair a step.
"""

import tempfile
from argparse import Namespace

import torch
from datasets import Dataset
from peft import LoraConfig

from benchmarks import model as bench_model
from benchmarks.common import in_turn, memory_of, peak_mib, show, summary

LAYOUTS = ("shared", "separate")
COLUMNS = {
    "method": "method",
    "layout": "layout",
    "prompt": "prompt",
    "response": "response",
    "seconds": "seconds (min-max)",
    "peak_mib": "peak MiB",
    "ratio_vs_trl": "TRL / this",
    "memory_vs_trl": "memory / TRL's",
    "ideal_ratio": "token ideal",
    "share_of_ideal": "share of ideal",
}


def settings(folder: str, device: str) -> dict:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 1,
        "max_length": None,
        "gradient_checkpointing": True,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
    }


def make_step(method: str, layout: str, prompt: int, response: int, device: str, data: Dataset | None = None):
    """A function that takes one training step, and the numbers of prompt and response tokens of its row."""
    return make_trainer(method, layout, prompt, response, device, data)[1:]


def make_trainer(method: str, layout: str, prompt: int, response: int, device: str, data: Dataset | None = None):
    """A trainer, and what `make_step` gives."""
    import trl

    import trl_vpo

    processor = bench_model.processor()
    model = bench_model.model(processor)
    args = settings(tempfile.mkdtemp(), device)
    if method == "trl":
        config, trainer = trl.DPOConfig, trl.DPOTrainer
    else:
        name = {"dpo": "VisualDPO", "leanpo": "LeanPO", "rrpo": "RRPO"}[method]
        config, trainer = getattr(trl_vpo, f"{name}Config"), getattr(trl_vpo, f"{name}Trainer")
        args |= {"layout": layout, "num_frames": 1024}  # all frames that a clip has
    made = trainer(
        model=model,
        args=config(**args),
        train_dataset=data or bench_model.rows(prompt, response),
        processing_class=processor,
        peft_config=LoraConfig(r=16, target_modules=bench_model.LANGUAGE_MODEL),
    )
    made.current_gradient_accumulation_steps = 1  # what `train` would set
    made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = made.accelerator.prepare_model(made.model)
    batch = next(iter(made.get_train_dataloader()))

    def step() -> None:
        inputs = dict(batch)
        inputs.pop("layouts", None)
        made.training_step(policy, inputs, None)
        policy.zero_grad(set_to_none=True)

    tokens = batch["input_ids"].size(1) - response if method == "trl" else int(batch["trunk_mask"][0].sum())
    return made, step, (tokens, response)


def measure_memory(args: Namespace) -> dict:
    method, layout, prompt = args.contestant.split(":")
    step, _ = make_step(method, layout, int(prompt), args.response, args.device)
    return {"peak_mib": peak_mib(step, args.device)}


def run(args: Namespace) -> list[dict]:
    rows = []
    for prompt in args.prompt:
        rows += _at(prompt, args)
        show(f"training step, {args.device}, {torch.get_num_threads()} threads", rows, COLUMNS)
    return rows


def _at(prompt: int, args: Namespace) -> list[dict]:
    contestants = [("trl", "separate"), *((m, lay) for m in args.method.split(",") for lay in LAYOUTS)]
    steps, sizes = {}, None
    for method, layout in contestants:
        steps[f"{method}:{layout}:{prompt}"], size = make_step(method, layout, prompt, args.response, args.device)
        sizes = sizes or size
    timed = in_turn(steps, args.repeats, args.device)
    tokens, response = sizes
    ideal = 2 * (tokens + response) / (tokens + 2 * response)
    rows = []
    for name, seconds in timed.items():
        method, layout, _ = name.split(":")
        row = {"method": method, "layout": layout, "prompt": tokens, "response": response, **summary(seconds)}
        rows.append(row | memory_of(args, name))
    for row in rows:
        row["ratio_vs_trl"] = rows[0]["seconds"] / row["seconds"]
        row["memory_vs_trl"] = row["peak_mib"] / rows[0]["peak_mib"]
        if row["layout"] == "shared":
            row["ideal_ratio"] = ideal
            row["share_of_ideal"] = row["ratio_vs_trl"] / ideal
    return rows
