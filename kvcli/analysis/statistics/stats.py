"""Intervals and tests of every table (docs/statistics.md). Pure functions of numpy arrays; 95 % unless told.

Conventions: values are scores in [0, 1]; a difference is compressed minus full, in [-1, 1], so a loss is negative.
Formulas: proportions.py for 0/1 scores, spread.py for graded and clustered ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcli.analysis.statistics import spread
from kvcli.analysis.statistics.proportions import LEVEL, Floats, Interval, Pairs, mcnemar_midp, tango, wilson
from kvcli.analysis.statistics.spread import MIN_NONZERO, RESAMPLES, SEED, Codes, Skewed, Spread

__all__ = [
    "ALPHA", "ESTABLISHED", "LEVEL", "MIN_NONZERO", "RESAMPLES", "SEED", "Codes", "Difference", "Floats", "Interval",
    "is_binary", "mcnemar_midp", "paired_difference", "score_interval", "tango", "wilson",
]  # fmt: skip

ALPHA = 0.05
ESTABLISHED = "the 95 % paired interval excludes 0 and p < 0.05 (where there is no p, the interval alone decides)"
"""What makes a difference established (Difference.verdict); legends, reports and docs/statistics.md quote it."""


@dataclass(frozen=True)
class Difference:
    """Paired difference, compressed minus full, over the samples both have."""

    value: float
    interval: Interval | None
    """95 %, not adjusted for the number of comparisons. None where the data allow none: one sample, one cluster."""
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
    basis: Pairs | Spread | Skewed | None = None
    """What intervals of other levels follow from."""

    @property
    def verdict(self) -> str:
        """'loss' or 'gain' where ESTABLISHED holds, else 'open'. Of this comparison alone: verdicts.py adjusts."""
        if self.interval is None or self.interval.low <= 0 <= self.interval.high:
            return "open"
        if self.p is not None and self.p >= ALPHA:
            return "open"
        return "loss" if self.interval.high < 0 else "gain"

    def at(self, level: float) -> Interval | None:
        """The interval of a level of at least 95 %, such as one that holds for many comparisons at once."""
        if self.interval is None or self.basis is None or level <= LEVEL:
            return self.interval
        found = self.basis.interval(level)
        if found is None:
            return None
        return replace(found, low=min(found.low, self.interval.low), high=max(found.high, self.interval.high))


def score_interval(values: Floats, clusters: Codes | None = None, level: float = LEVEL) -> Interval | None:
    """Interval of a mean score: Wilson for 0/1, t for graded scores, t over clusters where samples are clustered.

    values: [n] in [0, 1]; clusters: [n] codes, -1 = its own. None where one unit alone says nothing about spread.
    """
    codes = spread.clustered(clusters)
    if codes is None and is_binary(values):
        return wilson(int(values.sum()), len(values), level)
    return spread.spread(values, codes, 0.0, 1.0).interval(level)


def paired_difference(compressed: Floats, full: Floats, clusters: Codes | None = None, seed: int = SEED) -> Difference:
    """Mean of compressed - full on the same samples, its interval and its test.

    Clusters: t interval over clusters. 0/1 scores: Tango's interval, mid-p McNemar. Graded scores: BCa bootstrap,
    or a paired t interval with the reason where differences are too few or nearly all the same. compressed, full: [n];
    clusters: [n].
    """
    difference = compressed - full
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    codes = spread.clustered(clusters)
    n, value = len(difference), float(difference.mean())
    if codes is None and is_binary(compressed) and is_binary(full):
        pairs, p = Pairs(n, better, worse), mcnemar_midp(better, worse)
        return Difference(value, pairs.interval(LEVEL), p, "mid-p McNemar", n, n, better, worse, pairs)
    found = spread.spread(difference, codes, -1.0, 1.0)
    basis: Spread | Skewed = found
    interval, test = found.interval(LEVEL), "paired t" if codes is None else "t over clusters"
    few = better + worse < MIN_NONZERO
    if codes is None and not few and not found.alike:
        interval, basis = spread.bca(difference, LEVEL, seed), spread.skewed(difference)
    elif codes is None and interval:
        why = f"fewer than {MIN_NONZERO} non-zero differences" if few else "nearly all differences are the same"
        interval = replace(interval, note=f"{why}, so no bootstrap")
    return Difference(value, interval, spread.t_p(found), test, n, found.units, better, worse, basis)


def is_binary(values: Floats) -> bool:
    return bool(((values == 0) | (values == 1)).all())
