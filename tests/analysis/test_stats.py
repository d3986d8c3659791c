"""Every formula against published worked examples, and against a second computation written apart from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from kvcli.analysis.statistics import spread, stats

Z = 1.959963984540054

# Newcombe 1998, Stat Med 17:857, Table I, method 3.
WILSON = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}

# (pairs, first only, second only), level. Tango 1998, Stat Med 17:891, Tables V and VII; Agresti, Min 2005, Stat Med
# 24:729; Fagerland, Lydersen, Laake 2014, Stat Med 33:2850: airway hyper-responsiveness, complete response.
TANGO = {
    (32, 9, 3, 0.95): (-0.027, 0.390), (44, 0, 1, 0.90): (-0.096, 0.037), (86, 16, 8, 0.95): (-0.020, 0.207),
    (21, 1, 7, 0.95): (-0.517, -0.026), (161, 6, 16, 0.95): (-0.124, -0.0054),
}  # fmt: skip


@pytest.mark.parametrize("counts", WILSON)
def test_wilson_published(counts: tuple[int, int]) -> None:
    found = stats.wilson(*counts)
    assert (found.low, found.high) == pytest.approx(WILSON[counts], abs=5e-5)


@pytest.mark.parametrize("pairs", TANGO)
def test_tango_published(pairs: tuple[int, int, int, float]) -> None:
    found = stats.tango(*pairs)
    assert (found.low, found.high) == pytest.approx(TANGO[pairs], abs=6e-4)


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


def _restricted_likelihood(n: int, b: int, c: int, difference: float) -> float:
    """Share of pairs that only the second has right, by search: the likeliest under a given difference."""
    q = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200_001)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [(k, p) for k, p in ((b, q + difference), (c, q), (n - b - c, 1 - 2 * q - difference)) if k]
        total = sum((k * np.log(np.maximum(p, 0)) for k, p in terms), np.zeros_like(q))
    return float(q[np.argmax(total)])


@given(counts, counts, counts)
@settings(max_examples=40, deadline=None)
def test_tango_against_its_definition(b: int, c: int, unchanged: int) -> None:
    """At each end inside (-1, 1) the score test, with the likelihood maximised by search, gives exactly z."""
    n = b + c + unchanged
    if n == 0:
        return
    found, mirrored = stats.tango(n, b, c), stats.tango(n, c, b)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    assert found.low < found.high, "never without width"
    for end in (found.low, found.high):
        if abs(end) < 1 - 1e-9:
            q = _restricted_likelihood(n, b, c, end)
            spread = math.sqrt(n * (2 * q + end * (1 - end)))
            assert abs(b - c - n * end) / spread == pytest.approx(Z, abs=5e-3)


def _newcombe(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    """Newcombe 1998, Stat Med 17:2635, method 10: another score interval for the same pairs."""
    n = a + b + c + d
    p1, p2 = (a + b) / n, (a + c) / n
    (l1, u1), (l2, u2) = _wilson(a + b, n), _wilson(a + c, n)
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    cross = max(cross - n / 2, 0) if cross > 0 else cross
    phi = cross / math.sqrt(margins) if margins else 0.0
    low = p1 - p2 - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = p1 - p2 + math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2)
    return low, high


def test_tango_beside_newcombe() -> None:
    """Newcombe's Table III anchors the other method; with many changed pairs both intervals nearly agree."""
    assert _newcombe(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=1e-4)
    assert _newcombe(1, 1, 7, 12) == pytest.approx((-0.5069, -0.0256), abs=1e-4)
    for a, b, c, d in ((400, 60, 90, 250), (900, 40, 160, 300)):
        found = stats.tango(a + b + c + d, b, c)
        assert (found.low, found.high) == pytest.approx(_newcombe(a, b, c, d), abs=0.002)


def test_binary_difference_is_tango_with_flips() -> None:
    full = np.array([1.0] * 30 + [0.0] * 10)
    compressed = full.copy()
    compressed[:6], compressed[35] = 0.0, 1.0
    found = stats.paired_difference(compressed, full)
    expected = stats.tango(40, 1, 6)
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


def test_share_bound_equals_wilson_and_tango_where_all_agree() -> None:
    bound = stats.paired_difference(np.full(54, 0.5), np.full(54, 0.5)).interval
    assert bound is not None
    assert (bound.low, bound.high) == pytest.approx((-0.0664, 0.0664), abs=1e-4)
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


def test_differences_that_are_nearly_all_the_same_are_not_resampled() -> None:
    """39 of 40 lose everything: resamples hold at most a few of the other, and BCa ends at -1."""
    full, compressed = np.full(40, 1.0), np.zeros(40)
    compressed[7] = 0.5
    found = stats.paired_difference(compressed, full)
    assert found.interval is not None
    assert found.interval.method == "t with share bound"
    assert found.interval.note == "nearly all differences are the same, so no bootstrap"
    assert found.interval.high > spread.bca(compressed - full).high
    assert found.interval.high >= (1 - stats.wilson(0, 40).high) * found.value + stats.wilson(0, 40).high - 1e-12
    wide = found.at(1 - 0.05 / 200)
    assert wide is not None
    assert "share bound" in wide.method
    mixed = np.linspace(0, 0.9, 40)
    assert stats.paired_difference(mixed, full).interval.method == "BCa bootstrap"  # type: ignore[union-attr]
    ten = stats.paired_difference(np.linspace(0, 0.9, 10), np.ones(10))
    assert ten.interval is not None
    assert ten.interval.method == "BCa bootstrap", "ten that differ from each other suffice"


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


def test_four_changed_samples_establish_nothing() -> None:
    """Four losses, no gain: the interval just excludes 0 (16 / 4 > 1.96^2), the mid-p value is 0.0625."""
    found = stats.paired_difference(np.array([0.0] * 4 + [1.0] * 46), np.ones(50))
    assert found.interval is not None
    assert -0.01 < found.interval.high < 0
    assert found.p == pytest.approx(0.0625)
    assert found.verdict == "open"


def test_one_definition_of_established() -> None:
    """Of one comparison alone: docs quote the text. What outputs call established considers all comparisons."""
    from pathlib import Path

    from kvcli.analysis.tables import wording

    docs = Path(__file__).resolve().parents[2] / "docs" / "statistics.md"
    assert stats.ESTABLISHED in " ".join(docs.read_text(encoding="utf-8").split())
    assert stats.ESTABLISHED not in wording.MEANING[wording.ESTABLISHED]
    assert "all comparisons" in wording.MEANING[wording.ESTABLISHED]


def _coverage(n: int, better: float, worse: float) -> float:
    """Exact: the probability of all counts whose interval holds the true difference."""
    inside = total = 0.0
    for b in range(n + 1):
        first = scipy_stats.binom.pmf(b, n, better)
        if first < 1e-7:
            continue
        for c in range(n - b + 1):
            p = first * scipy_stats.binom.pmf(c, n - b, worse / (1 - better))
            if p >= 1e-7:
                found = stats.tango(n, b, c)
                inside, total = inside + p * (found.low <= better - worse <= found.high), total + p
    assert total > 0.999
    return inside


@pytest.mark.parametrize("n", [20, 50, 200])
@pytest.mark.parametrize(("better", "worse"), [(0, 0.005), (0, 0.01), (0, 0.02), (0, 0.05), (0.02, 0.02), (0.02, 0.1)])
def test_tango_covers(n: int, better: float, worse: float) -> None:
    """Nearly flat cells too, where hardly a sample changes."""
    assert _coverage(n, better, worse) >= 0.93


def test_newcombe_falls_short_in_nearly_flat_cells() -> None:
    """Why Tango: 200 samples, half of them right, compression breaks 1 %: no change seen in 13 % of such runs, and then
    Newcombe's interval ends before the truth."""
    low, _ = _newcombe(100, 0, 0, 100)
    assert low > -0.01
    assert 0.99**200 > 0.1
    assert stats.tango(200, 0, 0).low == pytest.approx(-(Z**2) / (200 + Z**2))
    assert stats.tango(200, 0, 0).low < -0.01


def test_bca_equals_scipys_on_the_same_resamples() -> None:
    """scipy.stats.bootstrap takes the resampled means and does its own jackknife and percentiles."""
    from scipy.stats._resampling import BootstrapResult

    rng = np.random.default_rng(3)
    difference = np.where(rng.random(150) < 0.3, -rng.random(150), 0.0)
    means = spread.resampled(difference[:, None])[:, 0]
    before = BootstrapResult(None, means, None)
    ends = scipy_stats.bootstrap((difference,), np.mean, n_resamples=0, bootstrap_result=before).confidence_interval
    found = spread.bca(difference)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=1e-5)


def test_resamples_are_drawn_evenly_and_the_same_each_time() -> None:
    values = np.arange(60.0)[:, None]
    means = spread.resampled(values)[:, 0]
    assert means.mean() == pytest.approx(29.5, abs=0.1)
    assert means.std() == pytest.approx(values.std() / math.sqrt(60), rel=0.03)
    assert np.array_equal(means, spread.resampled(values)[:, 0])
    assert not np.array_equal(means, spread.resampled(values, 1)[:, 0])


def test_large_cells_resample_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((90, 2))
    whole = spread.resampled(values)
    monkeypatch.setattr(spread, "_KEEP_UNITS", 10)
    assert np.allclose(spread.resampled(values), whole, atol=1e-6)


@pytest.mark.parametrize("level", [0.95, 0.99, 0.999])
def test_abc_is_the_limit_of_bca(level: float) -> None:
    """Against scipy's BCa with 100,000 resamples, on skewed differences."""
    rng = np.random.default_rng(8)
    difference = np.where(rng.random(200) < 0.15, -rng.integers(1, 4, 200) / 3, 0.0)
    ends = scipy_stats.bootstrap(
        (difference,), np.mean, confidence_level=level, n_resamples=100_000, method="BCa", batch=5000, rng=rng
    ).confidence_interval
    found = spread.skewed(difference).interval(level)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=0.05 * (ends.high - ends.low))


def test_wider_levels_hold_the_usual_interval() -> None:
    rng = np.random.default_rng(4)
    full = rng.random(80).round(1)
    cells = [
        stats.paired_difference((full > 0.4) * 1.0, (full > 0.5) * 1.0), stats.paired_difference(full * 0.9, full),
        stats.paired_difference(full * 0.9, full, np.repeat(np.arange(20), 4).astype(np.int32)),
    ]  # fmt: skip
    for found in cells:
        wide = found.at(1 - 0.05 / 700)
        assert found.interval is not None
        assert wide is not None
        assert wide.low < found.interval.low < found.interval.high < wide.high
        assert found.at(0.95) == found.interval
    t = cells[2].at(0.999)
    means = (-full * 0.1).reshape(20, 4).mean(1)
    ends = scipy_stats.ttest_1samp(means, 0).confidence_interval(0.999)
    assert t is not None
    assert (t.low, t.high) == pytest.approx((ends.low, ends.high)), "19 degrees of freedom"
