"""How the loss depends on the number of shots (the paper's figure 7): a line per number of shots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvcli.analysis.figures.sheets import X_LABEL, Panel, Point, Series, Sheet, Value, pages, placed, point
from kvcli.analysis.figures.values import difference_of
from kvcli.analysis.figures.views import View, counted
from kvcli.analysis.statistics import averages, stats
from kvcli.analysis.tables.table import FULL, CellSummary, TaskTable

Get = Callable[[CellSummary], Value | None]


def build(view: View) -> list[Sheet]:
    """For every task with several numbers of shots two figures, difference and score: the mean over methods, then each
    method. Numbers of shots are lines of their own and never averaged; with one size they are rows."""
    found: list[Sheet] = []
    for task in dict.fromkeys(t.task for t in view.tables):
        tables = sorted((t for t in view.tables if t.task == task), key=lambda t: t.shots or 0)
        if len(tables) > 1:
            found += _sheets(view, task, tables)
    return found


def _sheets(view: View, task: str, tables: Sequence[TaskTable]) -> Iterator[Sheet]:
    def score(cell: CellSummary) -> Value:
        ends = cell.interval
        return Value(cell.score, ends.low if ends else None, ends.high if ends else None, cell.n)

    ways: tuple[tuple[str, str, str, str, Get], ...] = (
        ("difference to full (points)", "points", "Loss by number of shots", "95 % paired intervals", difference_of),
        ("score", "unit", "Score by number of shots", "95 % intervals, not for comparing methods",
         score),
    )  # fmt: skip
    for y, scale, what, bars, value in ways:
        mean = _mean_panel(view, tables, scale == "unit")
        panels = [*([mean] if mean else []), *_method_panels(view, tables, value, scale == "unit")]
        if panels:
            points = [p for panel in panels for series in panel.series for p in series.points]
            asked = _sizes(tables, points)
            layout = "rows" if len(asked.keys() - {FULL}) == 1 else "lines"
            right_end = "; right end: full" * (FULL in asked and layout == "lines")
            words = [f"{counted(p.n for p in points)} per point", *view.mode.words, bars + right_end]
            title = f"{what}, {task}: {view.run.model}"
            yield from pages(
                Sheet(
                    "shots",
                    title,
                    ", ".join(words),
                    X_LABEL,
                    y,
                    layout,
                    "shots",
                    scale,
                    tuple(panels),
                    f"{task}-{y.split()[0]}",
                    tuple(asked) if layout == "rows" else (),
                )
            )


def _sizes(tables: Sequence[TaskTable], points: Sequence[Point]) -> dict[str, None]:
    """What was asked for, in its order, `full` last."""
    there = {p.asked for p in points}
    columns = sorted({c for table in tables for c in table.columns if c.text in there}, key=lambda c: c.order)
    return dict.fromkeys([*(c.text for c in columns), *([FULL] if FULL in there else [])])


def _name(table: TaskTable) -> str:
    return f"{table.shots} shot{'s' * (table.shots != 1)}"


def _method_panels(view: View, tables: Sequence[TaskTable], value: Get, with_full: bool) -> Iterator[Panel]:
    for method in view.methods:
        series = []
        for table in tables:
            row = next((r for r in table.rows if r.method == method), None)
            cells = [row.cells[c.text] for c in table.columns if c.text in row.cells] if row else []
            points = [p for cell in cells if cell.n and (p := point(cell, value(cell)))]
            series += _series(table, points, with_full)
        if series:
            yield Panel(method, view.labels[method], "", False, None, None, tuple(series))


def _mean_panel(view: View, tables: Sequence[TaskTable], as_score: bool) -> Panel | None:
    """The mean over the methods that all numbers of shots have within budget at every size: the paper's figure."""
    within = [_within(table, column.text) for table in tables for column in table.columns]
    labels = sorted(set.intersection(*(found for found in within if found)) if any(within) else ())
    if len(labels) < 2:
        return None
    series = []
    for table in tables:
        points = []
        for column in table.columns:
            cells = [cell for cell in table.cells() if cell.column == column.text and cell.label in labels]
            if len(cells) == len(labels):
                points.append(_mean_point(view, table, cells, as_score))
        series += _series(table, points, as_score)
    return Panel("", f"mean of {len(labels)} methods", ", ".join(labels), False, None, None, tuple(series))


def _mean_point(view: View, table: TaskTable, cells: Sequence[CellSummary], as_score: bool) -> Point:
    """Each sample's mean over the methods is one observation: the interval is that of the samples."""
    mean = averages.over_methods([view.scores.of(cell.cell_ids)[0] for cell in cells])
    x = [at for cell in cells if (at := placed(cell)) is not None]
    full, clusters = view.scores.of(table.full.cell_ids if table.full else cells[0].cell_ids)
    if as_score:
        there = ~np.isnan(mean)
        y, n, scale = float(mean[there].mean()), int(there.sum()), 1
        ends = stats.score_interval(mean[there], clusters[there])
    else:
        found = averages.difference_over_methods([mean], full, clusters)
        y, n, scale, ends = 100 * found.value, found.n, 100, found.interval
    low, high = (scale * ends.low, scale * ends.high) if ends else (None, None)
    return Point(cells[0].column, sum(x) / len(x), y, low, high, n, (), {})


def _within(table: TaskTable, column: str) -> set[str]:
    return {
        c.label for c in table.cells() if c.column == column and not c.over_budget and c.difference and placed(c)
    }  # fmt: skip


def _series(table: TaskTable, points: Sequence[Point], with_full: bool) -> list[Series]:
    """with_full: full stands at ratio 1."""
    if not points:
        return []
    full = table.full
    if with_full and full and full.n:
        ends = full.interval
        points = [*points, Point(FULL, 1.0, full.score, ends.low if ends else None, ends.high if ends else None,
                                 full.n, (), {})]  # fmt: skip
    return [Series(str(table.shots), _name(table), tuple(sorted(points, key=lambda p: p.x)))]
