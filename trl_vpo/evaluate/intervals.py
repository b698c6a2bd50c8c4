"""Bootstrap confidence intervals for rows that come in clusters, such as the questions about one video.

Rows of one video resemble each other. Drawing single rows takes them for independent ones and gives intervals that are
too narrow, so whole clusters are drawn with replacement: the cluster bootstrap (Field & Welsh, "Bootstrapping
clustered data", J. R. Statist. Soc. B 69, 2007), with percentile limits (Efron & Tibshirani, "An Introduction to the
Bootstrap", 1993, chapter 13).

What it cannot do: with few clusters (below about 20) the intervals are somewhat too narrow, and where every row has
the same value (0 of N) the interval has no width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_DRAWS_AT_ONCE = 1 << 22  # cluster numbers held in memory at one time


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def clustered_bootstrap(
    values: Any, clusters: Sequence, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return a mean, or a ratio of sums, over N rows with its confidence interval.

    Args:
        values: (N,) for a mean; (N, 2) for a ratio, numerators and denominators: sum of the first over sum of the
            second, as in CHAIRi, where rows count by their denominators.
        clusters: (N,) what each row belongs to, such as its video; any hashable values but None.
        level: of the interval, above 0 and below 1.
        resamples: how many times the clusters are drawn. Draws whose denominators sum to 0 are left out.
        seed: the same seed and clusters give the same draws, whatever the values.

    Returns:
        value, low, high. With fewer than two clusters the limits are nan: nothing is known about other clusters.
        Without rows, or with denominators that sum to 0, all three are nan.

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, a cluster that is None, bad settings.
    """
    totals, draws = _resample(_columns(values), clusters, level, resamples, seed)
    return _interval(_quotient(totals), _quotient(draws), level)


def paired_difference(
    first: Any, second: Any, clusters: Sequence, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return `second` minus `first`, two models on the same N rows, with its interval.

    Both models see the same draws, so what makes a video hard for both cancels. Arguments, limits and errors are
    those of `clustered_bootstrap`; row i of `first` and of `second` must be the same question.
    """
    first, second = _columns(first), _columns(second)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} rows against {len(second)}: a paired difference needs the same rows.")
    totals, draws = _resample(np.concatenate([first, second], axis=1), clusters, level, resamples, seed)
    value = _quotient(totals[2:]) - _quotient(totals[:2])
    return _interval(value, _quotient(draws[:, 2:]) - _quotient(draws[:, :2]), level)


def _columns(values: Any) -> np.ndarray:
    """(N, 2): numerators and denominators; those of a mean are 1."""
    columns = np.asarray(values, dtype=np.float64)
    if columns.ndim == 1:
        columns = np.stack([columns, np.ones_like(columns)], axis=1)
    if columns.ndim != 2 or columns.shape[1] != 2:
        raise ValueError(f"values have the shape {columns.shape}: a mean needs (N,), a ratio (N, 2).")
    bad = np.flatnonzero(~np.isfinite(columns).all(axis=1))
    if len(bad):
        raise ValueError(f"row {bad[0]} holds {columns[bad[0]].tolist()}: values must be finite. Leave such rows out.")
    return columns


def _resample(
    columns: np.ndarray, clusters: Sequence, level: float, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The columns' sums over all rows (K,), and over each draw of clusters (resamples, K)."""
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level}, resamples {resamples}: give a level in (0, 1) and at least 1 resample.")
    if len(clusters) != len(columns):
        raise ValueError(f"{len(columns)} rows but {len(clusters)} clusters: give one cluster for each row.")
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    if None in numbers:
        raise ValueError("the cluster of a row is None: give the row's own id where it has no video.")
    count, totals = len(numbers), columns.sum(axis=0)
    if count < 2:
        return totals, np.full((1, columns.shape[1]), math.nan)
    sums = np.zeros((count, columns.shape[1]))
    np.add.at(sums, [numbers[cluster] for cluster in clusters], columns)
    random, step = np.random.default_rng(seed), max(1, _DRAWS_AT_ONCE // count)
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    draws = [sums[random.integers(count, size=(size, count))].sum(axis=1) for size in sizes]
    return totals, np.concatenate(draws)


def _quotient(sums: np.ndarray) -> np.ndarray:
    """(..., 2) -> (...): nan where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] != 0, sums[..., 0] / sums[..., 1], math.nan)


def _interval(value: np.ndarray, draws: np.ndarray, level: float) -> Interval:
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) if len(draws) else (math.nan, math.nan)
    return Interval(float(value), float(low), float(high))
