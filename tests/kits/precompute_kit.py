"""Trainers that precompute the reference's log-probs, and those that compute them on the fly."""

import json

import torch
from trainer_kit import trainer_of

AHEAD = {"precompute_ref_log_probs": True}


def ahead(method, folder, rows=None, cache="cache", **more):
    """A trainer that precomputes, into a folder that outlives it."""
    torch.manual_seed(0)  # a new adapter is random
    where = {"precompute_cache_dir": str(folder / cache)}
    return trainer_of(method, folder / "run", rows, **{**AHEAD, **where, **more})


def on_the_fly(method, folder, rows=None, **more):
    torch.manual_seed(0)
    return trainer_of(method, folder / "plain", rows, **more)


def lines(folder):
    """The entries of a cache: one for each row that was computed."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
