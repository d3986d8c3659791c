"""What a cell could have shown: the smallest difference it can detect, and the samples a verdict would need.

Both take what was observed: how many samples (or clusters) changed, or how differences spread. Power 80 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scipy import optimize, special

from kvcli.analysis.statistics import signs
from kvcli.analysis.statistics.proportions import LEVEL, Pairs, normal_quantile, score_variance
from kvcli.analysis.statistics.spread import Skewed, Spread
from kvcli.analysis.statistics.stats import Difference

POWER = 0.8
_LARGEST = 10**9


@dataclass(frozen=True)
class Needed:
    """How large a sample would probably do. samples: about, two digits; units: the same in clusters."""

    samples: int
    units: int


def detectable(found: Difference, level: float = LEVEL) -> float | None:
    """Smallest true loss or gain that has an 80 % chance of being established at this size and level.

    0/1 scores: Connor's formula at the observed share of changed samples; where that is smaller than the difference
    itself, exactly from the fewest losses that are established. Others: noncentral t, normal for BCa. None where no
    difference would be.
    """
    basis = found.basis
    if found.interval is None or basis is None:
        return None
    if isinstance(basis, Pairs):
        return _detectable_share(basis.n, basis.discordance, level)
    if _by_signs(basis) and basis.units < signs.fewest_signs(level):
        return None
    if isinstance(basis, Skewed):
        return _possible((normal_quantile(level) + _beta()) * basis.error)
    smallest = _noncentrality(basis.units, level) * basis.error
    if basis.alike:
        flat = _detectable_share(basis.units, 0.0, level)
        return None if flat is None else _possible(max(smallest, flat))
    return _possible(smallest)


def _possible(difference: float) -> float | None:
    return difference if difference <= 1 else None


def _beta() -> float:
    return float(special.ndtri(POWER))


def _detectable_share(n: int, discordance: float, level: float) -> float | None:
    """discordance: the observed share of samples that changed.

    Connor 1987, Biometrics 43:207, solved for the difference. Where that exceeds the discordance, hardly a sample
    changes but by the loss: then the loss that gives the fewest losses needed with POWER, by the binomial.
    """
    alpha, beta = normal_quantile(level), _beta()

    def short(difference: float) -> float:
        return (
            math.sqrt(n) * difference - alpha * math.sqrt(discordance) - beta * math.sqrt(discordance - difference**2)
        )

    if discordance and short(discordance) >= 0:
        return float(optimize.brentq(short, 1e-12, discordance))
    fewest = fewest_losses(n, level)
    if fewest is None:
        return None
    return max(float(special.betaincinv(fewest, n - fewest + 1, POWER)), discordance)


def fewest_losses(n: int, level: float) -> int | None:
    """Fewest samples of n that must be lost, with none gained, to establish a loss: Tango's interval lies below 0 (the
    score test of 0 with k losses is z^2 = k) and the mid-p value 2^-k is below 1 - level. None where n are too few."""
    fewest = max(math.floor(normal_quantile(level) ** 2), math.floor(-math.log2(1 - level))) + 1
    return fewest if fewest <= n else None


def _noncentrality(units: int, level: float) -> float:
    """By how many standard errors the truth must lie off 0 for a t test to see it with POWER."""
    freedom, limit = units - 1, float(special.stdtrit(units - 1, (1 + level) / 2))

    def short(shift: float) -> float:
        return 1 - float(special.nctdtr(freedom, shift, limit)) - POWER

    return float(optimize.brentq(short, 0.0, 3 * limit + 10))


def needed(found: Difference, margin: float, level: float = LEVEL) -> Needed | None:
    """Samples for an 80 % chance of a verdict if the true difference and spread are those observed.

    The verdict is whichever takes fewer: a loss (a gain), or no loss beyond the margin. None without an interval.
    """
    if found.interval is None or found.basis is None:
        return None
    nulls = [null for null in (0.0, -margin) if found.value != null and not (null and found.value < null)]
    units = min((_units(found.basis, found.value, null, level) for null in nulls), default=_LARGEST)
    units = max(units, found.units + 1)
    return Needed(about(units * found.n / found.units), about(units))


def _units(basis: Any, value: float, null: float, level: float) -> int:
    if isinstance(basis, Pairs):
        return pairs_needed(basis.better / basis.n, basis.worse / basis.n, null, level)
    spread = basis.error * math.sqrt(basis.units)
    alike = isinstance(basis, Spread) and basis.alike
    flat = pairs_needed(max(value, 0.0), max(-value, 0.0), null, level) if alike else 0
    fewest = signs.fewest_signs(level) if not null and _by_signs(basis) else 0
    return max(units_needed(spread, value - null, level), flat, fewest)


def _by_signs(basis: Spread | Skewed) -> bool:
    """Whether so few of these units have the sign-flip test, not t's."""
    return isinstance(basis, Skewed) or basis.alike or not basis.clustered


def pairs_needed(better: float, worse: float, null: float = 0.0, level: float = LEVEL) -> int:
    """Pairs for POWER to tell the difference better - worse (shares that changed) from a null difference.

    Sources: Connor 1987, Biometrics 43:207 for null 0; Nam 1997, Biometrics 53:1422 for a margin.
    """
    difference = better - worse
    restricted = score_variance(better, worse, null)
    own = max(better + worse - difference**2, 0.0)
    spent = normal_quantile(level) * math.sqrt(restricted) + _beta() * math.sqrt(own)
    return _whole((spent / (difference - null)) ** 2)


def units_needed(spread: float, distance: float, level: float = LEVEL) -> int:
    """Units for POWER of a t test of a mean that lies `distance` off; spread: standard deviation of the units."""
    if spread <= 1e-12 * abs(distance):  # alike up to rounding
        return 2

    def short(units: float) -> float:
        limit = float(special.stdtrit(units - 1, (1 + level) / 2))
        return 1 - float(special.nctdtr(units - 1, math.sqrt(units) * abs(distance) / spread, limit)) - POWER

    return _first(short)


def _first(short: Callable[[float], float]) -> int:
    """The smallest whole number above 1 from which `short` is no longer negative."""
    high = 4.0
    while short(high) < 0:
        high *= 2
        if high > _LARGEST:
            return _LARGEST
    low = high / 2 if high > 4 else 2.0
    return 2 if short(low) >= 0 else _whole(float(optimize.brentq(short, low, high, xtol=1e-6)))


def _whole(units: float) -> int:
    return _LARGEST if not units < _LARGEST else max(math.ceil(units - 1e-6), 2)


def about(count: float) -> int:
    """Rounded up to two digits: 1,234 -> 1,300."""
    step = 10 ** max(math.floor(math.log10(max(count, 1))) - 1, 0)
    return math.ceil(count / step - 1e-9) * step
