"""pass@k: how likely one of k answers to a problem is right, estimated from n answers without bias."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

METRIC = "pass@1"
"""The metric of tasks for which these figures mean something."""
USUAL = (10, 100)
"""k beside 1, as in the paper; with fewer answers k is their number."""


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k): the share of the k-subsets of n answers that hold a right one.

    Source: Chen et al., arXiv:2107.03374, equation 1, with its product form, in which nothing can overflow. Raises
    ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {correct} right answers among {n}")
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def figures(scores: NDArray[np.float64], samples: NDArray[np.integer]) -> dict[str, float]:
    """Mean pass@k over problems, for each k that every problem has answers for; empty with one answer each.

    scores: [N] 1 where the answer passed, NaN where it could not be judged (it counts as no answer). samples: [N] which
    problem it answers. pass@1 is the mean score itself.
    """
    judged = ~np.isnan(scores)
    _, codes = np.unique(samples[judged], return_inverse=True)
    total = np.bincount(codes)
    right = np.bincount(codes, weights=scores[judged] == 1)
    least = int(total.min()) if len(total) else 0
    if least < 2:
        return {}
    wanted = [k for k in USUAL if k <= least] or [least]
    pairs = [(int(n), int(c)) for n, c in zip(total, right, strict=True)]
    return {f"pass@{k}": float(np.mean([pass_at_k(n, c, k) for n, c in pairs])) for k in wanted}
