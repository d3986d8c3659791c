"""The unbiased estimator against all subsets, against exact fractions, and against its own meaning."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcli.analysis.statistics.pass_at_k import figures, pass_at_k


@pytest.mark.parametrize("n", range(1, 8))
def test_it_is_the_share_of_subsets_that_hold_a_right_answer(n: int) -> None:
    for correct in range(n + 1):
        answers = [1] * correct + [0] * (n - correct)
        for k in range(1, n + 1):
            subsets = list(combinations(answers, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@given(st.integers(1, 2000), st.data())
def test_large_numbers_keep_their_digits(n: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(comb(n - correct, k), comb(n, k))
    assert pass_at_k(n, correct, k) == pytest.approx(float(exact), rel=1e-9, abs=1e-12)


def test_its_mean_over_draws_is_the_true_chance() -> None:
    """Unbiased: averaged over all ways in which 6 answers may fall, it gives 1 - (1 - p)^k."""
    p, n = 0.3, 6
    for k in (1, 2, 5):
        mean = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 6), (5, 2, 0), (0, 0, 1)])
def test_what_makes_no_sense_is_refused(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of"):
        pass_at_k(n, correct, k)


def of(*answers: list[float]) -> dict[str, float]:
    samples = np.concatenate([[i] * len(given) for i, given in enumerate(answers)])
    return figures(np.concatenate(answers).astype(float), samples)


def test_figures_are_means_over_problems() -> None:
    assert of([1, 0, 0], [0, 0, 0]) == {"pass@3": 0.5}
    assert of([1] + [0] * 19, [0] * 20) == {"pass@10": pytest.approx(0.25)}
    assert set(of([0] * 200)) == {"pass@10", "pass@100"}


def test_one_answer_each_gives_no_further_figure() -> None:
    assert of([1.0], [0.0]) == {} and figures(np.array([]), np.array([], dtype=int)) == {}


def test_an_answer_that_could_not_be_judged_counts_as_none() -> None:
    assert of([1, 0, np.nan], [1, 1, 0]) == {"pass@2": 1.0}
    assert of([1, np.nan], [1, 0]) == {}
    assert of([np.nan, np.nan], [1, 0]) == {"pass@2": 1.0}
