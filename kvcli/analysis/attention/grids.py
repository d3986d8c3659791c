"""Figures of measures of attention: layers by heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcli.analysis.attention.data import TITLES, Atlas, Floats, kinds_there, region_title
from kvcli.analysis.attention.even import even_region
from kvcli.analysis.attention.sheet import COLUMNS, SHADES, Sheet, short, whole_ticks
from kvcli.analysis.attention.times import furthest, times_bar, times_shades
from kvcli.analysis.figures.style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Grid:
    """A measure [L, H] of one group of prompts; None where it has nothing to be measured. highest: of all grids of that
    name, which share their colours. times: it is a multiple of something, and 1 is the middle of the colours."""

    name: str
    group: int
    values: Floats | None
    highest: float
    times: bool = False


def measures(atlas: Atlas, queries: str) -> list[Grid]:
    """Of each measure one grid per group."""
    found = []
    for number, name in enumerate(atlas.meta["measures"]):
        every = [atlas.mean("measures", group, queries)[number] for group in range(len(atlas.groups))]
        top = max(float(values.max()) for values in every)
        found += [Grid(TITLES[name], group, values, top) for group, values in enumerate(every)]
    return found


def regions(atlas: Atlas, queries: str) -> list[Grid]:
    """Of each kind of region one grid per group."""
    found = []
    for kind in kinds_there(atlas):
        every = [atlas.region_mass(kind, group, queries) for group in range(len(atlas.groups))]
        top = max(float(values.max()) for values in every if values is not None)
        found += [Grid(region_title(kind), group, values, top) for group, values in enumerate(every)]
    return found


def regions_against_even(atlas: Atlas, queries: str) -> list[Grid]:
    """What each kind of region receives, as a multiple of what evenly spread attention would give it."""
    found = []
    for kind in kinds_there(atlas):
        every = []
        for group in range(len(atlas.groups)):
            mass = atlas.region_mass(kind, group, queries)
            every.append(None if mass is None else mass / even_region(atlas, kind, group, queries))
        title = region_title(kind).removeprefix("mass of ").removeprefix("the ")
        found += [Grid(title, group, values, furthest(every), times=True) for group, values in enumerate(every)]
    return found


def draw_grids(atlas: Atlas, whose: str, grids: Sequence[Grid], title: str, look: Style) -> Figure:
    """whose: attention, in words.

    One group: the measures side by side. Several: a row per measure, a column per group, colours shared in a row.
    """
    groups, names = len(atlas.groups), list(dict.fromkeys(grid.name for grid in grids))
    columns = groups if groups > 1 else min(COLUMNS, len(names))
    rows = len(names) if groups > 1 else -(-len(names) // columns)
    layers, heads = atlas.meta["model"]["layers"], atlas.meta["model"]["heads"]
    high = min(1.9, max(0.8, 0.055 * layers))
    wide = min(1.7, max(1.0, 0.055 * heads)) if groups > 1 else 1.45
    whole = f"{title}, layer by head: {atlas.model}"
    facts = f"{whose}, mean over prompts; {atlas.counted()}"
    facts += "; log scale, 1: evenly spread" if grids[0].times else ""
    sheet = Sheet(
        look, whole, facts, rows, columns, (wide, high), gaps=(0.22, 0.42) if groups > 1 else (1.2, 0.62),
        top=0.5 if groups > 1 else 0.34, bottom=0.5, right=1.0,
    )  # fmt: skip
    wide = sheet.size[0]
    for grid in grids:
        at = names.index(grid.name)
        row, column = (at, grid.group) if groups > 1 else divmod(at, columns)
        ax = sheet.axes(row, column)
        image = _image(ax, grid, look, (layers, heads))
        whole_ticks(ax.xaxis, 5)
        whole_ticks(ax.yaxis, 5)
        _grid_titles(sheet, ax, grid, atlas, (row, column), rows)
        if groups == 1 or column == groups - 1:
            x, y = sheet.place(row, column)
            bar = sheet.figure.colorbar(image, cax=sheet.axes_at(x + wide + 0.1, y, 0.09, high))
            bar.outline.set_linewidth(0.5)
            bar.ax.tick_params(labelsize=6.5)
            if grid.times:
                times_bar(bar, grid.highest)
            else:
                bar.locator = _few()
                bar.update_ticks()
    return sheet.figure


def _image(ax: Axes, grid: Grid, look: Style, shape: tuple[int, int]) -> Any:
    """shape: of an empty panel."""
    values = grid.values
    if values is None:
        values = np.full(shape, np.nan)
        ax.text(
            0.5, 0.5, "none", transform=ax.transAxes, ha="center", va="center", color=look.theme.muted, fontsize=7.5
        )
    if grid.times:
        return ax.imshow(values, aspect="auto", interpolation="nearest", **times_shades(grid.highest, look))
    shades: dict[str, Any] = {"cmap": SHADES[look.theme.name], "vmin": 0, "vmax": grid.highest or 1}
    return ax.imshow(values, aspect="auto", interpolation="nearest", **shades)


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _grid_titles(sheet: Sheet, ax: Axes, grid: Grid, atlas: Atlas, place: tuple[int, int], rows: int) -> None:
    several = len(atlas.groups) > 1
    row, column = place
    if not several or column == 0:
        ax.set_title(grid.name, loc="left", fontsize=8, pad=4)
        ax.set_ylabel("layer", fontsize=7.5)
    if several and column:
        ax.set_yticklabels([])
    if several and row == 0:
        x, y = sheet.place(row, column)
        label = short(atlas.groups[grid.group]["label"], int((sheet.size[0] + sheet.gaps[0]) / 0.085))
        sheet.text(x, y - 0.3, label, fontsize=8.5, fontweight="bold", va="bottom")
    if not several or row == rows - 1:
        ax.set_xlabel("head", fontsize=7.5)
    else:
        ax.set_xticklabels([])
