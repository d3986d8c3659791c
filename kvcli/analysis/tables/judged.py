"""Verdicts of all cells of a run's tables, in the family that its plan makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvcli.analysis.reading.load import Run
from kvcli.analysis.statistics import family
from kvcli.analysis.statistics.family import Family
from kvcli.analysis.statistics.verdicts import MARGIN, Verdict, judge_all
from kvcli.analysis.tables import established
from kvcli.analysis.tables.table import CellSummary, TaskTable


@dataclass(frozen=True)
class Judged:
    """All verdicts of one run at one margin."""

    family: Family
    margin: float
    verdicts: Mapping[tuple[str, ...], Verdict]
    """By the ids of the cells that a comparison averages."""

    def of(self, cell: CellSummary) -> Verdict | None:
        """None where the cell was not compared. Of `full` with other weights: against dense `full`."""
        return self.verdicts.get(cell.cell_ids)


def judge_tables(run: Run, tables: Sequence[TaskTable], margin: float = MARGIN) -> Judged:
    """tables: those to speak of; the family is the whole plan, also where only some are shown."""
    found = established.compared(tables)
    whole = family.planned(run.meta, len(found))
    verdicts = judge_all(list(found.values()), whole, margin)
    return Judged(whole, margin, {key: v for key, v in zip(found, verdicts, strict=True) if v is not None})
