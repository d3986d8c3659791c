"""The exact sign-flip test of a mean of differences: where no unit has lost, each may as well have either sign.

Sources: Fisher 1935, The Design of Experiments, section 21; Pitman 1937, Suppl J R Stat Soc 4:119.
"""

from __future__ import annotations

import math

import numpy as np

from kvcli.analysis.statistics.proportions import Floats

MOST_EXACT = 24
"""Up to so many units that are not 0 every choice of signs is counted: 16.8 million, as sums of two halves."""
_TIE = 1e-9
"""Sums this near to the one seen, in terms of the largest possible one, equal it."""


def sign_flip_p(parts: Floats) -> float | None:
    """Two-sided: the share of all signs of the parts whose sum lies as far from 0. None beyond MOST_EXACT.

    parts: the sum of each unit's differences; those that are 0 play no part. A part moved to the side of the sum never
    makes p larger: the sum seen moves by as much as that of any other signs at most. Of 0/1 differences this is the
    exact McNemar test.
    """
    sizes = np.abs(parts[np.abs(parts) > _TIE])
    if len(sizes) > MOST_EXACT:
        return None
    seen = abs(float(parts.sum())) - _TIE * max(float(sizes.sum()), 1.0)
    first, second = _sums(sizes[::2]), np.sort(_sums(sizes[1::2]))
    beyond = len(second) * len(first) - int(np.searchsorted(second, seen - first, side="left").sum())
    return min(2 * beyond / (len(first) * len(second)), 1.0)


def sign_flip_bound(parts: Floats) -> float:
    """At least the p-value of sign_flip_p, for any number of units: Chernoff's bound, which is as monotone.

    Of parts all of one sign it is that p-value.
    """
    sizes, seen = np.abs(parts), abs(float(parts.sum()))
    if seen <= _TIE:
        return 1.0
    if seen >= float(sizes.sum()) - _TIE:
        return math.ldexp(2.0, -int((sizes > _TIE).sum()))
    tilts = np.geomspace(1e-3, 50.0, 200)[:, None] / max(float(sizes.max()), _TIE)
    turned = tilts * sizes
    exponents = (turned + np.log1p(np.exp(-2 * turned)) - math.log(2)).sum(axis=1) - tilts[:, 0] * seen
    return min(2 * math.exp(min(float(exponents.min()), 0.0)), 1.0)


def fewest_signs(level: float) -> int:
    """Fewest units not 0, all of one sign, of which the test excludes 0 at this level: 2^(1 - k) < 1 - level."""
    return math.floor(1 - math.log2(1 - level)) + 1


def _sums(sizes: Floats) -> Floats:
    """Of all choices of signs."""
    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums - size, sums + size])
    return sums
