"""Numbers from a trainer's `state.log_history`: series of a metric, displacement, smoothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

History = Sequence[Mapping[str, Any]]
Series = tuple[list[int], list[float]]  # optimizer steps and values
SMOOTHED_FROM = 40  # logged points; fewer are drawn as they are


def series(history: History, key: str) -> Series:
    """Return the steps and values of one metric.

    Entries without it are skipped. So is the summary at the end, whose averages are over whatever steps were left,
    unless the training ended before its first logging step. Values that are not finite are kept: `finite` leaves
    them out.
    """
    entries = [entry for entry in history if key in entry]
    windows = [entry for entry in entries if "train_runtime" not in entry] or entries
    points = [(entry["step"], entry[key]) for entry in windows]
    return [step for step, _ in points], [float(value) for _, value in points]


def finite(values: Series) -> Series:
    """Return the points that can be drawn."""
    points = [(step, value) for step, value in zip(*values) if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def displacement(history: History, side: str, *, prefix: str = "") -> Series:
    """Return the change of a side's log-prob, in nats per response.

    It is `displacement/*`, against the reference on the same rows, if the run logged that. Otherwise it is `logps/*`
    minus its first value: the mean of the first logging window, or the evaluation before the first step. Without such
    an evaluation there is nothing to compare evaluations with, and the series is empty. `prefix` is that of an
    evaluation set's metrics, such as `eval_`; empty for training.
    """
    if has_displacement(history):
        return series(history, f"{prefix}displacement/{side}")
    steps, values = series(history, f"{prefix}logps/{side}")
    if not steps or (prefix and steps[0] != 0):
        return [], []
    return steps, [value - values[0] for value in values]


def smooth(values: Series, half_life: float) -> Series:
    """Return the exponentially weighted mean of the values so far; a weight halves every `half_life` steps."""
    total = weight = 0.0
    means = []
    before = None
    for step, value in zip(*values):
        decay = 0.0 if before is None else 0.5 ** ((step - before) / half_life)
        total, weight, before = total * decay + value, weight * decay + 1.0, step
        means.append(total / weight)
    return values[0], means


def default_half_life(runs: Mapping[str, History]) -> int:
    """Return a fortieth of the longest run, in steps; 0, which is no smoothing, if few points were logged."""
    logged = [series(history, "loss")[0] for history in runs.values()]
    if max(map(len, logged)) <= SMOOTHED_FROM:
        return 0
    return max(1, round(max(steps[-1] for steps in logged if steps) / SMOOTHED_FROM))


def eval_prefixes(history: History) -> list[str]:
    """Return `eval_`, or `eval_NAME_` for each of several evaluation sets, in the order of the log."""
    keys = dict.fromkeys(key for entry in history for key in entry)
    return [key.removesuffix("loss") for key in keys if key.startswith("eval_") and key.endswith("_loss")]


def has_displacement(history: History) -> bool:
    """Return True if the run compared itself with a reference; LeanPO has none."""
    return any("displacement/chosen" in entry for entry in history)
