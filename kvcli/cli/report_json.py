"""What `kvcli report --json` prints: the tables with all numbers of each cell, the findings, the warnings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from kvcli.analysis.marked import plain
from kvcli.analysis.reports.contents import Contents
from kvcli.analysis.statistics.stats import Interval
from kvcli.analysis.tables.table import CellSummary, TaskTable
from kvcli.cli.tables import as_json


def numbers(made: Contents) -> dict[str, Any]:
    """All but names of files."""
    tables = as_json(made.tables, made.judged)
    for table, facts in zip(made.tables, tables, strict=True):
        for cell, found in zip(table.cells(), facts["cells"], strict=True):
            found |= _further(made, table, cell)
        full = [(table.full, facts["full"])] if table.full is not None else []
        for cell, found in [*full, *zip(table.cells(), facts["cells"], strict=True)]:
            if "judged" in found:
                found["judged"]["kind"] = made.judged.said(cell)
    return {
        "margin": made.margin, "family": {"size": made.judged.family.size, "level": made.judged.family.level},
        "tables": tables, "findings": _findings(made),
        "warnings": [warning for table in made.tables for warning in table.warnings],
    }  # fmt: skip


def _further(made: Contents, table: TaskTable, cell: CellSummary) -> dict[str, Any]:
    """detectable: smallest change with an 80 % chance of being established; null where none has."""
    kept = made.kept(table, cell)
    return {
        "detectable": made.detectable(cell.difference),
        "retention": kept and {"value": kept.value, "interval": _ends(kept.interval), "note": kept.note},
    }


def _ends(interval: Interval | None) -> dict[str, Any] | None:
    """An end that the data do not hold is null."""
    if interval is None:
        return None
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in dataclasses.asdict(interval).items()}


def _findings(made: Contents) -> list[dict[str, Any]]:
    return [
        {
            "number": f.number,
            "title": f.title,
            "outcome": str(f.outcome),
            "said": plain(f.said),
            "needs": plain(f.needs),
        }
        for f in made.findings
    ]
