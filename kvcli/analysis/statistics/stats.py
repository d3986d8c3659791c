"""Intervals and tests of every table (docs/statistics.md). Pure functions of numpy arrays; 95 % unless told.

Conventions: values are scores in [0, 1]; a difference is compressed minus full, in [-1, 1], so a loss is negative.
Formulas: proportions.py for 0/1 scores, spread.py for graded and clustered ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcli.analysis.statistics import signs, spread
from kvcli.analysis.statistics.proportions import LEVEL, Floats, Interval, Pairs, mcnemar_midp, tango, wilson
from kvcli.analysis.statistics.spread import MIN_NONZERO, RESAMPLES, SEED, Codes, Skewed, Spread

__all__ = [
    "ALPHA", "ESTABLISHED", "LEVEL", "MIN_NONZERO", "RESAMPLES", "SEED", "Codes", "Difference", "Floats", "Interval",
    "is_binary", "mcnemar_midp", "paired_difference", "score_interval", "tango", "wilson",
]  # fmt: skip

ALPHA = 0.05
BESIDE = 1e-9
"""How far from 0 an interval ends that excludes it and no more."""
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
    by_signs: bool = False
    """p is that of the sign-flip test, which decides on which side of 0 an interval ends."""

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
        wider = replace(found, low=min(found.low, self.interval.low), high=max(found.high, self.interval.high))
        if not self.by_signs or self.p is None:
            return wider
        if self.p < 1 - level:
            return _cut(wider, self.value)
        return replace(wider, low=min(wider.low, 0.0), high=max(wider.high, 0.0))


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
    or a paired t interval with the reason where differences are too few or nearly all the same; the exact sign-flip
    test of up to 24 differences that are not 0, t's beyond. Clusters that nearly all agree have that test too.
    compressed, full: [n]; clusters: [n].
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
    interval = found.interval(LEVEL)
    few = better + worse < MIN_NONZERO
    if codes is None and not few and not found.alike:
        interval, basis = spread.bca(difference, LEVEL, seed), spread.skewed(difference)
    elif codes is None and interval:
        why = f"fewer than {MIN_NONZERO} non-zero differences" if few else "nearly all differences are the same"
        interval = replace(interval, note=f"{why}, so no bootstrap")
    tested, test, by_signs = _test(found, spread.unit_sums(difference, codes)[0])
    if by_signs and interval and tested is not None and tested < ALPHA:
        interval = _cut(interval, value)
    return Difference(value, interval, tested, test, n, found.units, better, worse, basis, by_signs)


def _test(found: Spread, parts: Floats) -> tuple[float | None, str, bool]:
    """p, its name, and whether it is by signs. parts: the sum of each unit.

    Where nearly all units agree their spread says little of a test too, so signs serve there for any number of units.
    Other clusters have t: their sums are of many samples, and a few of them could show nothing in a family by signs.
    """
    over = " over clusters" if found.clustered else ""
    if found.units < 2 or (found.clustered and not found.alike):
        return spread.t_p(found), f"t{over}" if over else "paired t", False
    p = signs.sign_flip_p(parts)
    if p is None and found.alike:
        p = signs.sign_flip_bound(parts)
    if p is not None:
        return p, f"sign flips{over}", True
    return spread.t_p(found), "paired t", False


def _cut(interval: Interval, value: float) -> Interval:
    """Ended at 0, on the side of the value: the sign-flip test excludes 0, the interval did not."""
    if value < 0 <= interval.high:
        return replace(interval, high=-BESIDE)
    return replace(interval, low=BESIDE) if interval.low <= 0 < value else interval


def is_binary(values: Floats) -> bool:
    return bool(((values == 0) | (values == 1)).all())
