"""The sign-flip test: every choice of signs counted, monotone, valid, and what it does to intervals and verdicts."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kvcli.analysis.statistics import signs, stats
from kvcli.analysis.statistics.family import Family
from kvcli.analysis.statistics.verdicts import Kind, judge, judge_all


def _by_hand(parts: np.ndarray) -> float:
    seen = abs(parts.sum())
    sums = [abs(float(np.dot(signs_, np.abs(parts)))) for signs_ in product((-1, 1), repeat=len(parts))]
    return float(np.mean([s >= seen - 1e-9 for s in sums]))


@pytest.mark.parametrize("seed", range(6))
def test_p_counts_every_choice_of_signs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = rng.integers(-10, 8, 9) / 20
    assert signs.sign_flip_p(parts) == pytest.approx(_by_hand(parts))


def test_p_is_scipys_permutation_test_of_signs() -> None:
    parts = np.random.default_rng(3).normal(0.1, 0.3, 12)
    found = scipy_stats.permutation_test(
        (parts,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert signs.sign_flip_p(parts) == pytest.approx(found.pvalue)


def test_of_0_1_differences_it_is_the_exact_mcnemar_test() -> None:
    parts = np.array([-1.0] * 11 + [1.0] * 3 + [0.0] * 30)
    assert signs.sign_flip_p(parts) == pytest.approx(scipy_stats.binomtest(3, 14).pvalue)


def test_all_of_one_sign_have_the_smallest_p_there_is() -> None:
    assert signs.sign_flip_p(-np.full(20, 0.03)) == 2**-19
    assert signs.sign_flip_p(np.zeros(20)) == 1.0
    assert signs.sign_flip_p(np.full(25, 0.1)) is None
    assert signs.sign_flip_bound(np.full(25, 0.1)) == 2**-24


@pytest.mark.parametrize("function", [signs.sign_flip_p, signs.sign_flip_bound])
def test_a_larger_loss_never_has_a_larger_p(function) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(8)
    for _ in range(300):
        parts = rng.normal(-0.2, 0.4, 14).round(2)
        more = parts - rng.choice([0.0, 0.05, 0.7], 14)
        if parts.sum() < 0:
            assert function(more) <= function(parts) + 1e-12


def test_the_bound_lies_above_the_exact_p() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        parts = rng.normal(-0.2, 0.4, 16)
        exact, bound = signs.sign_flip_p(parts), signs.sign_flip_bound(parts)
        assert exact is not None
        assert exact <= bound + 1e-12


@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.001])
def test_p_holds_its_level_where_method_and_full_are_exchangeable(alpha: float) -> None:
    """Sparse, lopsided and graded sizes; each sign as likely as the other."""
    rng = np.random.default_rng(5)
    times, below = 6000, 0
    for _ in range(times):
        sizes = rng.choice([0.0, 0.0, 0.05, 0.3, 1.0], 20)
        p = signs.sign_flip_p(sizes * rng.choice([-1, 1], 20))
        below += p is not None and p < alpha
    assert below / times <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / times)


def test_a_family_without_any_effect_errs_in_at_most_5_per_cent() -> None:
    """20 graded samples each, as an answer scored by its share of right parts."""
    rng = np.random.default_rng(2)
    wrong, times = 0, 150
    for _ in range(times):
        found = []
        for _ in range(40):
            a, b = rng.binomial(10, 0.85, 20) / 10, rng.binomial(10, 0.85, 20) / 10
            found.append(stats.paired_difference(a, b))
        verdicts = judge_all(found, Family(40))
        wrong += any(v is not None and v.kind in (Kind.LOSS, Kind.GAIN) for v in verdicts)
    assert wrong / times <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / times)


@pytest.mark.parametrize("size", [1, 50, 608, 5712])
def test_a_uniformly_larger_loss_is_never_less_established(size: int) -> None:
    """Of 20 samples of which full has all: spread losses, and larger ones that are nearly all the same."""
    rng = np.random.default_rng(4)
    full = np.ones(20)
    for losses in (0.45 + 0.05 * rng.integers(0, 4, 20), 0.05 * rng.integers(0, 5, 20), np.full(20, 0.5)):
        more = np.minimum(losses + 0.1 + 0.3 * rng.random(20).round(1), 1.0)
        kinds = []
        for lost in (losses, more, np.where(np.arange(20) < 17, 1.0, np.maximum(more, 0.8)), np.full(20, 1.0) - 1e-12):
            found = stats.paired_difference(full - lost, full)
            kinds.append(judge(found, Family(size), adjusted=min((found.p or 0.0) * size, 1.0)).kind is Kind.LOSS)
        assert kinds == sorted(kinds)


def test_a_total_loss_of_graded_samples_is_established_in_a_large_family() -> None:
    """The share bound alone reaches beyond 0 there."""
    full, lost = np.ones(20), np.array([0.05] * 5 + [0.0] * 15)
    found = stats.paired_difference(lost, full)
    interval = found.at(Family(5712).level)
    assert found.p == 2**-19
    assert interval is not None
    assert interval.bound
    assert -1e-6 < interval.high < 0
    assert judge(found, Family(5712), adjusted=5712 * 2**-19).kind is Kind.LOSS


def test_an_interval_holds_0_where_the_test_does_not_exclude_it() -> None:
    """12 samples that lose nearly the same: t alone would exclude 0 at any level."""
    full = np.ones(12)
    lost = full - 0.5 - 0.001 * np.arange(12)
    found = stats.paired_difference(lost, full)
    interval = found.at(Family(608).level)
    assert found.p == 2**-11
    assert interval is not None
    assert interval.high == 0.0
    assert found.verdict == "loss"


def test_clusters_keep_t_unless_nearly_all_agree() -> None:
    clusters = np.repeat(np.arange(16), 10).astype(np.int32)
    lost = np.random.default_rng(6).random(160)
    spread_out = stats.paired_difference(1 - lost, np.ones(160), clusters)
    alike = stats.paired_difference(np.zeros(160), np.ones(160), clusters)
    assert (spread_out.test, spread_out.by_signs) == ("t over clusters", False)
    assert (alike.test, alike.p) == ("sign flips over clusters", 2**-15)
    interval = alike.at(Family(608).level)
    assert interval is not None
    assert interval.high < 0
