"""How single points and their intervals are drawn: marked ones differ, and intervals at one place stand apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcli.analysis.figures.sheets import FALLBACK, MARKS, NOOP, OVER, SIMULATED, Point
from kvcli.analysis.figures.style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

APART = 0.0107
"""Between two intervals at most, as a share of the axis."""
OPEN_SIZE, OPEN_EDGE = 1.5, 0.5
"""Hollow and half filled points are larger and have a thinner edge (in points), or the page does not show in them."""


def apart(x: Sequence[float], span: float) -> list[float]:
    """Places of intervals: in the order of x, each as near to its x as its neighbours let it.

    The least squares of places at least a step apart are an isotonic regression.
    """
    import numpy as np
    from scipy.optimize import isotonic_regression

    if not len(x):
        return []
    steps = min(APART, 0.8 / len(x)) * span * np.arange(len(x))
    order = np.argsort(x, kind="stable")
    found = np.empty(len(x))
    found[order] = isotonic_regression(np.asarray(x, float)[order] - steps).x + steps
    return [float(place) for place in found]


def whiskers(ax: Axes, ends: Sequence[tuple[float, float, float]], across: bool = False, **more: Any) -> None:
    """Intervals (place, low, high) as one broken line; across: along the x axis."""
    gap = float("nan")
    places = [v for place, _, _ in ends for v in (place, place, gap)]
    values = [v for _, low, high in ends for v in (low, high, gap)]
    if ends:
        ax.plot(*((values, places) if across else (places, values)), **more)


def by_marks(points: Sequence[Point]) -> dict[tuple[str, ...], list[Point]]:
    found: dict[tuple[str, ...], list[Point]] = {}
    for p in points:
        found.setdefault(p.marks, []).append(p)
    return found


def mark(
    ax: Axes, x: Sequence[float], y: Sequence[float], colour: str, marker: str, marks: Sequence[str], style: Style,
    **more: Any,
) -> None:  # fmt: skip
    """Points: hollow over budget or noop, half filled for a fallback, ringed where memory is simulated."""
    look = {"markersize": style.mark, **marking(marks, colour, style), **more}
    if open_marks(marks):
        look["markersize"] *= OPEN_SIZE
    edge = OPEN_EDGE if open_marks(marks) else 0.9
    ax.plot(x, y, marker=marker, linestyle="none", markeredgewidth=edge, zorder=4, clip_on=False, **look)
    if SIMULATED in marks:
        ring = {**more, "markersize": look["markersize"] + 4}
        ax.plot(
            x, y, marker="o", linestyle="none", markerfacecolor="none", markeredgecolor=colour,
                markeredgewidth=0.6, zorder=4, clip_on=False, **ring)  # fmt: skip


def open_marks(marks: Sequence[str]) -> bool:
    """Whether a point is hollow or half filled."""
    return any(m in marks for m in (OVER, NOOP, FALLBACK))


def marking(marks: Sequence[str], colour: str, style: Style) -> dict[str, Any]:
    if OVER in marks or NOOP in marks:
        return {"color": colour, "markerfacecolor": style.theme.page}
    if FALLBACK in marks:
        return {"color": colour, "fillstyle": "bottom", "markerfacecoloralt": style.theme.page}
    return {"color": colour, "markerfacecolor": colour}


def mark_entries(there: set[str], style: Style) -> list[tuple[dict[str, Any], str, bool]]:
    base: dict[str, Any] = {"marker": "o", "linestyle": "none"}
    hollow = " or ".join(m for m in MARKS[:2] if m in there)
    ring = {"color": style.theme.muted, "markerfacecolor": "none", "markersize": 8, "markeredgewidth": 0.6}
    return [
        ({**base, **marking([OVER], style.theme.muted, style)}, f"hollow: {hollow}", bool(hollow)),
        ({**base, **marking([FALLBACK], style.theme.muted, style)}, "half: fallback", FALLBACK in there),
        ({**base, **ring}, "ring: memory not freed (simulated)", SIMULATED in there),
    ]
