"""Numbers out of a trainer's `state.log_history`: series of a metric, displacement, smoothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

History = Sequence[Mapping[str, Any]]
Series = tuple[list[int], list[float]]  # optimizer steps and values
SMOOTHED_FROM = 40  # logged points; fewer are drawn as they are


def series(history: History, key: str) -> Series:
    """Steps and values of one metric in a trainer's `state.log_history`.

    Entries without it are skipped, and the summary at the end, whose averages are over whatever steps were left.
    Values that are not finite are kept: `finite` leaves them out.
    """
    points = [(entry["step"], entry[key]) for entry in history if key in entry and "train_runtime" not in entry]
    return [step for step, _ in points], [float(value) for _, value in points]


def finite(found: Series) -> Series:
    """The points that can be drawn."""
    points = [(step, value) for step, value in zip(*found) if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def displacement(history: History, side: str, *, prefix: str = "") -> Series:
    """How far the log-prob of a side has moved, in nats per response.

    From `displacement/*`, against the reference on the same rows, where the run logged that. Otherwise `logps/*` minus
    its first value: the mean of the first logging window, or the evaluation before the first step. Without such an
    evaluation there is nothing to compare evaluations with, and none are given.

    Args:
        history: a run's log.
        side: chosen or rejected.
        prefix: of an evaluation set's metrics, such as `eval_`; nothing for training.
    """
    if has_displacement(history):
        return series(history, f"{prefix}displacement/{side}")
    steps, values = series(history, f"{prefix}logps/{side}")
    if not steps or (prefix and steps[0] != 0):
        return [], []
    return steps, [value - values[0] for value in values]


def smooth(found: Series, half_life: float) -> Series:
    """An exponentially weighted mean of the values so far: a value's weight halves every `half_life` steps."""
    steps, values = found
    total = weight = 0.0
    means = []
    for index, value in enumerate(values):
        decay = 0.5 ** ((steps[index] - steps[index - 1]) / half_life) if index else 0.0
        total, weight = total * decay + value, weight * decay + 1.0
        means.append(total / weight)
    return steps, means


def default_half_life(runs: Mapping[str, History]) -> int:
    """A fortieth of the longest run, in steps; 0, which is no smoothing, where few points were logged."""
    logged = [series(history, "loss")[0] for history in runs.values()]
    if max(map(len, logged)) <= SMOOTHED_FROM:
        return 0
    return max(1, round(max(steps[-1] for steps in logged if steps) / SMOOTHED_FROM))


def eval_prefixes(history: History) -> list[str]:
    """`eval_`, or `eval_NAME_` for each of several evaluation sets, in the order of the log."""
    keys = dict.fromkeys(key for entry in history for key in entry)
    return [key.removesuffix("loss") for key in keys if key.startswith("eval_") and key.endswith("_loss")]


def has_displacement(history: History) -> bool:
    """Whether the run compared itself with a reference; LeanPO has none."""
    return any("displacement/chosen" in entry for entry in history)
