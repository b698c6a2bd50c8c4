"""A micro-batch whose prompts differ much in length: one call of all rows against a call for each row.

`--processes 2` does so on two processes (DDP, gloo) at once, where the slowest of them counts.
"""

import os
import socket
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from datasets import concatenate_datasets
from torch import multiprocessing

from benchmarks import model as bench_model
from benchmarks import step
from benchmarks.common import in_turn, show, summary
from trl_vpo.training.methods import method_classes

COLUMNS = {"method": "method", "processes": "processes", "calls": "calls", "seconds": "seconds (min-max)"}
COLUMNS |= {"ratio_vs_single": "time / one call a row"}


def run(args: Namespace) -> list[dict]:
    rows = []
    for method in args.method.split(","):
        rows += _launched(method, args)
        show(f"prompts of {args.uneven} tokens, {args.device}", rows, COLUMNS)
    return rows


def _launched(method: str, args: Namespace) -> list[dict]:
    if args.processes == 1:
        return _measure(method, args)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        multiprocessing.spawn(_process, (method, args, folder), nprocs=args.processes)
        return torch.load(Path(folder) / "rows.pt")


def _process(rank: int, method: str, args: Namespace, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(args.processes)}
    os.environ |= {"ACCELERATE_USE_CPU": "true"} if args.device == "cpu" else {}
    torch.set_num_threads(1)
    rows = _measure(method, args)
    if rank == 0:
        torch.save(rows, Path(folder) / "rows.pt")


def _measure(method: str, args: Namespace) -> list[dict]:
    data = concatenate_datasets([bench_model.rows(length, args.response) for length in args.uneven])
    config, trainer_class = method_classes(method)
    settings = step.settings(args.device) | {"per_device_train_batch_size": len(data), "layout": "shared"}
    trainer, policy, _ = step.build(trainer_class, config(**settings), data)
    examples = list(trainer.train_dataset)
    calls = {"one": [examples], "each": [[example] for example in examples]}
    batches = {
        name: [trainer._prepare_inputs(trainer.data_collator(rows)) for rows in groups]
        for name, groups in calls.items()
    }

    def step_of(name: str) -> None:
        for batch in batches[name]:
            trainer.training_step(policy, {k: v for k, v in batch.items() if k not in ("layout", "padded")}, None)
        policy.zero_grad(set_to_none=True)

    timed = in_turn({name: lambda name=name: step_of(name) for name in calls}, args.repeats, args.device)
    rows = [
        {"method": method, "processes": args.processes, "calls": len(calls[name]), **summary(seconds)}
        for name, seconds in timed.items()
    ]
    for row in rows:
        row["ratio_vs_single"] = row["seconds"] / rows[-1]["seconds"]
    return rows
