"""Marks each cell of a run's tables by what stands with all comparisons of the sweep considered.

A loss or gain does not depend on the margin, so this is known before any is stated. judged.py gives the whole verdicts;
both agree: tests/analysis/test_judged.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvcli.analysis.statistics.family import Family, holm, planned
from kvcli.analysis.statistics.stats import ALPHA, Difference
from kvcli.analysis.tables.doubts import nothing_to_say
from kvcli.analysis.tables.table import CellSummary, TaskTable, dense_twin


def compared(tables: Sequence[TaskTable]) -> dict[tuple[str, ...], Difference]:
    """Every difference of the tables by the ids of its cells. Of `full` with other weights: to dense `full`."""
    found: dict[tuple[str, ...], Difference] = {}
    for table in tables:
        if table.full is not None and table.against_dense is not None:
            found[table.full.cell_ids] = table.against_dense
        found.update((cell.cell_ids, cell.difference) for cell in table.cells() if cell.difference is not None)
    return found


def silent(tables: Sequence[TaskTable]) -> frozenset[tuple[str, ...]]:
    """Comparisons with a full that says nothing; of `full` with other weights: where dense full does."""
    found = {cell.cell_ids for table in tables if nothing_to_say(table) for cell in table.cells()}
    for table in tables:
        dense = dense_twin(table, tables)
        if dense is not None and table.full is not None and nothing_to_say(dense):
            found.add(table.full.cell_ids)
    return frozenset(found)


def in_family(meta: Mapping[str, Any], tables: Sequence[TaskTable]) -> list[TaskTable]:
    """The tables with `in_family` of every cell. meta: run.json, whose plan is the family, also of some tables."""
    found = compared(tables)
    whole = planned(meta, len(found))
    adjusted = holm([difference.p for difference in found.values()], max(whole.size, len(found)))
    kinds = {
        ids: kind(difference, whole, p) for (ids, difference), p in zip(found.items(), adjusted, strict=True)
    }  # fmt: skip
    kinds |= dict.fromkeys(silent(tables), "none")
    return [_marked(table, kinds) for table in tables]


def kind(found: Difference, family: Family, adjusted: float | None) -> str:
    """'loss', 'gain' or 'open'. adjusted: its Holm p-value, None where there is none.

    Intervals of the family lie around those of one comparison, so what is not established alone is not looked at again.
    """
    if found.verdict == "open" or (adjusted is not None and adjusted >= ALPHA):
        return "open"
    ends = found.at(family.level)
    return "open" if ends is None or ends.low <= 0 <= ends.high else found.verdict


def _marked(table: TaskTable, kinds: Mapping[tuple[str, ...], str]) -> TaskTable:
    def marked(cell: CellSummary) -> CellSummary:
        return replace(cell, in_family=kinds.get(cell.cell_ids, "none"))

    rows = (replace(row, cells={size: marked(cell) for size, cell in row.cells.items()}) for row in table.rows)
    return replace(table, full=table.full and marked(table.full), rows=tuple(rows))
