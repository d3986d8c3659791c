"""Method against method where both really hold the same bytes; elsewhere they are not compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from kvcli.analysis.reading.load import Run
from kvcli.analysis.statistics import family, stats
from kvcli.analysis.statistics.family import Family
from kvcli.analysis.statistics.stats import Codes, Difference, Floats
from kvcli.analysis.statistics.verdicts import MARGIN, Verdict, judge_all
from kvcli.analysis.tables.scores import SampleScores
from kvcli.analysis.tables.table import CellSummary, TaskTable

TOLERANCE = 0.01
"""Measured ratios that differ by at most this share of the larger are the same bytes."""


def same_bytes(first: float | None, second: float | None) -> bool:
    """first, second: measured ratios, None where they were not recorded."""
    return first is not None and second is not None and abs(first - second) <= TOLERANCE * max(first, second)


def pairs(measured: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """All pairs that hold the same bytes, in the order given. measured: the measured ratio of each method."""
    return [(a, b) for a, b in combinations(measured, 2) if same_bytes(measured[a], measured[b])]


def difference(first: Floats, second: Floats, clusters: Codes | None = None) -> Difference:
    """Mean of first - second on the samples that both have. first, second: [n] mean score of each sample over seeds and
    draws, NaN where there is none."""
    both = ~np.isnan(first) & ~np.isnan(second)
    return stats.paired_difference(first[both], second[both], None if clusters is None else clusters[both])


@dataclass(frozen=True)
class Pair:
    """Two methods on one task, asked for the same and holding the same bytes; the verdict is on first - second."""

    table: TaskTable
    column: str
    first: CellSummary
    second: CellSummary
    difference: Difference
    verdict: Verdict


def family_of(run: Run, tables: Sequence[TaskTable]) -> Family:
    """All pairs that the plan asks for the same size, and never fewer than the tables could compare."""
    described = run.meta.get("cells")
    facts = described.values() if isinstance(described, dict) else ()
    there = Counter((number, c.column) for number, table in enumerate(tables) for c in table.cells())
    seen = sum(count * (count - 1) // 2 for count in there.values())
    return Family(max(family.between_methods(facts), seen), planned=bool(facts))


def of_tables(run: Run, scores: SampleScores, tables: Sequence[TaskTable], margin: float = MARGIN) -> list[Pair]:
    """All pairs within a column. Their family is all pairs that the plan asks for the same, compared or not."""
    found: list[tuple[TaskTable, str, CellSummary, CellSummary, Difference]] = []
    for table in tables:
        for column in table.columns:
            cells = {c.label: c for c in table.cells() if c.column == column.text and c.n}
            for a, b in pairs({label: cell.measured_ratio for label, cell in cells.items()}):
                (first, clusters), (second, _) = scores.of(cells[a].cell_ids), scores.of(cells[b].cell_ids)
                if (~np.isnan(first) & ~np.isnan(second)).any():
                    change = difference(first, second, clusters)
                    found.append((table, column.text, cells[a], cells[b], change))
    verdicts = judge_all([entry[4] for entry in found], family_of(run, tables), margin)
    return [Pair(*entry, verdict) for entry, verdict in zip(found, verdicts, strict=True) if verdict is not None]
