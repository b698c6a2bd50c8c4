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
    """A figure with its confidence limits (nan where undefined) and n, the number of rows that it rests on."""

    value: float
    low: float
    high: float
    n: int


def clustered_bootstrap(
    values: Any, clusters: Sequence, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return a mean, or a ratio of sums, over N rows with its confidence interval.

    Args:
        values: (N,) for a mean; (N, 2) for a ratio, numerators and denominators: sum of the first over sum of the
            second, as in CHAIRi, where rows count by their denominators. All are finite, or it is a ValueError.
        clusters: (N,) what each row belongs to, such as its video; any hashable values.
        resamples: how many times the clusters are drawn. Draws whose denominators sum to 0 are left out.
        seed: the same seed and clusters give the same draws, whatever the values.

    With fewer than two clusters the limits are nan: nothing is known about other clusters. Without rows, or with
    denominators that sum to 0, the value is nan, too.
    """
    columns = _columns(values)
    totals, draws = _resample(columns, clusters, resamples, seed)
    return _interval(_quotient(totals), _quotient(draws), level, columns)


def paired_difference(
    first: Any, second: Any, clusters: Sequence, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return `second` minus `first`, two models on the same N rows, with its interval; see `clustered_bootstrap`.

    Both models see the same draws, so what makes a video hard for both cancels.
    """
    columns = np.concatenate([_columns(first), _columns(second)], axis=1)
    totals, draws = _resample(columns, clusters, resamples, seed)
    value = _quotient(totals[2:]) - _quotient(totals[:2])
    return _interval(value, _quotient(draws[:, 2:]) - _quotient(draws[:, :2]), level, columns)


def _columns(values: Any) -> np.ndarray:
    """(N, 2): numerators and denominators; those of a mean are 1."""
    columns = np.asarray(values, dtype=np.float64)
    if columns.ndim == 1:
        columns = np.stack([columns, np.ones_like(columns)], axis=1)
    bad = np.flatnonzero(~np.isfinite(columns).all(axis=1))
    if len(bad):
        raise ValueError(f"row {bad[0]} holds {columns[bad[0]].tolist()}: values must be finite. Leave such rows out.")
    return columns


def _resample(columns: np.ndarray, clusters: Sequence, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns' sums over all rows (K,), and over each draw of clusters (resamples, K)."""
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
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


def _interval(value: np.ndarray, draws: np.ndarray, level: float, columns: np.ndarray) -> Interval:
    """Rest it on the rows with a denominator in any of the sides."""
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) if len(draws) else (math.nan, math.nan)
    return Interval(float(value), float(low), float(high), int((columns[:, 1::2] > 0).any(axis=1).sum()))
