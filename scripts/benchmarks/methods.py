"""A training step of each method against DPO's, on the same row: one image with a box, and two responses.

Timed on a CPU is what the process used of it, on a GPU what went by: other work on the machine then counts little.
The vocabulary is as small as the model is: the head, which the exact KL of RRPO, TDPO and DPA passes again, has 7 % of
the weights, as in a 7B model.
"""

import statistics
import time
from argparse import Namespace

import torch

from benchmarks import model as bench_model
from benchmarks.common import in_turn, show, summary
from benchmarks.step import build, settings
from trl_vpo.training.methods import METHODS, method_classes

COLUMNS = {
    "method": "method",
    "prompt": "prompt",
    "response": "response",
    "seconds": "seconds (min-max)",
    "time_vs_dpo": "time / DPO's",
}


def make(method: str, prompt: int, args: Namespace):
    """Return a function that takes one step."""
    config, trainer_class = method_classes(method)
    data = bench_model.rows(prompt, args.response, box=True)
    trainer, policy, batch = build(trainer_class, config(**settings(args.device)), data)

    def step() -> None:
        trainer.training_step(policy, {key: value for key, value in batch.items() if key != "layout"}, None)
        policy.zero_grad(set_to_none=True)

    return step


def run(args: Namespace) -> list[dict]:
    rows = []
    for prompt in args.prompt:
        first = len(rows)
        steps = {method: make(method, prompt, args) for method in METHODS}
        clock = time.process_time if args.device == "cpu" else time.perf_counter
        timed = in_turn(steps, args.repeats, args.device, clock)
        for method, seconds in timed.items():
            rows.append({"method": method, "prompt": prompt, "response": args.response, **summary(seconds)})
        for row in rows[first:]:
            pairs = zip(timed[row["method"]], timed["dpo"])
            row["time_vs_dpo"] = statistics.median(own / dpo for own, dpo in pairs)  # of the same round
        show(f"training step, {args.device}, {torch.get_num_threads()} threads", rows, COLUMNS)
    return rows
