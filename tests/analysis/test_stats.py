"""Every formula against published worked examples, and against a second computation written apart from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from kvcli.analysis import stats

Z = 1.959963984540054

# Newcombe 1998, Stat Med 17:857, Table I, method 3.
WILSON = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}

# Newcombe 1998, Stat Med 17:2635, Table III, method 10: pairs (both, first only, second only, neither).
NEWCOMBE = {
    (36, 12, 2, 0): (0.0569, 0.3404), (20, 12, 2, 16): (0.0562, 0.3292), (18, 12, 2, 18): (0.0562, 0.3290),
    (36, 14, 0, 0): (0.1528, 0.4167), (35, 14, 0, 1): (0.1461, 0.4175), (18, 14, 0, 18): (0.1441, 0.3963),
    (2, 97, 1, 0): (0.8721, 0.9854), (0, 29, 1, 0): (0.6666, 0.9882), (0, 30, 0, 0): (0.8395, 1.0),
    (54, 0, 0, 0): (-0.0664, 0.0664), (53, 0, 0, 1): (-0.0729, 0.0729), (27, 0, 0, 27): (-0.0351, 0.0351),
    # Fagerland, Lydersen, Laake 2014, Stat Med 33:2850: airway hyper-responsiveness; complete response.
    (1, 1, 7, 12): (-0.5069, -0.0256), (59, 6, 16, 80): (-0.1186, -0.0046),
}  # fmt: skip


@pytest.mark.parametrize("counts", WILSON)
def test_wilson_published(counts: tuple[int, int]) -> None:
    found = stats.wilson(*counts)
    assert (found.low, found.high) == pytest.approx(WILSON[counts], abs=5e-5)


@pytest.mark.parametrize("pairs", NEWCOMBE)
def test_newcombe_paired_published(pairs: tuple[int, int, int, int]) -> None:
    found = stats.newcombe_paired(*pairs)
    assert (found.low, found.high) == pytest.approx(NEWCOMBE[pairs], abs=1e-4)


@pytest.mark.parametrize(("pair", "p"), [((1, 7), 0.0391), ((6, 16), 0.0347), ((0, 0), 1.0)])
def test_mcnemar_midp_published(pair: tuple[int, int], p: float) -> None:
    """Fagerland, Lydersen, Laake 2013, BMC Med Res Methodol 13:91: 0.039 and 0.035."""
    assert stats.mcnemar_midp(*pair) == pytest.approx(p, abs=5e-5)
    assert stats.mcnemar_midp(*pair[::-1]) == stats.mcnemar_midp(*pair)


def test_mcnemar_midp_against_enumeration() -> None:
    for b in range(7):
        for c in range(7):
            if b + c == 0:
                continue
            each = [math.comb(b + c, k) / 2 ** (b + c) for k in range(b + c + 1)]
            further = sum(p for p in each if p < each[b] - 1e-12)
            equal = sum(p for p in each if abs(p - each[b]) <= 1e-12)
            assert stats.mcnemar_midp(b, c) == pytest.approx(further + equal / 2)


def _wilson(k: int, n: int) -> tuple[float, float]:
    """Roots of (p - k/n)^2 = z^2 p (1 - p) / n."""
    a, b, c = 1 + Z * Z / n, -(2 * k / n + Z * Z / n), (k / n) ** 2
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


counts = st.integers(0, 40)


@given(counts, counts, counts, counts)
@settings(max_examples=60, deadline=None)
def test_newcombe_paired_against_its_definition(a: int, b: int, c: int, d: int) -> None:
    n = a + b + c + d
    if n == 0:
        return
    p1, p2, difference = (a + b) / n, (a + c) / n, (b - c) / n
    (l1, u1), (l2, u2) = _wilson(a + b, n), _wilson(a + c, n)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    cross = max(cross - n / 2, 0) if cross > 0 else cross
    phi = cross / math.sqrt(margins) if margins else 0.0
    low = difference - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = difference + math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2)
    found, mirrored = stats.newcombe_paired(a, b, c, d), stats.newcombe_paired(a, c, b, d)
    assert (found.low, found.high) == pytest.approx((max(low, -1), min(high, 1)), abs=1e-9)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    assert found.low < found.high, "never without width"


def test_binary_difference_is_newcombe_with_flips() -> None:
    full = np.array([1.0] * 30 + [0.0] * 10)
    compressed = full.copy()
    compressed[:6], compressed[35] = 0.0, 1.0
    found = stats.paired_difference(compressed, full)
    expected = stats.newcombe_paired(24, 1, 6, 9)
    assert found.interval == expected
    assert (found.better, found.worse, found.n, found.test) == (1, 6, 40, "mid-p McNemar")
    assert found.value == pytest.approx(-5 / 40)
    assert found.p == pytest.approx(stats.mcnemar_midp(1, 6))


def test_flat_cell_proves_nothing() -> None:
    """No discordant pair: the interval has a width and the verdict stays open."""
    for full in (np.ones(50), np.zeros(50), np.arange(50) % 2 * 1.0, np.full(50, 0.3)):
        found = stats.paired_difference(full.copy(), full)
        assert found.value == 0
        assert found.interval is not None
        assert found.interval.low < -0.01 < 0.01 < found.interval.high
        assert found.verdict == "open"
        assert found.p == 1.0


def test_share_bound_equals_wilson_and_newcombe_where_all_agree() -> None:
    bound = stats.paired_difference(np.full(54, 0.5), np.full(54, 0.5)).interval
    assert bound is not None
    assert (bound.low, bound.high) == pytest.approx(NEWCOMBE[54, 0, 0, 0], abs=1e-4)
    graded = stats.score_interval(np.full(20, 0.5))
    share = WILSON[0, 20][1]
    assert graded is not None
    assert (graded.low, graded.high) == pytest.approx((0.5 * (1 - share), 0.5 + 0.5 * share), abs=5e-5)


def _bca(difference: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Efron 1987, written out: bias correction z0, acceleration from the jackknife."""
    rng = np.random.default_rng(seed)
    n = len(difference)
    means = difference[rng.integers(0, n, (resamples, n))].mean(1)
    normal = scipy_stats.norm
    z0 = normal.ppf((np.sum(means < difference.mean()) + np.sum(means <= difference.mean())) / 2 / resamples)
    left_out = (difference.sum() - difference) / (n - 1)
    u = left_out.mean() - left_out
    acceleration = (u**3).sum() / (6 * (u**2).sum() ** 1.5)
    ends = [normal.cdf(z0 + (z0 + z) / (1 - acceleration * (z0 + z))) for z in (-Z, Z)]
    return float(np.quantile(means, ends[0])), float(np.quantile(means, ends[1]))


def test_bca_against_own_implementation() -> None:
    rng = np.random.default_rng(5)
    full = rng.beta(5, 2, 120)
    compressed = np.clip(full - rng.exponential(0.08, 120), 0, 1)
    found = stats.paired_difference(compressed, full)
    assert found.interval is not None
    assert found.interval.method == "BCa bootstrap"
    assert (found.interval.low, found.interval.high) == pytest.approx(_bca(compressed - full, 40_000, 9), abs=0.0012)
    assert found.p == pytest.approx(scipy_stats.ttest_rel(compressed, full).pvalue)
    assert stats.paired_difference(compressed, full) == found, "seeded"


def test_few_nonzero_differences_take_t_with_the_reason() -> None:
    full = np.full(12, 0.5)
    compressed = full + np.array([0.1, -0.3, 0.2, -0.25, -0.4, -0.15, -0.05, 0.3, 0, 0, 0, 0])
    found = stats.paired_difference(compressed, full)
    expected = scipy_stats.ttest_rel(compressed, full).confidence_interval()
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high))
    assert (found.interval.method, found.interval.note) == ("t", "fewer than 10 non-zero differences, so no bootstrap")


def test_a_few_differences_never_say_more_than_none() -> None:
    full = np.full(200, 1.0)
    nothing = stats.paired_difference(full - 1e-12, full).interval
    one = full.copy()
    one[0] = 2 / 3
    seen = stats.paired_difference(one, full).interval
    assert nothing is not None
    assert seen is not None
    assert seen.method == "t with share bound"
    assert seen.high - seen.low >= 0.99 * (nothing.high - nothing.low)


def test_equal_clusters_are_the_t_interval_of_cluster_means() -> None:
    rng = np.random.default_rng(2)
    full, compressed = rng.random(60).round(1), rng.random(60).round(1)
    clusters = np.repeat(np.arange(6), 10).astype(np.int32)
    means = (compressed - full).reshape(6, 10).mean(1)
    expected = scipy_stats.ttest_1samp(means, 0)
    found = stats.paired_difference(compressed, full, clusters)
    ends = expected.confidence_interval()
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((ends.low, ends.high))
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.units, found.n, found.interval.method) == (6, 60, "t over 6 clusters")
    score = stats.score_interval(full, clusters)
    expected_score = scipy_stats.ttest_1samp(full.reshape(6, 10).mean(1), 0).confidence_interval()
    assert score is not None
    assert (score.low, score.high) == pytest.approx((expected_score.low, expected_score.high))


def test_unequal_clusters_against_a_loop_and_lone_samples() -> None:
    values = np.array([0.1, -0.4, -0.2, 0.0, -0.5, -0.3, 0.2, -0.1, -0.2, -0.6])
    clusters = np.array([0, 0, 0, 1, 1, 1, 1, -1, -1, 2], np.int32)
    groups = [[0.1, -0.4, -0.2], [0.0, -0.5, -0.3, 0.2], [-0.1], [-0.2], [-0.6]]
    mean = sum(map(sum, groups)) / 10
    variance = 5 / 4 * sum((sum(g) - mean * len(g)) ** 2 for g in groups) / 100
    half = scipy_stats.t.ppf(0.975, 4) * math.sqrt(variance)
    found = stats.paired_difference(values + 0.6, np.full(10, 0.6), clusters)
    assert found.interval is not None
    assert found.value == pytest.approx(mean)
    assert (found.interval.low, found.interval.high) == pytest.approx((mean - half, mean + half))
    assert found.units == 5


def test_clusters_of_one_are_no_clusters() -> None:
    full, compressed = np.ones(40), np.array([1.0] * 30 + [0.0] * 10)
    alone = np.arange(40, dtype=np.int32)
    assert stats.paired_difference(compressed, full, alone) == stats.paired_difference(compressed, full)


def test_one_cluster_or_one_sample_gives_no_interval() -> None:
    found = stats.paired_difference(np.zeros(5), np.ones(5), np.zeros(5, np.int32))
    assert found.interval is None
    assert found.p is None
    assert found.verdict == "open"
    assert stats.score_interval(np.array([0.5])) is None


@pytest.mark.parametrize(
    ("low", "high", "p", "verdict"),
    [
        (-0.2, -0.1, 0.049, "loss"), (0.1, 0.2, 0.049, "gain"), (-0.1, 0.0, 0.049, "open"), (-0.2, -0.1, 0.05, "open"),
        (0.1, 0.2, 0.25, "open"), (-0.2, -0.1, None, "loss"), (-0.1, 0.1, None, "open"),
    ],
)  # fmt: skip
def test_verdict(low: float, high: float, p: float | None, verdict: str) -> None:
    """Interval and p both; without a p the interval alone."""
    assert stats.Difference(0.0, stats.Interval(low, high, ""), p, "", 9, 9, 0, 0).verdict == verdict


def test_two_samples_establish_nothing() -> None:
    """0/2 against 2/2: the interval excludes 0, the mid-p value is 0.25."""
    found = stats.paired_difference(np.zeros(2), np.ones(2))
    assert found.interval is not None
    assert found.interval.high < 0
    assert found.p == 0.25
    assert found.verdict == "open"


def test_one_definition_of_established() -> None:
    """Legend, report and docs quote the one text."""
    from pathlib import Path

    from kvcli.analysis import wording

    docs = Path(__file__).resolve().parents[2] / "docs" / "statistics.md"
    assert stats.ESTABLISHED in " ".join(docs.read_text(encoding="utf-8").split())
    assert stats.ESTABLISHED in wording.MEANING[wording.ESTABLISHED]


def test_newcombe_covers() -> None:
    """About 95 % of intervals hold the truth: n = 60, full right in 95 %, compression breaks 12 % of those."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        full = rng.random(60) < 0.95
        compressed = full & (rng.random(60) >= 0.12)
        interval = stats.paired_difference(compressed * 1.0, full * 1.0).interval
        assert interval is not None
        inside += interval.low <= -0.95 * 0.12 <= interval.high
    assert 0.92 <= inside / 400 <= 0.995
