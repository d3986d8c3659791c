"""The data behind figures of one value per cell: panels, series, points. Written as JSON beside the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from kvcli.analysis.figures.views import View, counted
from kvcli.analysis.tables.table import OWN, CellSummary, TaskTable

T = TypeVar("T")
X_LABEL = "measured ratio (bytes kept / 16-bit full)"
MOST_LINES = 12
"""More methods than this are rows, or have panels of their own."""
FEW_SIZES = 4
"""Up to so many requested sizes fit a row."""
PANELS_PER_PAGE = 12
TALL_PER_PAGE = 4
"""Panels with more than MOST_LINES rows."""
MANY_NOOP = 0.05
"""A larger share of prompts that were not compressed at all, and the point is marked."""


@dataclass(frozen=True)
class Value:
    """What a figure draws of one cell, in its own unit."""

    y: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Point:
    """One cell in a figure. x: measured ratio. marks: what it is drawn differently for, out of MARKS."""

    asked: str
    x: float
    y: float
    low: float | None
    high: float | None
    n: int
    marks: tuple[str, ...]
    flags: dict[str, int]


@dataclass(frozen=True)
class Series:
    """key: the recorded name, by which it has its look; label: as the legend shows it."""

    key: str
    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """full, chance: scores, None where there is none or the figure does not show them."""

    key: str
    title: str
    subtitle: str
    warning: bool
    full: float | None
    chance: float | None
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Sheet:
    """All that a figure shows. layout: 'lines' over the measured ratio, or 'rows', one for each series. keys: what the
    series are: 'method', 'task' or 'shots'. scale: 'points' (zero is drawn), 'unit' (0 to 1) or 'log'. part: what
    tells it from others of its kind in a file name."""

    figure: str
    title: str
    subtitle: str
    x: str
    y: str
    layout: str
    keys: str
    scale: str
    panels: tuple[Panel, ...]
    part: str = ""
    asked: tuple[str, ...] = ()
    """Requested sizes in their order; of layout 'rows'."""


OVER, NOOP, FALLBACK, SIMULATED = "over budget", f"more than {100 * MANY_NOOP:.0f} % noop", "fallback", "simulated"
MARKS = (OVER, NOOP, FALLBACK, SIMULATED)


def marks(cell: CellSummary) -> tuple[str, ...]:
    flags = cell.flags
    found = [OVER] if cell.over_budget else []
    found += [NOOP] if cell.noop > MANY_NOOP * cell.records else []
    found += [FALLBACK] if flags.get("fallback", 0) > MANY_NOOP * cell.records else []
    return (*found, *([SIMULATED] if flags.get("simulated") else []))


def placed(cell: CellSummary) -> float | None:
    """Measured ratio, else the requested one; None where there is neither."""
    if cell.measured_ratio is not None:
        return cell.measured_ratio
    try:
        return float(cell.column)
    except ValueError:
        return None


def point(cell: CellSummary, value: Value | None) -> Point | None:
    x = placed(cell)
    if value is None or x is None:
        return None
    return Point(cell.column, x, value.y, value.low, value.high, value.n, marks(cell), cell.flags)


def sheets_of(
    view: View, figure: str, what: str, y: str, bars: str, scale: str,
    value: Callable[[TaskTable, CellSummary], Value | None], *, levels: bool = False,
) -> list[Sheet]:  # fmt: skip
    """Pages with a panel per task and a line per method; with many methods a row, or a panel, per method.

    value: what to draw of a cell, None = nothing. bars: what intervals are. levels: panels show full and chance.
    """
    panels = tuple(panel for table in view.tables if (panel := _panel(view, table, value, levels)).series)
    if not panels:
        return []
    methods = len({series.key for panel in panels for series in panel.series})
    points = [p for panel in panels for series in panel.series for p in series.points]
    asked = {p.asked for p in points}
    layout, keys = "lines", "method"
    if asked == {OWN} or len(asked - {OWN}) == 1 or (methods > MOST_LINES and len(asked) <= FEW_SIZES):
        layout = "rows"
    elif methods > MOST_LINES:
        panels, keys = transposed(view, panels), "task"
    words = [f"{counted(p.n for p in points)} per point", *view.mode.words, bars]
    columns = sorted({c for table in view.tables for c in table.columns if c.text in asked}, key=lambda c: c.order)
    order = tuple(dict.fromkeys(c.text for c in columns)) if layout == "rows" else ()
    sheet = Sheet(figure, view.title(what), ", ".join(words), X_LABEL, y, layout, keys, scale, panels, asked=order)
    return list(pages(sheet))


def pages(sheet: Sheet) -> Iterator[Sheet]:
    """At most PANELS_PER_PAGE panels on each, about as many on all; at most MOST_LINES lines in a panel."""
    names = list(dict.fromkeys(s.key for panel in sheet.panels for s in panel.series))
    groups = even(names, MOST_LINES) if sheet.layout == "lines" else [names]
    for group in groups:
        some = [replace(p, series=tuple(s for s in p.series if s.key in group)) for p in sheet.panels]
        tall = sheet.layout == "rows" and len(group) > MOST_LINES
        for page in even([p for p in some if p.series], TALL_PER_PAGE if tall else PANELS_PER_PAGE):
            yield replace(sheet, panels=tuple(page))


def even(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """As few groups of at most `most` as there need to be, of about one size."""
    count = -(-len(items) // most)
    size = -(-len(items) // count) if count else 1
    return [items[i : i + size] for i in range(0, len(items), size)]


def transposed(view: View, panels: Sequence[Panel]) -> tuple[Panel, ...]:
    """A panel per method, a line per task."""
    found = []
    for method in view.methods:
        series = [Series(p.title, p.title, s.points) for p in panels for s in p.series if s.key == method]
        if series:
            found.append(Panel(method, view.labels[method], "", False, None, None, tuple(series)))
    return tuple(found)


def _panel(
    view: View, table: TaskTable, value: Callable[[TaskTable, CellSummary], Value | None], levels: bool
) -> Panel:
    series = []
    for row in table.rows:
        cells = [row.cells[c.text] for c in table.columns if c.text in row.cells]
        points = [p for cell in cells if cell.n and (p := point(cell, value(table, cell)))]
        if points:
            series.append(Series(row.method, row.label, tuple(sorted(points, key=lambda p: p.x))))
    full = table.full.score if levels and table.full and table.full.n else None
    return Panel(
        table.task, view.task(table), table.ability or "", bool(table.warnings), full,
        table.chance if levels else None, tuple(series),
    )  # fmt: skip
