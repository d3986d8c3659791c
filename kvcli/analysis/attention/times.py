"""Colours of multiples: 1 in the middle, half as far from it as double."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcli.analysis.attention.data import Floats
from kvcli.analysis.figures.style import Style

SMALLEST, LARGEST = 2.0, 64.0
"""How far the colours reach on either side of 1."""
TICKS = 5


def furthest(every: Sequence[Floats | None]) -> float:
    """The power of two within which all of them lie, or LARGEST."""
    logs = [np.abs(np.log2(np.maximum(values, 1 / LARGEST))).max() for values in every if values is not None]
    return float(np.clip(2.0 ** np.ceil(max(logs, default=1.0) - 1e-9), SMALLEST, LARGEST))


def times_shades(top: float, look: Style) -> dict[str, Any]:
    """How matplotlib draws them."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    shades = LinearSegmentedColormap.from_list("times", look.theme.losses)
    return {"cmap": shades.with_extremes(bad=look.theme.page), "norm": LogNorm(1 / top, top, clip=True)}


def times_bar(bar: Any, top: float) -> None:
    """Ticks at powers of two, as 1/4, 1/2, 1, 2, 4."""
    most = round(np.log2(top))
    step = -(-2 * most // (TICKS - 1))
    places = [e for e in range(-most, most + 1) if e % step == 0]
    bar.set_ticks([2.0**e for e in places], labels=[f"{2**e}" if e >= 0 else f"1/{2**-e}" for e in places])
    bar.minorticks_off()
