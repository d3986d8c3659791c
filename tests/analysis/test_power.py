"""Detectable differences and sizes needed: published formulas' examples, statsmodels, and power by enumeration."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kvcli.analysis.statistics import power, stats
from kvcli.analysis.statistics.spread import Spread


def _binary(n: int, better: int, worse: int) -> stats.Difference:
    compressed = np.array([1.0] * better + [0.0] * worse + [1.0] * (n - better - worse))
    full = np.array([0.0] * better + [1.0] * (n - better))
    return stats.paired_difference(compressed, full)


@pytest.mark.parametrize(("better", "worse", "pairs"), [(0.05, 0.45, 23), (0.15, 0.30, 155)])
def test_connor_worked_examples(better: float, worse: float, pairs: int) -> None:
    """Connor 1987, Biometrics 43:207, 5 % two-sided, power 80 %, as public calculators print it."""
    assert power.pairs_needed(better, worse) == pairs
    assert power.pairs_needed(worse, better) == pairs


@pytest.mark.parametrize(("effect", "units"), [(0.5, 34), (0.2, 199), (0.8, 15)])
def test_t_sizes_are_the_tabulated_ones(effect: float, units: int) -> None:
    """Cohen 1988 and G*Power for the paired t test, two-sided 5 %, power 80 %."""
    assert power.units_needed(1.0, effect) == units
    assert power.units_needed(1.0, -effect) == units


def test_t_sizes_against_statsmodels() -> None:
    from_there = pytest.importorskip("statsmodels.stats.power").TTestPower()
    for effect, alpha in ((0.37, 0.05), (0.6, 0.001), (0.1, 0.01)):
        wanted = from_there.solve_power(effect_size=effect, alpha=alpha, power=0.8, alternative="two-sided")
        assert power.units_needed(1.0, effect, 1 - alpha) == math.ceil(wanted)


def _power(n: int, better: float, worse: float, null: float) -> float:
    """Probability that n pairs tell the difference from `null`, by enumeration; from 0 mid-p < 0.05 is needed too."""
    found = 0.0
    for b in range(n + 1):
        first = scipy_stats.binom.pmf(b, n, better)
        for c in range(n - b + 1) if first > 1e-6 else ():
            p = first * scipy_stats.binom.pmf(c, n - b, worse / (1 - better))
            if p > 1e-6:
                ends = stats.tango(n, b, c)
                apart = ends.low > null or ends.high < null
                found += p * (apart and (null != 0 or stats.mcnemar_midp(b, c) < 0.05))
    return float(found)


@pytest.mark.parametrize(("better", "worse", "null"), [(0.02, 0.12, 0.0), (0.03, 0.03, -0.05), (0.01, 0.01, -0.04)])
def test_needed_pairs_give_the_power(better: float, worse: float, null: float) -> None:
    n = power.pairs_needed(better, worse, null)
    assert _power(n, better, worse, null) == pytest.approx(0.8, abs=0.06)


def test_a_flat_cell_needs_what_makes_its_interval_fit() -> None:
    """188.2 = z^2 (1 - m) / m: the first size at which an unchanged cell shows no loss beyond 2 points."""
    n = power.pairs_needed(0.0, 0.0, -0.02)
    assert n == 189
    assert stats.tango(n, 0, 0).low > -0.02 >= stats.tango(n - 1, 0, 0).low
    assert power.needed(_binary(100, 0, 0), 0.02) == power.Needed(190, 190)


def _all_lost(n: int, loss: float, level: float) -> float:
    """Probability that a true loss without gains is established: the sum over every number of losses."""
    found = 0.0
    for k in range(n + 1):
        if stats.tango(n, 0, k, level).high < 0 and stats.mcnemar_midp(0, k) < 1 - level:
            found += float(scipy_stats.binom.pmf(k, n, loss))
    return found


@pytest.mark.parametrize(("n", "size", "points"), [(40, 216, 40.3), (200, 216, 8.4), (200, 700, 9.5), (200, 1, 3.3)])
def test_of_a_flat_cell_the_chance_is_80_per_cent(n: int, size: int, points: float) -> None:
    level = 1 - 0.05 / size
    smallest = power.detectable(_binary(n, 0, 0), level)
    assert smallest is not None
    assert 100 * smallest == pytest.approx(points, abs=0.05)
    assert _all_lost(n, smallest, level) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 20, 216, 700, 5000])
def test_fewest_losses_are_those_that_both_the_interval_and_p_establish(size: int) -> None:
    level = 1 - 0.05 / size
    for n in (4, 5, 12, 40, 300):
        both = [k for k in range(1, n + 1) if stats.tango(n, 0, k, level).high < 0 and 0.5**k < 1 - level]
        assert power.fewest_losses(n, level) == (both[0] if both else None)


def test_the_detectable_difference_does_not_jump_where_samples_begin_to_change() -> None:
    found = [power.detectable(_binary(200, 0, worse), 1 - 0.05 / 216) for worse in range(60)]
    steps = [b - a for a, b in pairwise(found) if a is not None and b is not None]
    assert len(steps) == 59
    assert min(steps) >= 0
    assert max(steps) < 0.006, "one sample of 200 is 0.005"


@pytest.mark.parametrize(("better", "worse"), [(5, 5), (20, 20), (0, 2)])
def test_detectable_difference_is_detected_so_often(better: int, worse: int) -> None:
    smallest = power.detectable(_binary(200, better, worse))
    assert smallest is not None
    changed = max((better + worse) / 200, smallest)
    found = _power(200, (changed - smallest) / 2, (changed + smallest) / 2, 0.0)
    assert 0.77 <= found <= 0.91


def test_more_comparisons_detect_less() -> None:
    cell = _binary(200, 5, 15)
    alone, among = power.detectable(cell), power.detectable(cell, 1 - 0.05 / 700)
    assert alone is not None
    assert among is not None
    assert 0.03 < alone < 0.07 < among < 0.15
    assert power.detectable(_binary(3, 0, 0)) is None, "three samples can show nothing"


def test_twenty_generations_detect_by_t_with_19_degrees_of_freedom() -> None:
    rng = np.random.default_rng(0)
    full = rng.random(600)
    found = stats.paired_difference(full * rng.random(600), full, np.repeat(np.arange(20), 30).astype(np.int32))
    smallest = power.detectable(found)
    assert isinstance(found.basis, Spread)
    assert smallest is not None
    shift = smallest / found.basis.error
    drawn = rng.normal(shift / math.sqrt(20), 1, (4000, 20))
    assert (scipy_stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.02)


def test_clusters_that_agree_are_not_thought_exact() -> None:
    flat = stats.paired_difference(np.full(60, 0.5), np.full(60, 0.5), np.repeat(np.arange(20), 3).astype(np.int32))
    smallest = power.detectable(flat)
    assert smallest is not None
    assert smallest > 0.2
    wanted = power.needed(flat, 0.02)
    assert wanted is not None
    assert wanted.units == 190
    assert wanted.samples == 570


def test_needed_takes_the_verdict_that_is_nearer() -> None:
    """A loss of 1.8 points: as many samples as show it to be one, not those that bring it above -2."""
    cell = _binary(500, 6, 15)
    wanted = power.needed(cell, 0.02)
    assert wanted is not None
    assert wanted.samples == power.about(power.pairs_needed(6 / 500, 15 / 500))
    assert wanted.samples > 500


def test_needed_exceeds_what_was_there() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        b, c = (int(k) for k in rng.integers(0, 9, 2))
        wanted = power.needed(_binary(60, b, c), 0.02)
        assert wanted is not None
        assert wanted.samples > 60


@pytest.mark.parametrize(("count", "said"), [(7, 7), (99, 99), (101, 110), (1234, 1300), (1300, 1300)])
def test_about(count: int, said: int) -> None:
    assert power.about(count) == said


def test_nothing_without_an_interval() -> None:
    alone = stats.paired_difference(np.array([0.5]), np.array([0.4]))
    assert power.detectable(alone) is None
    assert power.needed(alone, 0.02) is None


def test_differences_alike_up_to_rounding_need_two_units() -> None:
    assert power.units_needed(6.09e-17, 0.0648, 0.99999735) == 2
