"""LPOI's step for lists of 2, 5 and 9 images, against the official scheme.

The official code writes every response out behind its own copy of prompt and image: N for the list, and again the
chosen and the rejected response on the clean image for its DPO term, N + 2 sequences for the policy and as many for
the reference. Here it is run by the same model code: those sequences in one separate call each.

`precomputed` is the shared layout with `precompute_ref_log_probs`: a step as it is in every epoch, without the one
pass of the reference over all rows that came before.
"""

import tempfile
from argparse import Namespace

import torch
from peft import LoraConfig

from benchmarks import model as bench_model
from benchmarks.common import in_turn, memory_of, peak_mib, show, summary
from benchmarks.step import settings

SCHEMES = ("official", "separate", "shared", "precomputed")
COLUMNS = {
    "method": "scheme",
    "images": "N",
    "prompt": "prompt",
    "response": "response",
    "seconds": "seconds (min-max)",
    "peak_mib": "peak MiB",
    "ratio_vs_official": "official / this",
    "time_vs_official": "this / official",
}


def make(method: str, images: int, args: Namespace):
    import trl_vpo
    from trl_vpo.losses import lpoi_loss

    processor = bench_model.processor()
    more = settings(tempfile.mkdtemp(), args.device)
    more["precompute_ref_log_probs"] = method == "precomputed"
    layout = "shared" if method in ("shared", "precomputed") else "separate"
    trainer = trl_vpo.LPOITrainer(
        model=bench_model.model(processor),
        args=trl_vpo.LPOIConfig(**more, num_images=images, layout=layout),
        train_dataset=bench_model.rows(280, args.response, box=True),
        processing_class=processor,
        peft_config=LoraConfig(r=16, target_modules=bench_model.LANGUAGE_MODEL),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.accelerator.prepare_model(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    prompt = int(batch["trunk_mask"][0].sum())

    def ours() -> None:
        trainer.training_step(trainer.model, {k: v for k, v in batch.items() if k != "layouts"}, None)
        trainer.model.zero_grad(set_to_none=True)

    # The list, then the pair again: branches 0, 2 .. N, and 0, 1.
    order = torch.tensor([0, *range(2, images + 1), 0, 1], device=batch["branch_trunk"].device)
    doubled = batch | {k: batch[k][order] for k in ("branch_ids", "branch_mask", "branch_trunk")}
    doubled |= {"chosen": torch.tensor([images]), "rejected": torch.tensor([images + 1])}

    def official() -> None:
        trainer.model.train()
        reference = trainer.reference_scores(dict(doubled))  # outside of a step: keeps no vision features
        scores = trainer.concatenated_forward(trainer.model, dict(doubled))
        ratios = scores.sums - reference.sums
        loss = lpoi_loss(ratios[None, :images], ratios[images + 1 :], beta=0.1).losses.mean()
        trainer.accelerator.backward(loss)
        trainer.model.zero_grad(set_to_none=True)

    return (official if method == "official" else ours), prompt


def measure_memory(args: Namespace) -> dict:
    method, images = args.contestant.split(":")
    return {"peak_mib": peak_mib(make(method, int(images), args)[0], args.device)}


def run(args: Namespace) -> list[dict]:
    rows = []
    for images in args.lists:
        made = {m: make(m, images, args) for m in SCHEMES}
        timed = in_turn({m: step for m, (step, _) in made.items()}, args.repeats, args.device)
        group = [
            {"method": m, "images": images, "prompt": made[m][1], "response": args.response, **summary(s)}
            | memory_of(args, f"{m}:{images}")
            for m, s in timed.items()
        ]
        for row in group:
            row["ratio_vs_official"] = group[0]["seconds"] / row["seconds"]
            row["time_vs_official"] = row["seconds"] / group[0]["seconds"]
        rows += group
    show(f"LPOI step, {args.device}, {torch.get_num_threads()} threads", rows, COLUMNS)
    return rows
