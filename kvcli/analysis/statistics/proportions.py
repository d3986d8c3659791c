"""Intervals and tests of 0/1 scores: one proportion, and two of the same samples (docs/statistics.md)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Floats = NDArray[np.float64]

LEVEL = 0.95
_BESIDE = 1e-9
"""How far from the estimate the search for an end begins: at the estimate itself a flat cell has no spread."""


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval and how it was made; `note` says why another way was not taken."""

    low: float
    high: float
    method: str
    note: str = ""

    @property
    def bound(self) -> bool:
        """The worst case over what was not seen, because nearly all units agree (spread.share_bound)."""
        return "share bound" in self.method


@dataclass(frozen=True)
class Pairs:
    """Two 0/1 scores of the same n samples: how many only the first has right (`better`), and only the second."""

    n: int
    better: int
    worse: int

    def interval(self, level: float) -> Interval:
        return tango(self.n, self.better, self.worse, level)

    @property
    def discordance(self) -> float:
        """Share of samples that changed."""
        return (self.better + self.worse) / self.n


def normal_quantile(level: float) -> float:
    """z of a two-sided interval: 1.96 for 0.95."""
    return float(special.ndtri((1 + level) / 2))


@functools.cache
def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Score interval of one proportion.

    Source: Wilson 1927, J Am Stat Assoc 22:209; Newcombe 1998, Stat Med 17:857, method 3.
    """
    ends = stats.binomtest(int(successes), int(n)).proportion_ci(confidence_level=level, method="wilson")
    return Interval(float(ends.low), float(ends.high), "Wilson")


def tango(n: int, better: int, worse: int, level: float = LEVEL) -> Interval:
    """Score interval of the difference of two paired proportions: all differences the score test does not reject.

    n: pairs; better, worse: those in which only the first, only the second is 1. Without a changed pair it is
    +- z^2 / (n + z^2), never empty. Source: Tango 1998, Stat Med 17:891.
    """
    z, seen = normal_quantile(level), (better - worse) / n

    def apart(difference: float) -> float:
        return (seen - difference) ** 2 - z * z * score_variance(better / n, worse / n, difference) / n

    low = -1.0 if seen == -1 else optimize.brentq(apart, -1.0, seen - _BESIDE, xtol=1e-12)
    high = 1.0 if seen == 1 else optimize.brentq(apart, seen + _BESIDE, 1.0, xtol=1e-12)
    return Interval(float(low), float(high), "Tango")


def score_variance(better: float, worse: float, difference: float) -> float:
    """Variance of one pair's difference under a given true difference: its restricted maximum likelihood estimate.

    better, worse: shares of pairs. Source: Tango 1998, Stat Med 17:891; Nam 1997, Biometrics 53:1422.
    """
    a = 2.0
    b = -better - worse + (2 - better + worse) * difference
    c = -worse * difference * (1 - difference)
    estimate = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    return max(2 * estimate + difference * (1 - difference), 0.0)


def mcnemar_midp(better: int, worse: int) -> float:
    """Two-sided mid-p value of McNemar's test from the changed pairs; 1.0 where there are none.

    Source: Fagerland, Lydersen, Laake 2013, BMC Med Res Methodol 13:91, equation 2 of its supplement.
    """
    n = better + worse
    if n == 0:
        return 1.0
    smaller = min(better, worse)
    exactly = float(stats.binom.pmf(smaller, n, 0.5))
    return 1 - exactly / 2 if better == worse else float(2 * stats.binom.cdf(smaller, n, 0.5) - exactly)
