"""Kendall's rank correlation of a few pairs, with its exact p-value."""

from __future__ import annotations

from itertools import combinations, permutations
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from kvcli.analysis.statistics.stats import SEED, Floats

ALL_ORDERS = 8
"""Up to so many pairs every order is looked at: 40,320."""
DRAWN = 100_000


def tau(first: Floats, second: Floats) -> tuple[float, float]:
    """Kendall's tau-b and the two-sided p: the share of all orders of `second` with a tau as far from 0.

    first, second: [n]. Up to 8 pairs all orders, ties too. Beyond, without ties, the exact distribution (scipy); with
    ties 100,000 orders drawn, the same in every run. Where one side is all ties: 0 and 1. Source: Kendall 1938,
    Biometrika 30:81; tau-b 1945, Biometrika 33:239.
    """
    n = len(first)
    i, j = np.array(list(combinations(range(n), 2)), np.intp).reshape(-1, 2).T
    one, two = np.sign(np.subtract.outer(first, first)), np.sign(np.subtract.outer(second, second))
    untied = sqrt(np.count_nonzero(one[i, j]) * np.count_nonzero(two[i, j]))
    if not untied:
        return 0.0, 1.0
    agree = float(one[i, j] @ two[i, j])
    if n > ALL_ORDERS and untied == len(i):
        from scipy import stats

        return agree / untied, float(stats.kendalltau(first, second, method="exact").pvalue)
    drawn = n > ALL_ORDERS
    orders = _drawn(n) if drawn else np.array(list(permutations(range(n))))
    sums = two[orders[:, i], orders[:, j]] @ one[i, j]  # the denominator is the same in every order
    as_far = int(np.count_nonzero(np.abs(sums) >= abs(agree)))
    return agree / untied, (as_far + drawn) / (len(orders) + drawn)


def _drawn(n: int) -> NDArray[np.intp]:
    orders = np.tile(np.arange(n), (DRAWN, 1))
    return np.random.default_rng(SEED).permuted(orders, axis=1)
