"""Kendall's tau of finding 5 and its exact p-value, against scipy."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from scipy import stats

from kvcli.analysis import findings
from kvcli.analysis.findings.tau import tau
from kvcli.analysis.statistics.stats import Floats
from tests.analysis.tables_of import cell, data_of, right


def by_scipy(first: Floats, second: Floats) -> tuple[float, float]:
    """tau-b, and the share of all orders of `second` with one as far from 0."""
    value = stats.kendalltau(first, second).statistic
    every = [stats.kendalltau(first, order).statistic for order in permutations(second)]
    return value, float(np.mean(np.abs(every) >= abs(value) - 1e-12))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [3, 5, 6])
def test_without_ties_p_is_scipys_exact_one(n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.normal(size=n), random.normal(size=n)
    expected = stats.kendalltau(first, second, method="exact")
    assert tau(first, second) == pytest.approx((expected.statistic, expected.pvalue))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [3, 5, 6])
def test_with_ties_p_counts_all_orders(n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.integers(0, 3, n).astype(np.float64), np.floor(np.arange(n) / 2)
    first[:2] = 0, 1
    assert tau(first, second) == pytest.approx(by_scipy(first, second))


def test_finding_five_takes_less_than_a_second_with_eight_tasks(tmp_path: Path) -> None:
    lines = []
    for i in range(8):
        lines += cell(f"t{i}", "full", "1", right(100 - 10 * i, 100), shots=0)
        lines += cell(f"t{i}", "full", "1", right(100, 100)) + cell(f"t{i}", "m", "0.1", right(90 - 9 * i, 100))
    data = data_of(tmp_path, lines)
    start = perf_counter()
    found = findings.gain_and_loss(data)
    assert perf_counter() - start < 1
    assert "tau over 8 tasks is +1.00, two-sided p < 0.001" in found.said


def test_eight_pairs_have_scipys_exact_p() -> None:
    random = np.random.default_rng(5)
    first, second = random.normal(size=8), random.normal(size=8)
    found = tau(first, second)
    expected = stats.kendalltau(first, second, method="exact")
    assert found == pytest.approx((expected.statistic, expected.pvalue))


def test_beyond_eight_p_is_exact_without_ties_and_drawn_with_them() -> None:
    random = np.random.default_rng(7)
    first = random.normal(size=12)
    second = first + random.normal(size=12)
    expected = stats.kendalltau(first, second, method="exact")
    assert tau(first, second) == pytest.approx((expected.statistic, expected.pvalue))
    tied = np.round(second[:9])
    value, p = tau(first[:9], tied)
    drawn = stats.permutation_test(
        (tied,), lambda order: stats.kendalltau(first[:9], order).statistic, permutation_type="pairings",
        n_resamples=4000, rng=np.random.default_rng(1),
    )  # fmt: skip
    assert value == pytest.approx(stats.kendalltau(first[:9], tied).statistic)
    assert p == pytest.approx(float(drawn.pvalue), abs=0.03)
    assert tau(first[:9], tied) == (value, p)


def test_a_side_of_ties_alone_says_nothing() -> None:
    assert tau(np.zeros(6), np.arange(6.0)) == (0.0, 1.0)
