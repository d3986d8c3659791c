"""One side of a comparison: the mean over methods of one table at one size, beside full, on the samples all have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcli.analysis.findings.data import Data, cells_at, deep_columns
from kvcli.analysis.statistics import averages, retention, stats
from kvcli.analysis.statistics.retention import Relative
from kvcli.analysis.statistics.stats import Codes, Difference, Floats, Interval
from kvcli.analysis.tables.table import TaskTable


@dataclass(frozen=True)
class Common:
    """A column and the methods that all tables compared have there."""

    column: str
    labels: frozenset[str]


@dataclass(frozen=True)
class Part:
    """mean, full, clusters: [n], of the run's samples `samples`."""

    table: TaskTable
    column: str
    methods: tuple[str, ...]
    mean: Floats
    full: Floats
    clusters: Codes
    samples: NDArray[np.int64]

    @property
    def name(self) -> str:
        return self.table.task

    def difference(self) -> Difference:
        return stats.paired_difference(self.mean, self.full, self.clusters)

    def kept(self, level: float) -> Relative:
        return retention.retention(self.mean, self.full, self.table.chance or 0.0, self.clusters, level=level)


def part_of(data: Data, table: TaskTable, common: Common) -> Part | None:
    """None where fewer than two samples have a score of full and of every method."""
    cells = [c for c in cells_at(table, common.column) if c.label in common.labels]
    if not cells or table.full is None:
        return None
    full, clusters = data.scores.of(table.full.cell_ids)
    mean = averages.over_methods([data.scores.of(cell.cell_ids)[0] for cell in cells])
    both = ~np.isnan(mean) & ~np.isnan(full)
    if both.sum() < 2:
        return None
    labels = tuple(c.label for c in cells)
    return Part(table, common.column, labels, mean[both], full[both], clusters[both], np.flatnonzero(both))


def smallest_common(tables: Sequence[TaskTable], kind: str | None = None) -> Common | None:
    """The smallest asked ratio, of 0.3 or less, at which all these tables share a method within budget.

    kind: only methods of that kind count.
    """
    for column in deep_columns(tables, kind):
        found = frozenset.intersection(*(_labels(table, column, kind) for table in tables))
        if found:
            return Common(column, found)
    return None


def widest_common(tables: Sequence[TaskTable]) -> tuple[Common, list[TaskTable]] | None:
    """The ratio of 0.3 or less and the methods that the most tables share, and these tables; of several such the
    smallest ratio, then the most methods. None where no two tables share any."""
    best: tuple[Common, list[TaskTable]] | None = None
    size = (1, 0)
    for column in deep_columns(tables):
        there = {id(table): _labels(table, column) for table in tables}
        for label in sorted(frozenset.union(*there.values())):
            sharing = [table for table in tables if label in there[id(table)]]
            labels = frozenset.intersection(*(there[id(table)] for table in sharing))
            more = len(sharing) > size[0]
            if more or (best and best[0].column == column and (len(sharing), len(labels)) > size):
                best, size = (Common(column, labels), sharing), (len(sharing), len(labels))
    return best


def _labels(table: TaskTable, column: str, kind: str | None = None) -> frozenset[str]:
    return frozenset(c.label for c in cells_at(table, column, kind))


def kept_apart(first: Relative, second: Relative) -> Interval | None:
    """Difference of two retentions, first - second, taken as independent: where they share samples it is too wide.

    Source: MOVER, Zou, Donner 2008, Stat Med 27:1693.
    """
    if first.value is None or second.value is None or first.interval is None or second.interval is None:
        return None
    value = first.value - second.value
    low = value - float(np.hypot(first.value - first.interval.low, second.interval.high - second.value))
    high = value + float(np.hypot(first.interval.high - first.value, second.value - second.interval.low))
    return Interval(low, high, "MOVER")
