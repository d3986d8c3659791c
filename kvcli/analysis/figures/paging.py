"""Figures that are taller than a page go on: panel by panel, or, where one panel is too tall, some methods on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any

from kvcli.analysis.figures.bars import Bars
from kvcli.analysis.figures.heatmap import Heat
from kvcli.analysis.figures.sheets import Sheet, even
from kvcli.analysis.figures.style import Style
from kvcli.analysis.tables.table import FULL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("panels", "grids", "maps")
"""How kinds of sheets name what stands side by side."""


def fitted(sheet: Any, draw: Callable[[Any, Style], Figure], style: Style) -> list[tuple[Any, Figure]]:
    """Sheets with their figures, none taller than the style's page while there is something to divide."""
    figure = draw(sheet, style)
    count = ceil(figure.get_figheight() / style.tallest)
    if count == 1:
        return [(sheet, figure)]
    name = next(name for name in PARTS if hasattr(sheet, name))
    panels = getattr(sheet, name)
    one = replace(sheet, **{name: panels[:1]})
    if len(panels) > 1 and draw(one, style).get_figheight() <= style.tallest:
        pages = [replace(sheet, **{name: tuple(some)}) for some in even(panels, ceil(len(panels) / count))]
    else:
        pages = _by_methods(sheet, count)
    return [one for page in pages for one in fitted(page, draw, style)] if len(pages) > 1 else [(sheet, figure)]


def _by_methods(sheet: Any, count: int) -> list[Any]:
    """About `count` sheets with all panels and some of the methods; one where methods do not lie below each other."""
    some: Callable[[Any, Sequence[str]], Any]
    if isinstance(sheet, Heat):
        names, some = list(sheet.methods), _some_of_heat
    elif isinstance(sheet, Sheet) and sheet.layout == "rows":
        names, some = list(dict.fromkeys(s.key for p in sheet.panels for s in p.series)), _some_of_rows
    elif isinstance(sheet, Bars):
        names, some = (
            list(dict.fromkeys(b.method for p in sheet.panels for b in p.bars if b.method != FULL)),
            _some_bars,
        )
    else:
        return [sheet]
    return [some(sheet, group) for group in even(names, ceil(len(names) / count))]


def _some_of_heat(sheet: Heat, names: Sequence[str]) -> Heat:
    grids = [replace(grid, boxes=tuple(b for b in grid.boxes if b.method in names)) for grid in sheet.grids]
    return replace(sheet, methods={m: sheet.methods[m] for m in names}, grids=tuple(g for g in grids if g.boxes))


def _some_of_rows(sheet: Sheet, names: Sequence[str]) -> Sheet:
    panels = [replace(panel, series=tuple(s for s in panel.series if s.key in names)) for panel in sheet.panels]
    return replace(sheet, panels=tuple(panel for panel in panels if panel.series))


def _some_bars(sheet: Bars, names: Sequence[str]) -> Bars:
    """`full` stands on all of them."""
    there = {FULL, *names}
    return replace(
        sheet,
        panels=tuple(replace(p, bars=tuple(b for b in p.bars if b.method in there)) for p in sheet.panels),
    )
