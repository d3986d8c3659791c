"""Draws a Sheet: lines over the measured ratio; rows.py draws those whose methods are rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvcli.analysis.figures import clashes, layout
from kvcli.analysis.figures.layout import Plan, plain
from kvcli.analysis.figures.marks import apart, by_marks, mark, whiskers
from kvcli.analysis.figures.panels import above, cut, every, frame, handle, limits, lines_of, points_of, references
from kvcli.analysis.figures.rows import draw_rows
from kvcli.analysis.figures.sheets import Panel, Point, Series, Sheet
from kvcli.analysis.figures.style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Mapping[str, dict[str, Any]]
"""Per series what matplotlib needs to draw it."""
BANDS_UP_TO = 3
"""More lines than this, and bands hide one another: intervals are drawn as bars."""
DENSE = 40
"""More bars than this in a panel are drawn thinner and fainter, or they are a wall before the points."""


def draw(sheet: Sheet, style: Style) -> Figure:
    return draw_rows(sheet, style) if sheet.layout == "rows" else draw_lines(sheet, style)


def draw_lines(sheet: Sheet, style: Style) -> Figure:
    series = every(sheet)
    drawn = lines_of(sheet, style, series)
    rows, columns = layout.grid_shape(len(sheet.panels), style.most_columns)
    entries = [*((handle(drawn[key]), plain(cut(label, style))) for key, label in series.items()),
               *references(sheet, style)]  # fmt: skip
    bands = len(series) <= BANDS_UP_TO
    beside = any(len(_whiskered(panel, bands)) > 1 for panel in sheet.panels)
    moved = ["intervals moved apart sideways"] * beside
    moved += [clashes.SIDEWAYS] * (sheet.keys == "shots" and len(series) > 1)
    page = layout.page(
        Plan(
            sheet.title,
            ", ".join([sheet.subtitle, *moved]),
            rows,
            columns,
            sheet.x,
            sheet.y,
            entries,
            above=above(sheet.panels, style),
            left=0.42 * style.size / 8,
        ),
        style,
    )
    widest = max([1.0, *(p.x for p in points_of(sheet))])
    for ax in page.axes:
        ax.set_xlim(
            -0.02, widest + (0.07 if sheet.keys == "shots" else 0.02)
        )  # beyond 1 only where a method stores more than the full cache
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        limits(ax, sheet)
    for ax, panel in zip(page.axes, sheet.panels, strict=False):
        frame(ax, panel, sheet, style)
        places = _places(ax, panel, style) if sheet.keys == "shots" else {}
        for one in panel.series:
            _draw_series(ax, one, drawn[one.key], style, places)
        _draw_intervals(ax, panel, drawn, bands, widest + 0.04)
    layout.spare(page.axes, len(sheet.panels), columns)
    return page.figure


def _places(ax: Axes, panel: Panel, style: Style) -> dict[tuple[str, str], float]:
    """Per point of the panel where its mark stands: beside others that it would hide."""
    points = [(one.key, p) for one in panel.series for p in one.points]
    found = clashes.sideways(ax, [(p.x, p.y) for _, p in points], style.mark + 0.8)
    return {(key, p.asked): x for (key, p), (x, _) in zip(points, found, strict=True)}


def _draw_series(
    ax: Axes, series: Series, line: dict[str, Any], style: Style, places: Mapping[tuple[str, str], float]
) -> None:
    """Line and points where they were measured; places: of marks that stand elsewhere."""
    x, y = [p.x for p in series.points], [p.y for p in series.points]
    ax.plot(x, y, color=line["color"], linestyle=line["linestyle"], zorder=3)
    for marks, points in by_marks(series.points).items():
        at = [places.get((series.key, p.asked), p.x) for p in points]
        mark(ax, at, [p.y for p in points], line["color"], line["marker"], marks, style)


def _draw_intervals(ax: Axes, panel: Panel, drawn: Lines, bands: bool, span: float) -> None:
    """span: measured ratios of the whole axis."""
    whiskered = _whiskered(panel, bands)
    for one in panel.series:
        known = _known(one)
        if known and one.key not in {key for key, _ in whiskered}:
            at, low, high = zip(*((p.x, p.low, p.high) for p in known), strict=True)
            ax.fill_between(at, low, high, color=drawn[one.key]["color"], alpha=0.18, linewidth=0, zorder=2)
    strength: dict[str, Any] = (
        {"linewidth": 0.5, "alpha": 0.35} if len(whiskered) > DENSE else {"linewidth": 0.8, "alpha": 0.6}
    )
    places = apart([p.x for _, p in whiskered], span)
    for (key, p), place in zip(whiskered, places, strict=True):
        if p.low is not None and p.high is not None:
            colour = drawn[key]["color"]
            whiskers(ax, [(place, p.low, p.high)], color=colour, zorder=2.5, **strength)


def _known(series: Series) -> list[Point]:
    return [p for p in series.points if p.low is not None and p.high is not None]


def _whiskered(panel: Panel, bands: bool) -> list[tuple[str, Point]]:
    """(series, point) of all intervals drawn as bars: a band between points at one ratio would have no width."""
    drawn = [s for s in panel.series if not (bands and len({p.x for p in _known(s)}) > 1)]
    return [(s.key, p) for s in drawn for p in _known(s)]
