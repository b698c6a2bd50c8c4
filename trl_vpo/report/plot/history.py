"""Numbers from a trainer's `state.log_history`: series of a metric, smoothing."""

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
