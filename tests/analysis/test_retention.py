"""Retention and its interval: Fieller's formula, published ratios, coverage, flat cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kvcli.analysis.statistics import retention, stats
from kvcli.analysis.statistics.retention import ratio_ends


def _fieller(first: np.ndarray, second: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Fieller 1954 for the ratio of two paired means, as the NIST handbook writes it."""
    n, t = len(first), scipy_stats.t.ppf((1 + level) / 2, len(first) - 1)
    covariance = np.cov(first, second) / n * t * t
    x, y = second.mean(), first.mean()
    a, b, c = x * x - covariance[1, 1], x * y - covariance[0, 1], y * y - covariance[0, 0]
    root = math.sqrt(b * b - a * c)
    return (b - root) / a, (b + root) / a


def test_symmetric_intervals_give_fieller() -> None:
    rng = np.random.default_rng(0)
    full = rng.uniform(0.4, 1.0, 25)
    change = rng.normal(-0.1, 0.2, 25) + 0.3 * (full - 0.7)
    t = scipy_stats.t.ppf(0.975, 24)
    half, base = (t * v.std(ddof=1) / 5 for v in (change, full))
    top, below = change.mean(), full.mean()
    together = float(np.corrcoef(change, full)[0, 1])
    found = ratio_ends(top, (top - half, top + half), below, (below - base, below + base), together)
    assert found == pytest.approx(_fieller(change, full), abs=1e-9)


def test_published_ratio_of_paired_means() -> None:
    """Bonett, Price 2020, J Educ Behav Stat 45:750: ratio 1.134 [1.094, 1.176], from logarithms; Fieller is near it."""
    first = np.array([3.3, 3.6, 3.0, 3.1, 3.9, 4.2, 3.5, 3.3]) / 10
    second = np.array([3.0, 3.1, 2.7, 2.6, 3.2, 3.8, 3.2, 3.0]) / 10
    pairs = np.repeat(np.arange(8), 2).astype(np.int32)
    found = retention.retention(np.repeat(first, 2), np.repeat(second, 2), clusters=pairs)
    assert found.value == pytest.approx(1.134146, abs=1e-6)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((1.09417, 1.175583), abs=0.003)
    assert (found.interval.low, found.interval.high) == pytest.approx(_fieller(first, second), abs=1e-6)


def test_retention_counts_what_lies_above_chance() -> None:
    full = np.array([1.0] * 75 + [0.0] * 25)
    compressed = np.array([1.0] * 50 + [0.0] * 50)
    found = retention.retention(compressed, full, 0.25)
    assert found.value == pytest.approx(0.5)
    assert found.loss == pytest.approx(-0.5)
    paper = retention.retention(compressed, full)
    assert paper.loss == pytest.approx((0.5 - 0.75) / 0.75), "the paper's delta P"
    assert paper.interval is not None
    assert paper.loss_interval is not None
    assert paper.loss_interval.low == pytest.approx(paper.interval.low - 1)
    at_chance = retention.retention(np.array([1.0] * 25 + [0.0] * 75), full, 0.25)
    assert at_chance.value == pytest.approx(0.0)


def test_a_flat_cell_keeps_a_width() -> None:
    full = np.array([1.0] * 150 + [0.0] * 50)
    found = retention.retention(full.copy(), full, 0.25)
    assert found.value == 1.0
    assert found.interval is not None
    half = stats.tango(200, 0, 0).high / 0.5
    assert found.interval.low < 1 - half
    assert found.interval.high > 1 + half
    assert found.interval.high < 1 + 1.3 * half


def test_without_a_score_above_chance_there_is_nothing_to_keep() -> None:
    near = np.array([1.0] * 30 + [0.0] * 70)
    found = retention.retention(near * 0, near, 0.25)
    assert found.value is not None
    assert found.interval is None
    assert found.note == "full is not clearly above 0.25, so there is nothing to keep"
    below = retention.retention(near, near * 0, 0.25)
    assert (below.value, below.loss, below.loss_interval) == (None, None, None)


def test_one_cluster_has_no_interval() -> None:
    full = np.linspace(0.5, 1, 6)
    found = retention.retention(full * 0.9, full, clusters=np.zeros(6, np.int32))
    assert found.value == pytest.approx(0.9)
    assert found.interval is None


@pytest.mark.parametrize(
    ("right", "broken", "mended", "chance"),
    [(0.8, 0.3, 0.1, 0.25), (0.95, 0.02, 0.0, 0.0), (0.7, 0.8, 0.2, 0.25), (0.6, 0.05, 0.05, 0.25)],
)
def test_covers(right: float, broken: float, mended: float, chance: float) -> None:
    """About 95 % of intervals hold the true retention, n = 150."""
    rng = np.random.default_rng(2)
    truth = (right * (1 - broken) + (1 - right) * mended - chance) / (right - chance)
    inside = 0
    for _ in range(600):
        full = rng.random(150) < right
        compressed = np.where(full, rng.random(150) >= broken, rng.random(150) < mended)
        found = retention.retention(compressed * 1.0, full * 1.0, chance).interval
        assert found is not None
        inside += found.low <= truth <= found.high
    assert inside / 600 >= 0.925


def test_near_the_bootstrap_of_the_ratio() -> None:
    """Resampled pairs, n = 1,500: all ways agree there."""
    rng = np.random.default_rng(5)
    full = (rng.random(1500) < 0.8) * 1.0
    compressed = np.where(rng.random(1500) < 0.25, 0.0, full)
    found = retention.retention(compressed, full, 0.25).interval

    def ratio(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return (a.mean(axis) - 0.25) / (b.mean(axis) - 0.25)

    ends = scipy_stats.bootstrap(
        (compressed, full), ratio, paired=True, n_resamples=4000, vectorized=True, batch=500, rng=rng
    ).confidence_interval
    assert found is not None
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=0.006)
