"""Marks at one place: moved apart by a few points, so that each of them shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi, sin
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR = 3.0
"""Points (of 1/72 inch) between two marks, at most, for the later one to hide the earlier one."""
Place = tuple[float, float]
SIDEWAYS = "marks at one place moved apart sideways"
AROUND = "marks at one place moved around it"


def sideways(ax: Axes, places: Sequence[Place], step: float) -> list[Place]:
    """Places for marks: those of one place in a row, `step` points apart. The limits of the axes must be set before."""
    return _moved(ax, places, lambda turn, count: ((turn - (count - 1) / 2) * step, 0.0))


def around(ax: Axes, places: Sequence[Place], step: float) -> list[Place]:
    """Those of one place on a circle around it, neighbours `step` points apart."""

    def offset(turn: int, count: int) -> Place:
        radius, angle = step / 2 / sin(pi / count), 2 * pi * turn / count + pi
        return radius * cos(angle), radius * sin(angle)

    return _moved(ax, places, offset)


def _groups(ax: Axes, places: Sequence[Place]) -> list[list[int]]:
    """Marks no further than NEAR from the first one of their group, in their order."""
    if not places:
        return []
    points = _on_paper(ax, places)
    groups: list[list[int]] = []
    for turn, point in enumerate(points):
        near = (group for group in groups if np.hypot(*(points[group[0]] - point)) < NEAR)
        group = next(near, None)
        if group is None:
            groups.append([turn])
        else:
            group.append(turn)
    return groups


def _moved(ax: Axes, places: Sequence[Place], offset: Callable[[int, int], Place]) -> list[Place]:
    if not places:
        return []
    points = _on_paper(ax, places)
    for group in _groups(ax, places):
        for turn, mark in enumerate(group if len(group) > 1 else ()):
            points[mark] += offset(turn, len(group))
    found = ax.transData.inverted().transform(points * ax.figure.dpi / 72)
    return [(float(x), float(y)) for x, y in found]


def _on_paper(ax: Axes, places: Sequence[Place]) -> np.ndarray:
    """In points."""
    found: np.ndarray = ax.transData.transform(np.asarray(places, float)) * 72 / ax.figure.dpi
    return found
