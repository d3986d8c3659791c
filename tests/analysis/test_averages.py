"""Averages: uncertain by their samples alone, whatever the methods or tasks do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kvcli.analysis.statistics import averages, retention, stats
from kvcli.analysis.statistics.averages import Scores
from kvcli.analysis.tables import matched


def _task(seed: int, n: int = 200, right: float = 0.8, broken: float = 0.2, chance: float = 0.0) -> Scores:
    rng = np.random.default_rng(seed)
    full = (rng.random(n) < right) * 1.0
    return Scores(f"t{seed}", np.where(rng.random(n) < broken, 0.0, full), full, chance=chance)


def test_methods_that_disagree_add_no_uncertainty() -> None:
    """One loses 40 points on every sample, one gains none: their mean is known exactly, their spread is not asked."""
    full = np.tile([0.9, 0.8], 50)
    apart = averages.difference_over_methods([full - 0.4, full], full)
    alike = averages.difference_over_methods([full - 0.2, full - 0.2], full)
    assert apart.value == pytest.approx(-0.2)
    assert apart.interval is not None
    assert alike.interval is not None
    assert (apart.interval.low, apart.interval.high) == pytest.approx((alike.interval.low, alike.interval.high))
    assert apart.n == 100, "samples, not samples x methods"


def test_over_methods_is_the_comparison_of_the_samples_means() -> None:
    rng = np.random.default_rng(0)
    full = (rng.random(120) < 0.9) * 1.0
    methods = [np.where(rng.random(120) < lost, 0.0, full) for lost in (0.1, 0.2, 0.4)]
    clusters = np.repeat(np.arange(12), 10).astype(np.int32)
    methods[0][3] = np.nan
    found = averages.difference_over_methods(methods, full, clusters)
    there = np.arange(120) != 3
    expected = stats.paired_difference(np.mean(methods, axis=0)[there], full[there], clusters[there])
    assert found == expected
    assert (found.n, found.units) == (119, 12)


def test_over_tasks_each_counts_once() -> None:
    small, large = _task(1, 100), _task(2, 900, broken=0.05)
    found = averages.difference_over_tasks([small, large])
    means = [float((t.compressed - t.full).mean()) for t in (small, large)]
    assert found.value == pytest.approx(np.mean(means))
    assert (found.tasks, found.n) == (2, 1000)


def test_over_tasks_against_scipys_bootstrap() -> None:
    """scipy resamples each sample apart too; four tasks of other size and loss."""
    tasks = [_task(i, n, broken=b) for i, (n, b) in enumerate([(100, 0.3), (250, 0.1), (150, 0.5), (300, 0.2)])]
    found = averages.difference_over_tasks(tasks).interval

    def mean(*parts: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([part.mean(axis) for part in parts], axis=0)

    data = tuple(task.compressed - task.full for task in tasks)
    ends = scipy_stats.bootstrap(
        data, mean, n_resamples=20_000, vectorized=True, batch=1000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert found is not None
    assert found.method == "BCa bootstrap within 4 tasks"
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=0.0025)
    assert averages.difference_over_tasks(tasks).interval == found, "seeded"


def test_tasks_of_one_size_are_drawn_apart() -> None:
    """The same scores twice: were they drawn together, the interval would not shrink."""
    one = _task(3)
    single, double = (averages.difference_over_tasks([one] * k).interval for k in (1, 2))
    assert single is not None
    assert double is not None
    assert (double.high - double.low) / (single.high - single.low) == pytest.approx(1 / np.sqrt(2), rel=0.05)


def test_one_task_is_its_own_interval() -> None:
    graded = Scores("g", _task(4).compressed * 0.9, _task(4).full)
    found, alone = averages.difference_over_tasks([graded]), stats.paired_difference(graded.compressed, graded.full)
    assert alone.interval is not None
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx(
        (alone.interval.low, alone.interval.high), abs=2e-3
    )


def test_flat_tasks_keep_their_width() -> None:
    """Four tasks without a changed sample: the mean of four Tango intervals, not [0, 0]."""
    full = np.ones(200)
    found = averages.difference_over_tasks([Scores(str(i), full, full) for i in range(4)])
    assert found.value == 0
    assert found.interval is not None
    assert found.interval.method == "MOVER of 4 tasks"
    half = stats.tango(200, 0, 0).high / 2
    assert (found.interval.low, found.interval.high) == pytest.approx((-half, half))


def test_a_task_whose_differences_are_nearly_all_the_same_is_not_resampled() -> None:
    full, compressed = np.full(60, 1.0), np.zeros(60)
    compressed[7] = 0.5
    found = averages.difference_over_tasks([Scores("same", compressed, full), _task(3)])
    alone = stats.paired_difference(compressed, full)
    assert found.interval is not None
    assert alone.interval is not None
    assert found.interval.method == "MOVER of 2 tasks"
    assert found.interval.high - found.value > (alone.interval.high - alone.value) / 2


def test_few_clusters_take_t() -> None:
    rng = np.random.default_rng(6)
    full = rng.random(600)
    task = Scores("lg", full * rng.random(600), full, np.repeat(np.arange(20), 30).astype(np.int32))
    found = averages.difference_over_tasks([task])
    alone = stats.paired_difference(task.compressed, task.full, task.clusters)
    assert found.interval is not None
    assert alone.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((alone.interval.low, alone.interval.high))


def test_many_clusters_are_resampled_whole() -> None:
    """100 clusters of 4 equal samples: as wide as the 100 alone."""
    one = _task(7, 100)
    codes = np.repeat(np.arange(100), 4).astype(np.int32)
    four = Scores("c", np.repeat(one.compressed, 4), np.repeat(one.full, 4), codes)
    wide, alone = (averages.difference_over_tasks([t]).interval for t in (four, one))
    assert wide is not None
    assert alone is not None
    assert wide.method == "BCa bootstrap within 1 tasks"
    assert (wide.low, wide.high) == pytest.approx((alone.low, alone.high), abs=1e-6)


def test_retention_over_tasks_leaves_out_what_has_none() -> None:
    tasks = [_task(8, 300, 0.9, 0.3, 0.25), _task(9, 300, 0.7, 0.1), _task(10, 300, 0.25, 0.5, 0.25)]
    found = averages.retention_over_tasks(tasks)
    assert found is not None
    assert found.left_out == ("t10",)
    parts = [retention.retention(t.compressed, t.full, t.chance) for t in tasks[:2]]
    assert found.value == pytest.approx(np.mean([p.value for p in parts]))
    assert found.interval is not None
    widths = [p.interval.high - p.interval.low for p in parts if p.interval]
    assert found.interval.high - found.interval.low == pytest.approx(np.hypot(*widths) / 2, rel=0.1)
    assert averages.retention_over_tasks(tasks[2:]) is None


def test_retention_covers() -> None:
    rng = np.random.default_rng(11)
    facts = ((0.9, 0.3, 0.25), (0.8, 0.1, 0.0), (0.7, 0.5, 0.2))
    truth = np.mean([(r * (1 - b) - c) / (r - c) for r, b, c in facts])
    inside = 0
    for _ in range(150):
        tasks = [_task(int(rng.integers(1 << 30)), 150, *fact) for fact in facts]
        found = averages.retention_over_tasks(tasks)
        assert found is not None
        assert found.interval is not None
        inside += found.interval.low <= truth <= found.interval.high
    assert inside / 150 >= 0.9


def test_methods_are_compared_at_the_same_bytes_only() -> None:
    measured = {"h2o": 0.200, "snapkv": 0.2015, "shotkv": 0.25, "kivi": None, "chunkkv": 0.2045}
    assert matched.pairs(measured) == [("h2o", "snapkv")]
    assert not matched.same_bytes(None, None)


def test_method_against_method_is_paired() -> None:
    first, second = np.array([1.0, 0.0, 1.0, np.nan, 1.0]), np.array([1.0, 1.0, 0.0, 1.0, 0.0])
    clusters = np.array([0, 0, 1, 1, 1], np.int32)
    there = [0, 1, 2, 4]
    assert matched.difference(first, second) == stats.paired_difference(first[there], second[there])
    found = matched.difference(first, second, clusters)
    assert found == stats.paired_difference(first[there], second[there], clusters[there])
