"""Averages of a run's tables: over methods for each task and size, over tasks for each method and size."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from kvcli.analysis.statistics import averages
from kvcli.analysis.statistics.averages import Average, Scores
from kvcli.analysis.statistics.stats import Difference
from kvcli.analysis.tables.doubts import not_counted
from kvcli.analysis.tables.scores import SampleScores
from kvcli.analysis.tables.table import Column, TaskTable


@dataclass(frozen=True)
class MethodsMean:
    """One task at one size: the mean over methods, and its paired difference to full (unadjusted)."""

    table: TaskTable
    column: Column
    methods: tuple[str, ...]
    score: float
    difference: Difference


@dataclass(frozen=True)
class TasksMean:
    """One method at one size: the mean over tasks, each counting once (unadjusted)."""

    first_token: str
    query: str
    weights: str
    shot_seed: int
    shot_order: int
    method: str
    column: Column
    tasks: tuple[str, ...]
    difference: Average
    retention: Average | None
    """Chance-adjusted: what cross-task claims use."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Tasks that have the method and size but are not averaged, and why: it kept more than was asked for there, or the
    table does not count (doubts.not_counted). Those whose retention is not defined: retention.left_out."""
    fallback: tuple[str, ...] = ()
    """Tasks averaged in which no output is of the method named: it fell back in all."""


def over_methods(
    scores: SampleScores, tables: Sequence[TaskTable], methods: Collection[str] | None = None
) -> list[MethodsMean]:
    """methods: labels to average (None: all of a column). Cells over budget are not among them: they kept more."""
    found = []
    for table in tables:
        for column in table.columns:
            cells = [c for c in table.cells() if c.column == column.text and not c.over_budget and c.difference]
            cells = [c for c in cells if methods is None or c.label in methods]
            if table.full is None or len(cells) < 2:
                continue
            full, clusters = scores.of(table.full.cell_ids)
            each = [scores.of(cell.cell_ids)[0] for cell in cells]
            both = ~np.isnan(averages.over_methods(each)) & ~np.isnan(full)
            if both.any():
                difference = averages.difference_over_methods(each, full, clusters)
                score = difference.value + float(full[both].mean())
                found.append(MethodsMean(table, column, tuple(c.label for c in cells), score, difference))
    return found


def over_tasks(scores: SampleScores, tables: Sequence[TaskTable]) -> list[TasksMean]:
    """For every method and size that at least two tasks have. A task with several numbers of shots counts with most.

    Cells over budget and tables that do not count (doubts.not_counted) are left out by name.
    """
    groups: dict[_Key, dict[str, Scores | str]] = {}
    fallback: dict[_Key, set[str]] = {}
    for table in sorted(tables, key=lambda t: t.shots or 0):
        mode = (table.first_token, table.query, table.weights, table.shot_seed, table.shot_order)
        for (label, column), part in (_left_out(table) | _drawn(scores, table)).items():
            groups.setdefault((*mode, label, column), {})[table.task] = part
        for row in table.rows:
            for column in table.columns:
                cell = row.cells.get(column.text)
                if cell is not None and cell.all_fallback:
                    fallback.setdefault((*mode, row.label, column), set()).add(table.task)
    found = []
    for key, parts in groups.items():
        there = {task: part for task, part in parts.items() if not isinstance(part, str)}
        if len(there) > 1:
            every = list(there.values())
            mean, kept = averages.difference_over_tasks(every), averages.retention_over_tasks(every)
            why = tuple((task, part) for task, part in parts.items() if isinstance(part, str))
            fell = tuple(task for task in there if task in fallback.get(key, ()))
            found.append(TasksMean(*key, tuple(there), mean, kept, why, fell))
    return found


def _left_out(table: TaskTable) -> dict[tuple[str, Column], str]:
    """Compared cells of one table that are not averaged, and why."""
    why = not_counted(table)
    every = ((row.label, column, row.cells.get(column.text)) for row in table.rows for column in table.columns)
    return {
        (label, column): why or "over budget"
        for label, column, cell in every
        if cell is not None and cell.difference is not None and (why or cell.over_budget)
    }


_Key = tuple[str, str, str, int, int, str, Column]
"""first-token mode, query mode, weights, which shots, their order, label of the row, column."""


def _drawn(scores: SampleScores, table: TaskTable) -> dict[tuple[str, Column], Scores]:
    """The cells of one table to average by row and column; those with the same samples are resampled at once."""
    if table.full is None or not_counted(table):
        return {}
    full, chance = scores.of(table.full.cell_ids)[0], table.chance or 0.0
    alike: dict[bytes, dict[tuple[str, Column], Scores]] = {}
    for row in table.rows:
        for column in table.columns:
            cell = row.cells.get(column.text)
            if cell is None or cell.difference is None or cell.over_budget:
                continue
            compressed, clusters = scores.of(cell.cell_ids)
            both = ~np.isnan(compressed) & ~np.isnan(full)
            part = Scores(table.task, compressed[both], full[both], clusters[both], chance, cell.difference)
            alike.setdefault(both.tobytes(), {})[row.label, column] = part
    return {
        key: part
        for parts in alike.values()
        for key, part in zip(parts, averages.draw(list(parts.values())), strict=True)
    }
