"""Intervals and tests of every table (docs/statistics.md). Pure functions of numpy arrays; 95 % unless told.

Conventions: values are scores in [0, 1]; a difference is compressed minus full, in [-1, 1], so a loss is negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Codes = NDArray[np.int32]

LEVEL = 0.95
ALPHA = 0.05
ESTABLISHED = "the 95 % paired interval excludes 0 and p < 0.05 (where there is no p, the interval alone decides)"
"""What makes a difference established (Difference.verdict); legends, reports and docs/statistics.md quote it."""
MIN_NONZERO = 10
"""A bootstrap of fewer non-zero differences says little: the resamples hardly differ."""
RESAMPLES = 4999
SEED = 0
_BATCH_VALUES = 2_000_000
"""Values resampled at a time: bounds the memory of the bootstrap, not its result."""


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval and how it was made; `note` says why another way was not taken."""

    low: float
    high: float
    method: str
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """Paired difference, compressed minus full, over the samples both have."""

    value: float
    interval: Interval | None
    """None where the data allow none: one sample, one cluster."""
    p: float | None
    """Two-sided p-value of no difference, not adjusted for the number of comparisons."""
    test: str
    n: int
    """Pairs."""
    units: int
    """What counts as independent: pairs, or clusters of pairs."""
    better: int
    worse: int
    """Samples that compression improved and worsened."""

    @property
    def verdict(self) -> str:
        """'loss' or 'gain' where ESTABLISHED holds, else 'open'."""
        if self.interval is None or self.interval.low <= 0 <= self.interval.high:
            return "open"
        if self.p is not None and self.p >= ALPHA:
            return "open"
        return "loss" if self.interval.high < 0 else "gain"


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Score interval of one proportion.

    Source: Wilson 1927, J Am Stat Assoc 22:209; Newcombe 1998, Stat Med 17:857, method 3.
    """
    ends = stats.binomtest(int(successes), int(n)).proportion_ci(confidence_level=level, method="wilson")
    return Interval(float(ends.low), float(ends.high), "Wilson")


def newcombe_paired(both: int, first_only: int, second_only: int, neither: int, level: float = LEVEL) -> Interval:
    """Interval of p_first - p_second for paired 0/1 data, from the two Wilson intervals and their correlation.

    The arguments are the numbers of pairs. phi is continuity-corrected when positive. Never empty: without discordant
    pairs it still has a width. Source: Newcombe 1998, Stat Med 17:2635, method 10.
    """
    a, b, c, d = both, first_only, second_only, neither
    n = a + b + c + d
    first, second = wilson(a + b, n, level), wilson(a + c, n, level)
    p1, p2 = (a + b) / n, (a + c) / n
    below1, above1, below2, above2 = p1 - first.low, first.high - p1, p2 - second.low, second.high - p2
    phi = _phi(a, b, c, d)
    low = p1 - p2 - _joined(below1, above2, phi)
    high = p1 - p2 + _joined(above1, below2, phi)
    return Interval(max(low, -1.0), min(high, 1.0), "Newcombe paired")


def _phi(a: int, b: int, c: int, d: int) -> float:
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    cross = float(a * d - b * c)
    if cross > 0:
        cross = max(cross - (a + b + c + d) / 2, 0.0)
    return cross / math.sqrt(margins)


def _joined(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))


def mcnemar_midp(first_only: int, second_only: int) -> float:
    """Two-sided mid-p value of McNemar's test from the discordant pairs; 1.0 where there are none.

    Source: Fagerland, Lydersen, Laake 2013, BMC Med Res Methodol 13:91, equation 2 of its supplement.
    """
    n = first_only + second_only
    if n == 0:
        return 1.0
    smaller = min(first_only, second_only)
    p = 2 * stats.binom.cdf(smaller, n, 0.5) - stats.binom.pmf(smaller, n, 0.5)
    return 1 - float(stats.binom.pmf(smaller, n, 0.5)) / 2 if first_only == second_only else float(p)


def score_interval(values: Floats, clusters: Codes | None = None, level: float = LEVEL) -> Interval | None:
    """Interval of a mean score: Wilson for 0/1, t for graded scores, t over clusters where samples are clustered.

    values: [n] in [0, 1]; clusters: [n] codes, -1 = its own. None where one unit alone says nothing about spread.
    """
    codes = _clustered(clusters)
    if codes is None and is_binary(values):
        return wilson(int(values.sum()), len(values), level)
    return _t_interval(values, codes, 0.0, 1.0, level)


def paired_difference(
    compressed: Floats, full: Floats, clusters: Codes | None = None, level: float = LEVEL, seed: int = SEED
) -> Difference:
    """Mean of compressed - full on the same samples, its interval and its test.

    Clusters: t interval over clusters. 0/1 scores: Newcombe's interval, mid-p McNemar. Graded scores: BCa bootstrap,
    or a paired t interval with the reason where the differences are too few. compressed, full: [n]; clusters: [n].
    """
    difference = compressed - full
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    codes = _clustered(clusters)
    n, value = len(difference), float(difference.mean())
    units = n if codes is None else _unit_sums(difference, codes)[1].size
    if codes is not None:
        interval = _t_interval(difference, codes, -1.0, 1.0, level)
        return Difference(value, interval, _t_p(difference, codes), "t over clusters", n, units, better, worse)
    if is_binary(compressed) and is_binary(full):
        both = int((compressed * full).sum())
        paired = newcombe_paired(both, better, worse, n - both - better - worse, level)
        return Difference(value, paired, mcnemar_midp(better, worse), "mid-p McNemar", n, n, better, worse)
    interval = _graded_interval(difference, level, seed)
    return Difference(value, interval, _t_p(difference, None), "paired t", n, n, better, worse)


def is_binary(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _graded_interval(difference: Floats, level: float, seed: int) -> Interval | None:
    """Source of BCa: Efron 1987, J Am Stat Assoc 82:171, as scipy.stats.bootstrap implements it."""
    nonzero = int(np.count_nonzero(difference))
    if nonzero < MIN_NONZERO or np.ptp(difference) == 0:
        found = _t_interval(difference, None, -1.0, 1.0, level)
        reason = f"fewer than {MIN_NONZERO} non-zero differences, so no bootstrap" * (nonzero < MIN_NONZERO)
        return found and replace(found, note=reason)
    ends = stats.bootstrap(
        (difference,), np.mean, confidence_level=level, n_resamples=RESAMPLES, method="BCa", vectorized=True,
        batch=max(1, _BATCH_VALUES // len(difference)), rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(float(ends.low), float(ends.high), "BCa bootstrap")


def _clustered(clusters: Codes | None) -> Codes | None:
    """Codes without -1 (such samples become clusters of one), or None where no two samples share a cluster."""
    if clusters is None or not len(clusters):
        return None
    named = clusters[clusters >= 0]
    if len(np.unique(named)) == len(named):
        return None
    codes = clusters.copy()
    codes[codes < 0] = clusters.max() + 1 + np.arange(int((codes < 0).sum()), dtype=np.int32)
    return codes


def _unit_sums(values: Floats, codes: Codes | None) -> tuple[Floats, Floats]:
    """Sum of the values and number of samples of each independent unit."""
    if codes is None:
        return values, np.ones(len(values))
    _, unit = np.unique(codes, return_inverse=True)
    sums: Floats = np.bincount(unit, weights=values).astype(np.float64)
    return sums, np.bincount(unit).astype(np.float64)


def _standard_error(values: Floats, codes: Codes | None) -> tuple[float, int]:
    """Standard error of the mean of all samples, and the number of units.

    Linearised ratio of cluster totals, so that the mean stays the plain mean over samples; with clusters of one size
    it equals the standard error of the mean of cluster means. Source: Cochran 1977, Sampling Techniques, chapter 9A
    (ratio to size).
    """
    sums, sizes = _unit_sums(values, codes)
    units = len(sums)
    if units < 2:
        return math.nan, units
    residual = sums - values.mean() * sizes
    variance = units / (units - 1) * float(residual @ residual) / len(values) ** 2
    return math.sqrt(variance), units


def _t_interval(values: Floats, codes: Codes | None, least: float, most: float, level: float) -> Interval | None:
    """t interval of the mean, cut to the possible range; None for one unit alone.

    Where nearly all units agree their spread says little (with none apart, the interval would have no width and prove
    nothing): then it is at least as wide as the share bound.
    """
    error, units = _standard_error(values, codes)
    if units < 2:
        return None
    mean, name = float(values.mean()), "t" if codes is None else f"t over {units} clusters"
    half = float(stats.t.ppf((1 + level) / 2, units - 1)) * error
    low, high = max(mean - half, least), min(mean + half, most)
    if _units_apart(values, codes) >= min(MIN_NONZERO, units / 2):
        return Interval(low, high, name)
    below, above = _share_bound(mean, units, least, most, level)
    return Interval(min(low, below), max(high, above), f"{name} with share bound")


def _units_apart(values: Floats, codes: Codes | None) -> int:
    """Units whose mean is not the most common one."""
    sums, sizes = _unit_sums(values, codes)
    counts = np.unique(np.round(sums / sizes, 9), return_counts=True)[1]
    return len(sums) - int(counts.max())


def _share_bound(mean: float, units: int, least: float, most: float, level: float) -> tuple[float, float]:
    """How far the mean may lie off when the units seen agree: at most a share w of all units is unlike them.

    w is Wilson's upper limit for 0 of `units`; at worst those have the lowest or the highest possible value. For 0/1
    scores that all agree this is what Wilson's and Newcombe's intervals give.
    """
    w = wilson(0, units, level).high
    return (1 - w) * mean + w * least, (1 - w) * mean + w * most


def _t_p(values: Floats, codes: Codes | None) -> float | None:
    """p-value of mean 0; None where all units agree (no spread to compare with)."""
    error, units = _standard_error(values, codes)
    if units < 2:
        return None
    if error < 1e-12:
        return 1.0 if abs(float(values.mean())) < 1e-12 else None
    return float(2 * stats.t.sf(abs(float(values.mean())) / error, units - 1))
