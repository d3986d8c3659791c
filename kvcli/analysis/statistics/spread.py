"""Intervals of mean scores from their spread over samples or clusters: t, BCa bootstrap, ABC (docs/statistics.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from kvcli.analysis.statistics.proportions import LEVEL, Floats, Interval, normal_quantile, wilson

Codes = NDArray[np.int32]
Counts = NDArray[np.float32 | np.uint8]

MIN_NONZERO = 10
"""A bootstrap of fewer non-zero differences says little: the resamples hardly differ."""
RESAMPLES = 4999
SEED = 0
_KEEP_UNITS = 16_000
"""Resamples of up to so many units stay in memory (80 MB) for the next cell of the same size."""
_BATCH = 256
"""Resamples drawn at a time."""
_TIE = 1e-6
"""Resampled means this near to the mean, in terms of the largest value, equal it: they are sums in single precision."""


@dataclass(frozen=True)
class Spread:
    """A mean over units and what a t interval of any level needs."""

    mean: float
    error: float
    """Standard error of the mean."""
    units: int
    apart: int
    """Units unlike the most common value."""
    least: float
    most: float
    """The range the mean can lie in."""
    clustered: bool

    @property
    def alike(self) -> bool:
        """So few units are unlike the others that their spread says little."""
        return self.apart < min(MIN_NONZERO, self.units / 2)

    def interval(self, level: float) -> Interval | None:
        """t interval, cut to the range; at least the share bound where units are alike. None for one unit alone."""
        if self.units < 2:
            return None
        half = float(special.stdtrit(self.units - 1, (1 + level) / 2)) * self.error
        low, high = max(self.mean - half, self.least), min(self.mean + half, self.most)
        name = f"t over {self.units} clusters" if self.clustered else "t"
        if not self.alike:
            return Interval(low, high, name)
        below, above = share_bound(self.mean, self.units, self.least, self.most, level)
        return Interval(min(low, below), max(high, above), f"{name} with share bound")


@dataclass(frozen=True)
class Skewed:
    """A mean difference and what its ABC interval of any level needs."""

    mean: float
    error: float
    """Standard error, the variance taken over n as the bootstrap does."""
    acceleration: float
    units: int

    def interval(self, level: float) -> Interval:
        """The analytic form of BCa for a mean, for levels whose ends lie beyond the resamples.

        Source: DiCiccio, Efron 1992, Biometrika 79:231 (a mean has no curvature, so z0 = a).
        """
        ends = []
        for z in (-normal_quantile(level), normal_quantile(level)):
            w = self.acceleration + z
            shrunk = 1 - self.acceleration * w
            ends.append(math.copysign(1.0, w) if shrunk <= 0 else self.mean + self.error * w / shrunk**2)
        return Interval(max(ends[0], -1.0), min(ends[1], 1.0), "ABC")


def clustered(clusters: Codes | None) -> Codes | None:
    """Codes without -1 (such samples become clusters of one), or None where no two samples share a cluster."""
    if clusters is None or not len(clusters):
        return None
    named = clusters[clusters >= 0]
    if len(np.unique(named)) == len(named):
        return None
    codes = clusters.copy()
    codes[codes < 0] = clusters.max() + 1 + np.arange(int((codes < 0).sum()), dtype=np.int32)
    return codes


def unit_sums(values: Floats, codes: Codes | None) -> tuple[Floats, Floats]:
    """Sum of the values and number of samples of each independent unit."""
    if codes is None:
        return values, np.ones(len(values))
    _, unit = np.unique(codes, return_inverse=True)
    sums: Floats = np.bincount(unit, weights=values).astype(np.float64)
    return sums, np.bincount(unit).astype(np.float64)


def residuals(values: Floats, codes: Codes | None) -> Floats:
    """What each unit adds to the deviation of the mean over all samples: linearised ratio of cluster totals.

    Source: Cochran 1977, Sampling Techniques, chapter 9A (ratio to size).
    """
    sums, sizes = unit_sums(values, codes)
    found: Floats = (sums - values.mean() * sizes) / len(values)
    return found


def spread(values: Floats, codes: Codes | None, least: float, most: float) -> Spread:
    """values: [n]; codes: as `clustered` gives them.

    With clusters of one size the standard error is that of the mean of the clusters' means.
    """
    parts = residuals(values, codes)
    units = len(parts)
    error = math.sqrt(units / (units - 1) * float(parts @ parts)) if units > 1 else math.nan
    return Spread(float(values.mean()), error, units, _units_apart(values, codes), least, most, codes is not None)


def _units_apart(values: Floats, codes: Codes | None) -> int:
    """Units whose mean is not the most common one."""
    sums, sizes = unit_sums(values, codes)
    counts = np.unique(np.round(sums / sizes, 9), return_counts=True)[1]
    return len(sums) - int(counts.max())


def share_bound(mean: float, units: int, least: float, most: float, level: float = LEVEL) -> tuple[float, float]:
    """How far the mean may lie off when the units seen agree: at most a share w of all units is unlike them.

    w is Wilson's upper limit for 0 of `units`; at worst those have the lowest or the highest possible value. For 0/1
    scores that all agree this is what Wilson's and Tango's intervals give. It says nothing of the side of 0: the
    sign-flip test does.
    """
    w = wilson(0, units, level).high
    return (1 - w) * mean + w * least, (1 - w) * mean + w * most


def t_p(found: Spread) -> float | None:
    """p-value of mean 0; None where all units agree (no spread to compare with)."""
    if found.units < 2:
        return None
    if found.error < 1e-12:
        return 1.0 if abs(found.mean) < 1e-12 else None
    return float(2 * special.stdtr(found.units - 1, -abs(found.mean) / found.error))


def skewed(difference: Floats) -> Skewed:
    parts = residuals(difference, None)
    return Skewed(float(difference.mean()), math.sqrt(float(parts @ parts)), acceleration(parts), len(parts))


def acceleration(parts: Floats) -> float:
    """Efron 1987, J Am Stat Assoc 82:171. parts: what each unit adds to the statistic; not all 0."""
    return float((parts**3).sum() / (6 * (parts**2).sum() ** 1.5))


def bca(difference: Floats, level: float = LEVEL, seed: int = SEED) -> Interval:
    """BCa interval of a mean of differences that are not all the same."""
    means = resampled(difference[:, None], seed)[:, 0]
    value = float(difference.mean())
    low, high = bca_ends(means, value, _TIE * float(np.abs(difference).max()), residuals(difference, None), level)
    return Interval(low, high, "BCa bootstrap")


def bca_ends(means: Floats, value: float, tie: float, parts: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Ends of the BCa interval. means: [RESAMPLES] the statistic of each resample; value: of the data; parts: what each
    unit adds. Of resamples that equal the data one half counts as below, as in scipy.stats.bootstrap.

    Source: Efron 1987, J Am Stat Assoc 82:171.
    """
    below = ((means < value - tie).sum() + (means <= value + tie).sum()) / 2 / len(means)
    bias, a = float(special.ndtri(below)), acceleration(parts)
    shifted = [bias + z for z in (-normal_quantile(level), normal_quantile(level))]
    shares = [float(special.ndtr(bias + s / (1 - a * s))) for s in shifted]
    low, high = np.quantile(means, shares)
    return float(low), float(high)


def resampled(sums: Floats, seed: int = SEED) -> Floats:
    """[RESAMPLES, k] means over as many units as there are, drawn with replacement. sums: [units, k], one value per
    unit and column; all columns are drawn together. Which units are drawn depends on their number and the seed alone.
    """
    units, columns = len(sums), sums.astype(np.float32)
    parts = _kept(units, seed) if units <= _KEEP_UNITS else _draws(units, seed)
    return np.concatenate(
        [(part.astype(np.float32, copy=False) @ columns).astype(np.float64) / units for part in parts]
    )


@lru_cache(maxsize=4)
def _kept(units: int, seed: int) -> list[Counts]:
    kind = np.float32 if units <= _KEEP_UNITS // 4 else np.uint8
    return [part.astype(kind) for part in _draws(units, seed)]


def _draws(units: int, seed: int) -> Iterator[Counts]:
    """How often each unit was drawn, [resamples, units], a few resamples at a time."""
    rng = np.random.default_rng((seed, units))
    for start in range(0, RESAMPLES, _BATCH):
        rows = min(_BATCH, RESAMPLES - start)
        drawn = rng.integers(0, units, (rows, units)) + np.arange(rows)[:, None] * units
        yield np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units).astype(np.uint8)
