"""Verdicts of all cells of a run's tables, in the family that its plan makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvcli.analysis.reading.load import Run
from kvcli.analysis.statistics import family
from kvcli.analysis.statistics.family import Family
from kvcli.analysis.statistics.verdicts import MARGIN, Kind, Verdict, judge_all
from kvcli.analysis.tables import established
from kvcli.analysis.tables.doubts import NOTHING
from kvcli.analysis.tables.table import CellSummary, TaskTable


@dataclass(frozen=True)
class Judged:
    """All verdicts of one run at one margin."""

    family: Family
    margin: float
    verdicts: Mapping[tuple[str, ...], Verdict]
    """By the ids of the cells that a comparison averages."""
    silent: frozenset[tuple[str, ...]] = frozenset()
    """Those that are with a full that says nothing: of them no verdict is spoken."""

    def of(self, cell: CellSummary) -> Verdict | None:
        """None where the cell was not compared. Of `full` with other weights: against dense `full`."""
        return self.verdicts.get(cell.cell_ids)

    def said(self, cell: CellSummary) -> str:
        """The verdict as tables show it; empty where the cell was not compared."""
        verdict = self.of(cell)
        return "" if verdict is None else NOTHING if cell.cell_ids in self.silent else str(verdict.kind)


def judge_tables(run: Run, tables: Sequence[TaskTable], margin: float = MARGIN) -> Judged:
    """tables: those to speak of; the family is the whole plan, also where only some are shown."""
    found = established.compared(tables)
    whole = family.planned(run.meta, len(found))
    verdicts = judge_all(list(found.values()), whole, margin)
    silent = established.silent(tables)
    known = {key: v for key, v in zip(found, verdicts, strict=True) if v is not None}
    return Judged(whole, margin, {key: _silenced(v) if key in silent else v for key, v in known.items()}, silent)


def _silenced(verdict: Verdict) -> Verdict:
    """The same numbers, from which nothing follows: more samples would not help either."""
    return replace(verdict, kind=Kind.OPEN, needed=None)
