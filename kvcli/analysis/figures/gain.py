"""What shots gain with the full cache against what compression loses (the paper's finding 5): a point per task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvcli.analysis.figures import clashes, layout
from kvcli.analysis.figures.layout import Entry, Plan, plain, shortened
from kvcli.analysis.figures.panels import heading
from kvcli.analysis.figures.sheets import PANELS_PER_PAGE
from kvcli.analysis.figures.style import Style, looks
from kvcli.analysis.figures.views import View, counted
from kvcli.analysis.statistics import stats
from kvcli.analysis.statistics.stats import Difference
from kvcli.analysis.tables import means
from kvcli.analysis.tables.table import CellSummary, TaskTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Change:
    """Percentage points with their 95 % interval. paired: of the same samples."""

    value: float
    low: float | None
    high: float | None
    n: int
    paired: bool = True

    @classmethod
    def of(cls, found: Difference) -> Change:
        ends = found.interval
        return cls(100 * found.value, 100 * ends.low if ends else None, 100 * ends.high if ends else None, found.n)


@dataclass(frozen=True)
class Dot:
    """gain: full with `most` shots minus full with `least`; loss: with `most` shots, mean over methods minus full."""

    task: str
    least: int
    most: int
    gain: Change
    loss: Change


@dataclass(frozen=True)
class GainPanel:
    """One requested size. methods: those that are averaged."""

    asked: str
    methods: tuple[str, ...]
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Gain:
    figure: str
    title: str
    subtitle: str
    x: str
    y: str
    panels: tuple[GainPanel, ...]


def build(view: View) -> list[Gain]:
    """Empty below two tasks with two numbers of shots. No correlation is computed: tasks are few and chosen."""
    pairs = dict(_pairs(view))
    columns = sorted({c for table, _ in pairs.values() for c in table.columns}, key=lambda c: c.order)
    panels = []
    for column in columns:
        methods = _common([table for table, _ in pairs.values()], column.text)
        dots = tuple(_dots(view, pairs, column.text, methods))
        if len(dots) > 1:
            panels.append(GainPanel(column.text, tuple(sorted(methods)), dots))
    counts = [c.n for panel in panels for dot in panel.dots for c in (dot.gain, dot.loss)]
    paired = all(gain.paired for _, gain in pairs.values())
    bars = "95 % paired intervals" if paired else "95 % intervals, losses paired, gains of different prompts"
    subtitle = ", ".join([f"{counted(counts)} per point", *view.mode.words, bars])
    title = view.title("Gain from shots against loss")
    return [
        Gain("gain", title, subtitle, "gain of full from its shots (points)",
             "mean over methods minus full (points)", tuple(panels[i : i + PANELS_PER_PAGE]))
        for i in range(0, len(panels), PANELS_PER_PAGE)
    ]  # fmt: skip


def _pairs(view: View) -> Iterator[tuple[str, tuple[TaskTable, Change]]]:
    """Per task its table with most shots, and what they gain over the least."""
    for task in dict.fromkeys(t.task for t in view.tables):
        tables = [t for t in view.tables if t.task == task and t.full and t.full.n and t.shots is not None]
        tables.sort(key=lambda t: t.shots or 0)
        if len(tables) < 2 or tables[0].full is None or tables[-1].full is None:
            continue
        few, _ = view.scores.of(tables[0].full.cell_ids)
        many, clusters = view.scores.of(tables[-1].full.cell_ids)
        both = ~np.isnan(few) & ~np.isnan(many)
        if both.any():
            gain = Change.of(stats.paired_difference(many[both], few[both], clusters[both]))
        else:
            gain = _unpaired(tables[-1].full, tables[0].full)
        yield task, (tables[-1], gain)


def _unpaired(many: CellSummary, few: CellSummary) -> Change:
    """Where each number of shots has prompts of its own, as on the testbed.

    Source: Newcombe 1998, Stat Med 17:873, method 10, from the two scores' own intervals.
    """
    value, n = many.score - few.score, min(many.n, few.n)
    if many.interval is None or few.interval is None:
        return Change(100 * value, None, None, n, False)
    low = value - math.hypot(many.score - many.interval.low, few.interval.high - few.score)
    high = value + math.hypot(many.interval.high - many.score, few.score - few.interval.low)
    return Change(100 * value, 100 * low, 100 * high, n, False)


def _common(tables: Sequence[TaskTable], column: str) -> set[str]:
    """Methods that every task has at that size, within budget: all tasks average the same ones."""
    found = [{c.label for c in t.cells() if c.column == column and c.difference and not c.over_budget} for t in tables]
    return set.intersection(*found) if found else set()


def _dots(view: View, pairs: dict[str, tuple[TaskTable, Change]], column: str, methods: set[str]) -> Iterator[Dot]:
    for task, (table, gain) in pairs.items():
        loss = _loss(view, table, column, methods)
        least = min(t.shots or 0 for t in view.tables if t.task == task)
        if loss:
            yield Dot(task, least, table.shots or 0, gain, Change.of(loss))


def _loss(view: View, table: TaskTable, column: str, methods: set[str]) -> Difference | None:
    if len(methods) == 1:
        return next(c.difference for c in table.cells() if c.column == column and c.label in methods)
    found = means.over_methods(view.scores, [table], methods) if methods else []
    return next((mean.difference for mean in found if mean.column.text == column), None)


def draw(sheet: Gain, style: Style) -> Figure:
    from matplotlib.lines import Line2D

    shots = {
        d.task: f"{d.task} ({d.least} to {d.most} shot{'s' * (d.most != 1)})" for p in sheet.panels for d in p.dots
    }
    look = looks(shots)
    rows, columns = layout.grid_shape(len(sheet.panels), style.most_columns)
    entries: list[Entry] = [
        (Line2D([], [], **{**style.line(look[t]), "linestyle": "none"}), plain(shortened(text, style.size, 2.8)))
        for t, text in shots.items()
    ]
    above = 0.36 * style.size / 8
    page = layout.page(
        Plan(
            sheet.title,
            f"{sheet.subtitle}, {clashes.AROUND}",
            rows,
            columns,
            sheet.x,
            sheet.y,
            entries,
            above=above,
            gap=0.34,
        ),
        style,
    )
    _limits(page.axes[0], sheet)
    for ax, panel in zip(page.axes, sheet.panels, strict=False):
        ax.grid(True, color=style.theme.grid, linewidth=0.5)
        ax.set_axisbelow(True)
        ax.axhline(0, color=style.theme.ink, linewidth=0.9, zorder=1.5)
        ax.axvline(0, color=style.theme.ink, linewidth=0.9, zorder=1.5)
        size = 5.5 * style.size / 8
        places = clashes.around(ax, [(dot.gain.value, dot.loss.value) for dot in panel.dots], size)
        for dot, (across, up) in zip(panel.dots, places, strict=True):
            line, x, y = style.line(look[dot.task]), dot.gain, dot.loss
            bar = {"color": line["color"], "linewidth": 0.8, "alpha": 0.6, "solid_capstyle": "butt"}
            if x.low is not None and x.high is not None:
                ax.plot([x.low, x.high], [up] * 2, **bar)
            if y.low is not None and y.high is not None:
                ax.plot([across] * 2, [y.low, y.high], **bar)
            ax.plot([across], [up], marker=line["marker"], color=line["color"], linestyle="none", zorder=4,
                    markersize=size, markeredgewidth=0.6,
                    markeredgecolor=style.theme.page)  # fmt: skip
        said = f"mean of {len(panel.methods)} methods" if len(panel.methods) > 1 else panel.methods[0]
        room = ax.get_window_extent().width / ax.figure.dpi
        heading(ax, f"asked: {panel.asked}", said, "", style, room, style.size)
    layout.spare(page.axes, len(sheet.panels), columns)
    return page.figure


def _limits(ax: Axes, sheet: Gain) -> None:
    for axis in ("x", "y"):
        changes = [d.gain if axis == "x" else d.loss for p in sheet.panels for d in p.dots]
        ends = [v for c in changes for v in (c.value, c.low, c.high) if v is not None]
        low, high = min([*ends, -5.0]), max([*ends, 5.0])
        getattr(ax, f"set_{axis}lim")(low - 0.05 * (high - low), high + 0.05 * (high - low))
