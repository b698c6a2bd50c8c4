"""LPOI's step for lists of 2, 5 and 9 images, against the official scheme.

The official code writes every response out behind its own copy of prompt and image: N for the list, and again the
chosen and the rejected response on the clean image for its DPO term, N + 2 sequences for the policy and as many for
the reference. Here it is run by the same model code: those sequences in one separate call each.

`precomputed` is the shared layout with `precompute_ref_log_probs`: a step as it is in every epoch, without the one
pass of the reference over all rows that came before.
"""

from argparse import Namespace

import torch

from benchmarks import model as bench_model
from benchmarks.common import in_turn, memory_of, peak_mib, show, summary
from benchmarks.step import build, settings
from trl_vpo import LPOIConfig, LPOITrainer
from trl_vpo.losses import lpoi_loss

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
    """(a function that takes one step, the number of tokens in its prompt)."""
    more = settings(args.device) | {"precompute_ref_log_probs": method == "precomputed"}
    layout = "shared" if method in ("shared", "precomputed") else "separate"
    config = LPOIConfig(**more, num_images=images, layout=layout)
    trainer, policy, batch = build(LPOITrainer, config, bench_model.rows(280, args.response, box=True))

    def ours() -> None:
        trainer.training_step(policy, {k: v for k, v in batch.items() if k != "layout"}, None)
        policy.zero_grad(set_to_none=True)

    # The list, then the pair again: branches 0, 2 .. N, and 0, 1.
    order = torch.tensor([0, *range(2, images + 1), 0, 1], device=batch["branch_trunk"].device)
    doubled = batch | {k: batch[k][order] for k in ("branch_ids", "branch_mask", "branch_trunk")}
    doubled |= {"chosen": torch.tensor([images]), "rejected": torch.tensor([images + 1])}

    def official() -> None:
        policy.train()
        reference = trainer.reference_scores(dict(doubled))  # outside of a step: keeps no vision features
        scores = trainer.concatenated_forward(policy, dict(doubled))
        ratios = scores.sums - reference.sums
        loss = lpoi_loss(ratios[None, :images], ratios[images + 1 :], beta=0.1).losses.mean()
        trainer.accelerator.backward(loss)
        policy.zero_grad(set_to_none=True)

    return (official if method == "official" else ours), int(batch["trunk_mask"][0].sum())


def measure_memory(args: Namespace) -> dict:
    method, images = args.candidate.split(":")
    return {"peak_mib": peak_mib(make(method, int(images), args)[0], args.device)}


def run(args: Namespace) -> list[dict]:
    rows = []
    for images in args.lists:
        steps, prompts = {}, {}
        for method in SCHEMES:
            steps[method], prompts[method] = make(method, images, args)
        group = []
        for method, seconds in in_turn(steps, args.repeats, args.device).items():
            row = {"method": method, "images": images, "prompt": prompts[method], "response": args.response}
            group.append(row | summary(seconds) | memory_of(args, f"{method}:{images}"))
        for row in group:
            row["ratio_vs_official"] = group[0]["seconds"] / row["seconds"]
            row["time_vs_official"] = row["seconds"] / group[0]["seconds"]
        rows += group
    show(f"LPOI step, {args.device}, {torch.get_num_threads()} threads", rows, COLUMNS)
    return rows
