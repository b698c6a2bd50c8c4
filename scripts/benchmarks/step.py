"""A training step: forward and backward of the policy, and the reference pass where the method has one.

The same rows and weights for all. Stock TRL has no videos, so the frames are images. Batches are collated before the
clock starts; LoRA on the language model, gradient checkpointing. The prompts of a batch of several pairs differ in
length, evenly from the given one down to about half of it.
"""

import tempfile
from argparse import Namespace

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig

from benchmarks import model as bench_model
from benchmarks.common import in_turn, memory_of, peak_mib, show, summary

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


def make_rows(prompt: int, response: int, batch: int = 1) -> Dataset:
    """A row for each pair of the batch."""
    lengths = [prompt - i * prompt // (2 * batch) for i in range(batch)]
    return concatenate_datasets([bench_model.rows(length, response) for length in lengths])


def make_step(method: str, layout: str, data: Dataset, response: int, device: str):
    """A function that takes one training step on all rows, and the number of prompt tokens of each row."""
    return make_trainer(method, layout, data, response, device)[1:]


def make_trainer(method: str, layout: str, data: Dataset, response: int, device: str):
    """A trainer, and what `make_step` gives."""
    import trl

    import trl_vpo

    processor = bench_model.processor()
    model = bench_model.model(processor)
    args = settings(tempfile.mkdtemp(), device) | {"per_device_train_batch_size": len(data)}
    if method == "trl":
        config, trainer = trl.DPOConfig, trl.DPOTrainer
    else:
        name = {"dpo": "VisualDPO", "leanpo": "LeanPO", "rrpo": "RRPO"}[method]
        config, trainer = getattr(trl_vpo, f"{name}Config"), getattr(trl_vpo, f"{name}Trainer")
        args |= {"layout": layout, "num_frames": 1024}  # all frames that a clip has
    made = trainer(
        model=model,
        args=config(**args),
        train_dataset=data,
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

    # TRL's first sequences are the chosen ones.
    tokens = batch["attention_mask"].sum(1)[: len(data)] - response if method == "trl" else batch["trunk_mask"].sum(1)
    return made, step, tokens.tolist()


def measure_memory(args: Namespace) -> dict:
    method, layout, prompt = args.contestant.split(":")
    data = make_rows(int(prompt), args.response, args.batch)
    step, _ = make_step(method, layout, data, args.response, args.device)
    return {"peak_mib": peak_mib(step, args.device)}


def run(args: Namespace) -> list[dict]:
    rows = []
    for prompt in args.prompt:
        rows += _at(prompt, args)
        show(f"training step, {args.device}, {torch.get_num_threads()} threads", rows, COLUMNS)
    return rows


def _at(prompt: int, args: Namespace) -> list[dict]:
    contestants = [("trl", "separate"), *((m, lay) for m in args.method.split(",") for lay in LAYOUTS)]
    data = make_rows(prompt, args.response, args.batch)
    steps, prompts = {}, None
    for method, layout in contestants:
        steps[f"{method}:{layout}:{prompt}"], found = make_step(method, layout, data, args.response, args.device)
        prompts = prompts or found
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
