"""Two relative changes of a score: chance-adjusted retention, and the paper's delta P, each with its interval.

Retention (P - c) / (P_full - c) counts only what lies above the guessing level c, so tasks of different chance compare:
0.25 -> 0.25 on four options is nothing kept, which delta P cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy import optimize

from kvcli.analysis.statistics import spread, stats
from kvcli.analysis.statistics.stats import LEVEL, Codes, Difference, Floats, Interval

NOT_ABOVE = "full is not clearly above {chance:.2f}, so there is nothing to keep"
_FAR = 1e6


@dataclass(frozen=True)
class Relative:
    """A score as a share of full's, both less chance. `loss` is value - 1: the paper's delta P where chance is 0."""

    value: float | None
    """1 = everything kept; None where full is not above chance at all."""
    interval: Interval | None
    """None, with the reason in `note`, where full's own interval reaches down to chance."""
    chance: float
    note: str = ""

    @property
    def loss(self) -> float | None:
        return None if self.value is None else self.value - 1

    @property
    def loss_interval(self) -> Interval | None:
        found = self.interval
        return found and Interval(found.low - 1, found.high - 1, found.method, found.note)


def retention(
    compressed: Floats, full: Floats, chance: float = 0.0, clusters: Codes | None = None, *,
    difference: Difference | None = None, level: float = LEVEL,
) -> Relative:  # fmt: skip
    """(mean of compressed - chance) / (mean of full - chance) on the same samples.

    difference: stats.paired_difference of the same arrays, where it is known. The interval is recovered from those of
    the difference and of full's score, so a cell without a changed sample keeps a width.
    Source: MOVER for ratios: Donner, Zou 2012, Stat Methods Med Res 21:347.
    """
    above = float(full.mean()) - chance
    if above <= 0:
        return Relative(None, None, chance, NOT_ABOVE.format(chance=chance))
    change = difference or stats.paired_difference(compressed, full, clusters)
    value = 1 + change.value / above
    ends, base = change.at(level), stats.score_interval(full, clusters, level)
    if base is None or base.low <= chance:
        return Relative(value, None, chance, NOT_ABOVE.format(chance=chance))
    if ends is None:
        return Relative(value, None, chance, "no interval of the difference")
    together = correlation(compressed - full, full, clusters)
    low, high = ratio_ends(
        change.value, (ends.low, ends.high), above, (base.low - chance, base.high - chance), together
    )  # fmt: skip
    return Relative(value, Interval(1 + low, 1 + high, f"MOVER of {ends.method} and {base.method}"), chance)


def correlation(first: Floats, second: Floats, clusters: Codes | None = None) -> float:
    """Of the two means, as their samples or clusters vary; 0 where either does not."""
    codes = spread.clustered(clusters)
    a, b = spread.residuals(first, codes), spread.residuals(second, codes)
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 1e-15 else 0.0


def ratio_ends(
    top: float, top_ends: tuple[float, float], below: float, below_ends: tuple[float, float], together: float
) -> tuple[float, float]:
    """Interval of top / below from the two intervals and the correlation of the estimates; below_ends lie above 0.

    All k for which 0 lies in the interval of top - k below. With symmetric intervals this is Fieller's (1954).
    """

    def beyond(sign: int) -> Callable[[float], float]:
        """How far top - k below lies on one side of 0, in excess of its interval's width there."""

        def excess(k: float) -> float:
            wide = abs(top - top_ends[0 if sign > 0 else 1])
            other = abs(below - below_ends[1 if (k > 0) == (sign > 0) else 0])
            variance = wide**2 + (k * other) ** 2 - 2 * together * wide * k * other
            return sign * (top - k * below) - math.sqrt(max(variance, 0.0))

        return excess

    return _end(beyond(1), top / below, -1.0), _end(beyond(-1), top / below, 1.0)


def _end(excess: Callable[[float], float], start: float, step: float) -> float:
    """Where `excess` first rises above 0 on the way from `start` in the direction of `step`."""
    if excess(start) >= 0:
        return start
    far = step
    while excess(start + far) < 0:
        far *= 2
        if abs(far) > _FAR:
            return math.copysign(math.inf, step)
    return float(optimize.brentq(excess, *sorted((start, start + far)), xtol=1e-12))
