"""Cluster bootstrap: exact small cases, coverage on simulated data, determinism."""

import math

import numpy as np
import pytest

from trl_vpo.evaluate.intervals import clustered_bootstrap, paired_difference

RATIOS = [(1, 4), (2, 2)]


@pytest.mark.parametrize(
    ("values", "clusters", "expected"),
    [
        # Clusters: a sums to 3 over two rows, b to 0 over one. The draws are aa, ab, ba, bb: 1.5, 1, 1, 0.
        ([1.0, 2.0, 0.0], "aab", (1.0, 0.0, 1.5)),
        # 1/4 and 2/2; together 3/6, which is not their mean. Draws: 2/8, 3/6, 4/4.
        (RATIOS, "ab", (0.5, 0.25, 1.0)),
        # Rows with a denominator of 0 change nothing but the draws; draws without any are left out.
        ([*RATIOS, (0, 0)], "aba", (0.5, 0.25, 1.0)),
        ([(1, 2), (0, 0)], "ab", (0.5, 0.5, 0.5)),
        ([True] * 6, "aabbcc", (1.0, 1.0, 1.0)),
        # One cluster says nothing of others; no rows, or no denominators, say nothing.
        ([1.0, 2.0], "aa", (1.5, math.nan, math.nan)),
        ([], "", (math.nan,) * 3),
        ([(1, 0), (2, 0)], "ab", (math.nan,) * 3),
    ],
)
def test_exact_cases(values, clusters, expected):
    interval = clustered_bootstrap(values, list(clusters), level=0.98)
    assert (interval.value, interval.low, interval.high) == pytest.approx(expected, nan_ok=True)


def simulate(random, clusters=40, rows=8, between=1.0, within=0.3):
    """Rows around their cluster's own mean; correlation within a cluster 0.92, true mean 0."""
    means = random.normal(0, between, size=(clusters, 1))
    values = means + random.normal(0, within, size=(clusters, rows))
    return values.ravel(), np.repeat(np.arange(clusters), rows).tolist()


def test_coverage_on_correlated_rows():
    random = np.random.default_rng(0)
    covered, naive, widths = 0, 0, []
    for _ in range(300):
        values, clusters = simulate(random)
        good = clustered_bootstrap(values, clusters, resamples=400)
        bad = clustered_bootstrap(values, range(len(values)), resamples=400)
        covered += good.low <= 0 <= good.high
        naive += bad.low <= 0 <= bad.high
        widths.append((bad.high - bad.low) / (good.high - good.low))
    assert 0.90 <= covered / 300 <= 0.98
    assert naive / 300 < 0.65
    assert np.mean(widths) < 0.5


def test_paired_difference_uses_the_pairs():
    random = np.random.default_rng(2)
    first, clusters = simulate(random)
    second = first + 0.1 + random.normal(0, 0.05, size=len(first))
    paired = paired_difference(first, second, clusters)
    assert paired == pytest.approx(clustered_bootstrap(second - first, clusters), abs=1e-12)
    assert 0.08 < paired.low < 0.1 < paired.high < 0.12
    # Ratios: 1/2 and 1/2; 2/2 and 0/6. Draws aa, ab, bb: 1 - 1/2, 2/8 - 2/4, 0 - 1/2.
    ratios = paired_difference([(1, 2), (1, 2)], [(2, 2), (0, 6)], ["a", "b"], level=0.98)
    assert ratios == (-0.25, -0.5, 0.5, 2)


def test_the_seed_fixes_the_draws(monkeypatch):
    values, clusters = simulate(np.random.default_rng(3))
    first = clustered_bootstrap(values, clusters)
    assert first == clustered_bootstrap(values, clusters) != clustered_bootstrap(values, clusters, seed=1)
    assert first == clustered_bootstrap(values, [f"video {cluster}" for cluster in clusters])
    monkeypatch.setattr("trl_vpo.evaluate.intervals._DRAWS_AT_ONCE", 40 * 7)  # what fits in memory plays no part
    assert first == clustered_bootstrap(values, clusters)
