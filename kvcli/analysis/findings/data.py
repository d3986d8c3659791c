"""What the findings read: a run's tables that count, and which methods and tasks the paper's words stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcli.analysis.findings.outcome import DEEP, listed
from kvcli.analysis.reading import names
from kvcli.analysis.reading.load import Run
from kvcli.analysis.reading.roles import names_of
from kvcli.analysis.statistics import stats
from kvcli.analysis.tables.doubts import NO_ANSWER_LIMIT, not_counted, unlike_reference
from kvcli.analysis.tables.scores import SampleScores
from kvcli.analysis.tables.table import DENSE, CellSummary, TaskTable

UNLIKE = "full is not shown to be where it was published"
UNREADABLE = f"more than {100 * NO_ANSWER_LIMIT:.0f} % of full's outputs hold no answer"


@dataclass(frozen=True)
class Data:
    """One run as the findings read it."""

    run: Run
    tables: Sequence[TaskTable]
    scores: SampleScores

    def usual(self) -> list[TaskTable]:
        """Dense weights, the question visible, first exemplars in their order, the first token compressed where both
        ways were run: what the paper's tables are about. Those do not count whose full is unlike its reference, or has
        too few outputs with an answer."""
        return [table for table in self._candidates() if not not_counted(table)]

    def refused(self) -> dict[str, list[TaskTable]]:
        """Those that would count if full were as it should be, by the reason."""
        found: dict[str, list[TaskTable]] = {}
        for table in self._candidates():
            if not_counted(table):
                found.setdefault(UNLIKE if unlike_reference(table) else UNREADABLE, []).append(table)
        return found

    def _candidates(self) -> list[TaskTable]:
        plain = [
            t
            for t in self.tables
            if t.weights == DENSE and t.query == "aware" and t.shot_seed == 0 and t.shot_order == 0 and t.full
        ]
        modes = {t.first_token for t in plain}
        return [t for t in plain if t.first_token == "compressed" or "compressed" not in modes]

    def full_above(self, table: TaskTable, limit: float, level: float) -> bool:
        """Whether the interval of full's score lies above `limit`."""
        if table.full is None or not table.full.n:
            return False
        values, clusters = self.scores.of(table.full.cell_ids)
        there = ~np.isnan(values)
        found = stats.score_interval(values[there], clusters[there], level)
        return found is not None and found.low > limit

    def above_chance(self, table: TaskTable, level: float) -> bool:
        return self.full_above(table, table.chance or 0.0, level)


def by_task(tables: Sequence[TaskTable]) -> dict[str, list[TaskTable]]:
    found: dict[str, list[TaskTable]] = {}
    for table in tables:
        found.setdefault(table.task, []).append(table)
    return found


def most_shots(tables: Sequence[TaskTable]) -> list[TaskTable]:
    """One table of each task."""
    return [max(group, key=lambda t: t.shots or 0) for group in by_task(tables).values()]


def cells_at(table: TaskTable, column: str, kind: str | None = None) -> list[CellSummary]:
    """Within budget: the others kept more than was asked for. kind: of these methods only."""
    found = [c for c in table.cells() if c.column == column and c.difference and not c.over_budget]
    return found if kind is None else of_kind(found, kind)


def deep_columns(tables: Sequence[TaskTable], kind: str | None = None) -> list[str]:
    """Asked ratios of 0.3 or less at which one of these tables has a method within budget, the smallest first."""
    found = {
        c.text: c.value
        for t in tables
        for c in t.columns
        if c.kind == "ratio" and c.value <= DEEP and cells_at(t, c.text, kind)
    }
    return sorted(found, key=lambda text: found[text])


def of_kind(cells: Sequence[CellSummary], kind: str) -> list[CellSummary]:
    wanted = set(names_of(kind))
    return [c for c in cells if not names.spellings(c.method.partition(" [")[0]).isdisjoint(wanted)]


def named(kind: str) -> str:
    return listed(names_of(kind))


def named_tasks(tables: Sequence[TaskTable]) -> str:
    return listed(tuple(dict.fromkeys(table.task for table in tables)))
