"""Finding 4: with many exemplars, methods that keep chunks lose less than those that keep tokens."""

from __future__ import annotations

from kvcli.analysis.findings.data import Data, named
from kvcli.analysis.findings.outcome import LEVEL, MANY_SHOTS, Finding
from kvcli.analysis.findings.same_bytes import kind_against_tokens
from kvcli.analysis.tables.table import TaskTable

TITLE = "Chunks do better with many shots"


def has_many_shots(table: TaskTable) -> bool:
    return (table.shots or 0) >= MANY_SHOTS


def chunks_on_many_shots(data: Data, level: float = LEVEL) -> Finding:
    asked = (
        f"it takes a task with at least {MANY_SHOTS} shots and full clearly above chance, {named('chunk')} and one of "
        f"{named('token')} at the same measured bytes, at 0.3 or less"
    )
    tables = [table for table in data.usual() if has_many_shots(table)]
    return kind_against_tokens(4, TITLE, data, tables, "chunk", level, asked)
