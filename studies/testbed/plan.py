"""The plan of the comparison: methods, rates, checkpoints and seeds. No torch in here.

A run is one training; it is measured at several checkpoints, and each of them is a cell: a row of the results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from studies.results import KEYS

TEST_SEED, TRAIN_SEED = 902, 1000  # of the world's draws; a run's own seed is added to the latter
ROWS, BATCH, TEST = 320, 16, 64  # training pairs, pairs of a step, held-out samples
RATES = (3e-4, 1e-3, 3e-3)
STEPS = (60, 120, 240)
MOST_SEEDS = 2**31


@dataclass(frozen=True)
class Method:
    """A method as it is trained here: a recipe of `recipes/quickstart/`, and what differs from it."""

    name: str
    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False  # the phrases are the whole responses
    boxed: bool = False  # its rows of clips have boxes


METHODS = {
    "dpo": Method("DPO", "dpo"),
    "simpo": Method("SimPO", "simpo"),
    "leanpo": Method("LeanPO", "leanpo"),
    "rrpo": Method("RRPO", "rrpo"),
}
CONTROLS = {
    "sft": Method("SFT", "dpo", {"loss_type": ["sft"]}),
    "dpo_nll": Method("DPO + NLL", "dpo", {"loss_type": ["sigmoid", "sft"]}),
    "dpop": Method("DPOP", "dpo", {"loss_type": ["dpop"]}),
    "simpo_nll": Method("SimPO + NLL", "simpo", {"nll_weight": 0.5}),
    "dpo_kl": Method("DPO + KL (RRPO without phrases)", "rrpo", whole=True),
    "rrpo_no_kl": Method("RRPO without KL", "rrpo", {"alpha": 0}),
    "tdpo": Method("TDPO", "tdpo"),
    "ddpo": Method("DDPO", "ddpo"),
    "dpa": Method("DPA", "dpa"),
}
ON_SCENES = {
    "mdpo": Method("mDPO", "mdpo"),
    **{f"lpoi_{count}": Method(f"LPOI, {count} images", "lpoi", {"num_images": count}) for count in (2, 3, 5, 9)},
    "lpoi_5_plain": Method("LPOI, 5 images without ellipse", "lpoi", {"num_images": 5, "visual_prompt": False}),
}
ON_CLIPS = {"lpoi_clip": Method("LPOI, 5 clips", "lpoi", {"num_images": 5, "num_frames": 8}, boxed=True)}
ALL = METHODS | CONTROLS | ON_SCENES | ON_CLIPS


@dataclass(frozen=True)
class Run:
    """One training. Its cells are its checkpoints at `steps`; the base, untrained, has one at 0 steps."""

    method: str
    pairs: str
    rate: float
    seed: int
    steps: tuple[int, ...] = STEPS

    @property
    def kind(self) -> str:
        return kind_of(self.pairs)

    def cells(self) -> list[tuple]:
        return [(self.method, self.pairs, self.rate, steps, self.seed) for steps in self.steps]


def kind_of(pairs: str) -> str:
    """Return of what samples such pairs are: clips or scenes."""
    return "scene" if pairs == "scenes" else "clip"


BASE_RUN = Run("base", "near", 0.0, 0, (0,))
BASE_ON_SCENES = Run("base", "scenes", 0.0, 0, (0,))


def main_runs(rates: Sequence[float] = RATES, seeds: Sequence[int] = (0, 1, 2)) -> list[Run]:
    """The four methods at all rates, on near-duplicate pairs; seeds outermost, so that half a study is one seed."""
    return [BASE_RUN, *(Run(m, "near", rate, seed) for seed in seeds for rate in rates for m in METHODS)]


def full_runs() -> list[Run]:
    """Also the controls, other kinds of pairs, scenes, and pairs that the base makes, at the middle rate, two seeds.

    Seeds are outermost, and of a seed the cheapest runs are first.
    """
    runs = [*main_runs(), BASE_ON_SCENES]
    for seed in (0, 1):
        asked = [(method, "scenes") for method in ("dpo", *ON_SCENES)]
        asked += [(method, "near") for method in CONTROLS]
        asked += [(method, pairs) for pairs in ("wording", "flip20", "flip40", "policy") for method in METHODS]
        asked += [(method, pairs) for pairs in ("made", "made_again") for method in ("leanpo", "rrpo")]
        asked += [(method, "near") for method in ON_CLIPS]
        runs += [Run(method, pairs, RATES[1], seed) for method, pairs in asked]
    return runs


def quick_runs() -> list[Run]:
    """One seed, at the rate and the steps where the methods are furthest apart."""
    return [BASE_RUN, *(Run(method, "near", RATES[-1], 0, (120,)) for method in METHODS)]


DIRECTIONS = (  # of the quick runs: a measure, the method that has less of it, and the one that has more
    ("chosen_change_right", "dpo", "leanpo"),
    ("chosen_change_right", "simpo", "leanpo"),
    ("fell_right", "leanpo", "simpo"),
    ("kl", "rrpo", "dpo"),
    *(("false_mass", method, "base") for method in METHODS),
    *(("accuracy", "base", method) for method in METHODS),
)


def why_not(run: Run) -> str:
    """Return why there is no such run: a method has kinds of pairs, the base no rate and no steps; else nothing."""
    on = sorted({one.pairs for one in full_runs() if one.method == run.method})
    if run.pairs not in on:
        return f"{run.method} is not run on {run.pairs} pairs, but on {', '.join(on)}."
    if wrong := [steps for steps in run.steps if (steps == 0) != (run.method == "base") or steps < 0]:
        return f"{wrong[0]} steps: " + ("the base has 0." if run.method == "base" else "give 1 or more.")
    if not (run.rate == 0 if run.method == "base" else 0 < run.rate < math.inf):
        return f"rate {run.rate:g}: " + ("the base has 0." if run.method == "base" else "give a number above 0.")
    if not 0 <= run.seed < MOST_SEEDS:
        return f"seed {run.seed}: give a whole number from 0 to {MOST_SEEDS - 1}."
    return ""


def not_planned(cell: Sequence[Any]) -> str:
    """Return what of a cell is in no run of the plan, by its keys; nothing of one that is planned."""
    planned = [own for run in full_runs() for own in run.cells()]
    known = zip(KEYS, cell, zip(*planned), strict=True)
    strange = ", ".join(f"{key} {value!r}" for key, value, values in known if value not in values)
    return strange or ("" if tuple(cell) in planned else "which has these values in other cells")


def missing(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> list[Run]:
    """Return the runs of which a cell has no row, or one that other machines may not make again."""
    there = {tuple(row[key] for key in KEYS) for row in rows if row.get("arithmetic") != "unknown"}
    return [run for run in runs if not there.issuperset(run.cells())]
