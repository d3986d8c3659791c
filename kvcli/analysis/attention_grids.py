"""Figures of measures of attention: layers by heads, shots by layers, cumulative curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcli.analysis.attention import TITLES, Atlas, Floats, kinds_there, region_title
from kvcli.analysis.attention_sheet import COLUMNS, SHADES, Sheet, columns_of, legend_columns, short
from kvcli.analysis.figures.style import looks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Grid:
    """A measure [L, H] of one group of prompts; None where it has nothing to be measured. highest: of all grids of that
    name, which share their colours."""

    name: str
    group: int
    values: Floats | None
    highest: float


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


def draw_grids(atlas: Atlas, queries: str, grids: Sequence[Grid], title: str) -> Figure:
    """One group: the measures side by side. Several: a row per measure, a column per group, colours shared in a row."""
    groups, names = len(atlas.groups), list(dict.fromkeys(grid.name for grid in grids))
    columns = groups if groups > 1 else min(COLUMNS, len(names))
    rows = len(names) if groups > 1 else -(-len(names) // columns)
    layers, heads = atlas.meta["model"]["layers"], atlas.meta["model"]["heads"]
    high = min(1.9, max(0.8, 0.055 * layers))
    wide = min(1.7, max(1.0, 0.055 * heads)) if groups > 1 else 1.45
    whole = f"{title}, layer by head: {atlas.model}"
    facts = f"{atlas.queries(queries)}, mean over prompts; {atlas.counted()}"
    size, gaps = (wide, high), ((0.22, 0.42) if groups > 1 else (0.98, 0.62))
    sheet = Sheet(whole, facts, rows, columns, size, gaps=gaps, top=0.5 if groups > 1 else 0.34, bottom=0.5, right=0.95)
    for grid in grids:
        at = names.index(grid.name)
        row, column = (at, grid.group) if groups > 1 else divmod(at, columns)
        ax = sheet.axes(row, column)
        image = _image(ax, grid.values, grid.highest or 1, (layers, heads))
        ax.locator_params(nbins=5, integer=True)
        _grid_titles(sheet, ax, grid, atlas, (row, column), rows)
        if groups == 1 or column == groups - 1:
            x, y = sheet.place(row, column)
            bar = sheet.figure.colorbar(image, cax=sheet.axes_at(x + wide + 0.1, y, 0.09, high))
            bar.outline.set_linewidth(0.5)
            bar.ax.tick_params(labelsize=6.5)
            bar.locator = _few()
            bar.update_ticks()
    return sheet.figure


def _image(ax: Axes, values: Floats | None, highest: float, shape: tuple[int, int] = (1, 1)) -> Any:
    """shape: of an empty panel."""
    if values is None:
        values = np.full(shape, np.nan)
        ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center", va="center", color="#555555", fontsize=7.5)
    return ax.imshow(values, cmap=SHADES, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")


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


def draw_shots(atlas: Atlas, queries: str, shown: Sequence[int]) -> Figure:
    """Attention per shot and layer, mean over heads."""
    which = atlas.meta["sets"].index(queries)
    images = {i: atlas.of(i, "shot_mass")[which].mean(-1).T for i in shown}  # [L, K]
    columns = columns_of(len(shown))
    layers = next(iter(images.values())).shape[0]
    size = (2.4, min(2.2, max(0.9, 0.06 * layers)))
    top = max(float(image.max()) for image in images.values()) or 1.0
    title = f"Attention per shot and layer: {atlas.model}"
    sheet = Sheet(
        title, f"{atlas.queries(queries)}, mean over heads; n = 1 prompt per panel",
        -(-len(shown) // columns), columns, size, gaps=(0.5, 0.8), top=0.34, bottom=0.5, right=0.95,
    )  # fmt: skip
    for at, prompt in enumerate(shown):
        ax = sheet.axes(*divmod(at, columns))
        image = _image(ax, images[prompt], top)
        ax.set_title(short(atlas.named(prompt), 30), loc="left", fontweight="bold", pad=4)
        ax.set_xlabel("shot")
        ax.set_ylabel("layer")
        ax.locator_params(nbins=6, integer=True)
    x, y = sheet.place(0, columns - 1)
    bar = sheet.figure.colorbar(image, cax=sheet.axes_at(x + size[0] + 0.12, y, 0.1, size[1]))
    bar.outline.set_linewidth(0.5)
    bar.locator = _few()
    bar.update_ticks()
    return sheet.figure


@dataclass(frozen=True)
class Curve:
    """A line: `low` and `high` over the prompts, None for a single one."""

    label: str
    y: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None


@dataclass(frozen=True)
class CurvePanel:
    title: str
    subtitle: str
    x: tuple[float, ...]
    lines: tuple[Curve, ...]


CURVE_TITLES = (
    ("all tokens", "share of all attention"),
    ("without the first {sinks}", "renormalised: share of the others'"),
    ("without the first {sinks}", "not renormalised: share of all"),
)


def curve_panels(atlas: Atlas, queries: str) -> list[CurvePanel]:
    """The cumulative curves as they are drawn, in percent: mean over layers and heads, then over prompts."""
    which, stack = atlas.meta["sets"].index(queries), np.asarray(atlas.arrays["curves"]).astype(float)
    x = tuple(np.linspace(0, 100, stack.shape[-1]).tolist())
    panels = []
    for number, (title, subtitle) in enumerate(CURVE_TITLES):
        lines = []
        for group, facts in enumerate(atlas.groups):
            every = 100 * stack[atlas.members(group), which, number].mean(1)  # [prompts, points]
            several = len(every) > 1
            low, high = (tuple(every.min(0).tolist()), tuple(every.max(0).tolist())) if several else (None, None)
            lines.append(Curve(facts["label"], tuple(every.mean(0).tolist()), low, high))
        panels.append(CurvePanel(title.format(sinks=atlas.meta["sinks"]), subtitle, x, tuple(lines)))
    return panels


def draw_curves(atlas: Atlas, queries: str) -> Figure:
    from matplotlib.lines import Line2D

    panels = curve_panels(atlas, queries)
    facts = f"attention received from {atlas.queries(queries)}, mean over layers, heads and prompts; {atlas.counted()}"
    bands = any(line.low for panel in panels for line in panel.lines)
    facts += "; bands: from prompt to prompt" if bands else ""
    labels = [line.label for line in panels[0].lines]
    size, gaps = (1.95, 1.8), (0.3, 0.0)
    rows = -(-len(labels) // legend_columns(labels, len(panels) * (size[0] + gaps[0])))
    sheet = Sheet(
        f"Cumulative attention: {atlas.model}", facts, 1, len(panels), size, gaps=gaps, top=0.4,
        bottom=0.55 + 0.18 * rows,
    )  # fmt: skip
    found = looks(labels)
    lines = [{**style().line(found[label]), "marker": ""} for label in labels]
    for number, panel in enumerate(panels):
        ax = sheet.axes(0, number)
        ax.grid(True, color="#E4E4E4", linewidth=0.5)
        for line, look in zip(panel.lines, lines, strict=True):
            ax.plot(panel.x, line.y, **look)
            if line.low and line.high:
                ax.fill_between(panel.x, line.low, line.high, color=look["color"], alpha=0.15, linewidth=0)
        ax.set_xlim(0, 100)
        ax.set_ylim(0, 102)
        ax.set_title(panel.title, loc="left", fontweight="bold", pad=13)
        ax.text(0, 1.02, panel.subtitle, transform=ax.transAxes, fontsize=7, color="#555555", va="bottom")
        ax.set_xlabel("top tokens (%)")
        if number:
            ax.set_yticklabels([])
        else:
            ax.set_ylabel("attention (%)")
    sheet.legend([Line2D([], [], **look) for look in lines], labels, 0.05)
    return sheet.figure
