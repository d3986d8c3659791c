"""Marks at one place: drawn one inside another, the first ones larger, so that all show where they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR = 3.0
"""Points (of 1/72 inch) between two marks, at most, for the later one to hide the earlier one."""
STEP = 4.0
"""Points by which a mark is larger than the next one inside it."""


def depths(ax: Axes, places: Sequence[tuple[float, float]]) -> list[int]:
    """How many later marks lie on each one. The limits of the axes must be set before."""
    if not places:
        return []
    points = ax.transData.transform(np.asarray(places, float)) * 72 / ax.figure.dpi
    found: list[int] = []
    for turn, point in reversed(list(enumerate(points))):
        later = [found[len(points) - 1 - other] for other in range(turn + 1, len(points))
                 if np.hypot(*(points[other] - point)) < NEAR]  # fmt: skip
        found.append(max(later) + 1 if later else 0)
    return found[::-1]
