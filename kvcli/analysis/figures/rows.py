"""Draws a Sheet as rows: one per method, requested sizes one below the other, a panel per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvcli.analysis.figures import layout
from kvcli.analysis.figures.layout import Entry, Plan, plain, shortened, text_width
from kvcli.analysis.figures.marks import mark, whiskers
from kvcli.analysis.figures.panels import above, every, frame, handle, limits, lines_of, ordered, references
from kvcli.analysis.figures.sheets import Series, Sheet
from kvcli.analysis.figures.style import MARKERS, Style
from kvcli.analysis.tables.table import FULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_rows(sheet: Sheet, style: Style) -> Figure:
    """A row per method, a panel per task; requested sizes stand one below the other."""
    series = every(sheet)
    asked = sheet.asked
    single = len(asked) == 1
    drawn = lines_of(sheet, style, series)
    shades = dict(zip(asked, ordered(len(asked), style), strict=True))
    longest = 1.9 * style.size / 8
    names = [plain(shortened(label, style.size - 0.5, longest)) for label in series.values()]
    left = max(text_width(name, style.size - 0.5) for name in names) + 0.14
    tall = max(0.6, len(series) * (0.125 + 0.065 * len(asked)) * style.size / 8 + 0.1)
    rows, columns = layout.grid_shape(len(sheet.panels), style.most_columns)
    entries: list[Entry] = [] if single else [
        (
            handle({"color": shades[a], "marker": MARKERS[i % len(MARKERS)], "linestyle": "none"}),
            a if a == FULL else f"asked: {a}",
        )
        for i, a in enumerate(asked)
    ]  # fmt: skip
    subtitle = f"{sheet.subtitle}, asked: {asked[0]}" if single else sheet.subtitle
    page = layout.page(
        Plan(
            sheet.title,
            subtitle,
            rows,
            columns,
            sheet.y,
            "",
            [*entries, *references(sheet, style)],
            left=left,
            panel=(None, tall),
            gap=0.22,
            above=above(sheet.panels, style),
        ),
        style,
    )
    places = {key: place for place, key in enumerate(series)}
    for ax in page.axes:
        ax.set_ylim(len(series) - 0.5, -0.5)
        ax.set_yticks(range(len(series)), names)
        ax.tick_params(axis="y", length=0)
        limits(ax, sheet, across=True)
    for ax, panel in zip(page.axes, sheet.panels, strict=False):
        frame(ax, panel, sheet, style, across=True)
        for one in panel.series:
            _draw_row(ax, one, places[one.key], asked, shades, drawn[one.key], style)
    layout.spare(page.axes, len(sheet.panels), columns)
    return page.figure


def _draw_row(
    ax: Axes, series: Series, place: int, asked: Sequence[str], shades: Mapping[str, str], line: dict[str, Any],
    style: Style,
) -> None:  # fmt: skip
    """One size: the method's own look. Several: a colour and marker per size."""
    for p in series.points:
        turn = asked.index(p.asked)
        at = place + (turn - (len(asked) - 1) / 2) * 0.78 / len(asked)
        colour = line["color"] if len(asked) == 1 else shades[p.asked]
        marker = line["marker"] if len(asked) == 1 else MARKERS[turn % len(MARKERS)]
        if p.low is not None and p.high is not None:
            whiskers(ax, [(at, p.low, p.high)], across=True, color=colour, linewidth=0.9, alpha=0.7, zorder=2.5)
        mark(ax, [p.y], [at], colour, marker, p.marks, style, markersize=3.4 * style.size / 8)
