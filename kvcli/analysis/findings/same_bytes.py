"""Methods of one kind against those that keep tokens, where both hold the same bytes: findings 4 and 6."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcli.analysis.findings.data import Data, most_shots, named, of_kind
from kvcli.analysis.findings.outcome import DEEP, Finding, Outcome, listed, points, shared, untested, verdict_of
from kvcli.analysis.marked import code
from kvcli.analysis.statistics import averages, power, stats
from kvcli.analysis.statistics.stats import Difference
from kvcli.analysis.tables import matched, wording
from kvcli.analysis.tables.table import CellSummary, TaskTable

_TOO_MANY = 10**7
"""So many samples are no advice."""


@dataclass(frozen=True)
class _Meeting:
    """One cell of the kind, and of each method that keeps tokens one with its bytes."""

    table: TaskTable
    mine: CellSummary
    others: tuple[CellSummary, ...]

    def difference(self, data: Data) -> Difference | None:
        values, clusters = data.scores.of(self.mine.cell_ids)
        mean = averages.over_methods([data.scores.of(c.cell_ids)[0] for c in self.others])
        both = ~np.isnan(values) & ~np.isnan(mean)
        return stats.paired_difference(values[both], mean[both], clusters[both]) if both.any() else None

    def named(self) -> str:
        at = f"{code(self.table.task)} at {wording.measured(self.mine.measured_ratio)} measured"
        return f"{at}: {code(self.mine.label)} against {listed([c.label for c in self.others])}"


def kind_against_tokens(
    number: int, title: str, data: Data, tables: Sequence[TaskTable], kind: str, level: float, asked: str
) -> Finding:
    """The method of the kind minus the mean of those that keep tokens, on the same samples at the same bytes.

    Only where full is clearly above chance: where nothing can be lost, nothing can be lost less. asked: what it takes.
    """
    counted = [table for table in tables if data.above_chance(table, level)]
    met = {id(table): found for table in counted if (found := _meeting(table, kind))}
    compared = [
        (met[id(table)], change)
        for table in most_shots([table for table in counted if id(table) in met])
        if (change := met[id(table)].difference(data))
    ]
    if not compared:
        return untested(number, title, asked + _held(counted, kind))
    each = shared(level, len(compared))
    ends = [change.at(each) for _, change in compared]
    said = "; ".join(
        f"{two.named()} {points(change.value, end)} (n = {change.n})"
        for (two, change), end in zip(compared, ends, strict=True)
    )
    outcome, text, needs = verdict_of(ends, said, claimed=True, large=0.0)
    sizes = [needed.samples for _, change in compared if (needed := power.needed(change, 0.0, each))]
    if outcome is Outcome.OPEN and sizes and min(sizes) < _TOO_MANY:
        needs = f"about {min(sizes):,} samples"
    return Finding(number, title, outcome, text, needs)


def _meeting(table: TaskTable, kind: str) -> _Meeting | None:
    """The smallest cell of the kind, and those that keep tokens with its bytes whatever was asked of them, one for each
    method; all at 0.3 or less. Over budget is no reason here: bytes are what is compared."""
    for mine in _deep(table, kind):
        others: dict[str, CellSummary] = {}
        for cell in _deep(table, "token"):
            if matched.same_bytes(cell.measured_ratio, mine.measured_ratio):
                others.setdefault(cell.label, cell)
        if others:
            return _Meeting(table, mine, tuple(others.values()))
    return None


def _deep(table: TaskTable, kind: str) -> list[CellSummary]:
    """Compared cells of a kind that hold 0.3 or less, the smallest first."""
    limit = DEEP * (1 + matched.TOLERANCE)
    cells = [c for c in of_kind(table.cells(), kind) if c.difference and (c.measured_ratio or 1.0) <= limit]
    return sorted(cells, key=lambda c: c.measured_ratio or 0.0)


def _held(tables: Sequence[TaskTable], kind: str) -> str:
    """The ratios at which the others would meet the methods of the kind."""
    there = {wording.exact(c.measured_ratio) for table in tables for c in _deep(table, kind)[:3]}
    return (
        f"; here {named(kind)} holds {', '.join(sorted(there))}: run the others at that {code('--ratio')}"
        if there
        else ""
    )
