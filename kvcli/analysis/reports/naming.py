"""How a table is named where its task has several: by what tells it from the others."""

from __future__ import annotations

from collections.abc import Sequence

from kvcli.analysis.marked import code, user
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.table import DENSE, TaskTable


def label(table: TaskTable, tables: Sequence[TaskTable]) -> str:
    """The task, with what tells its tables apart where it has several."""
    return f"{table.task}{f' ({apart})' if (apart := told_apart(table, tables)) else ''}"


def named(table: TaskTable, tables: Sequence[TaskTable]) -> str:
    """The same, marked as a name."""
    apart = told_apart(table, tables)
    return f"{code(table.task)}{f' ({user(apart)})' if apart else ''}"


def told_apart(table: TaskTable, tables: Sequence[TaskTable]) -> str:
    same = [t for t in tables if t.task == table.task]

    def differ(name: str) -> bool:
        return len({getattr(t, name) for t in same}) > 1

    parts = [
        f"first token {table.first_token}" if differ("first_token") else "",
        f"query {table.query}" if differ("query") else "",
        wording.shots(table.shots) if differ("shots") and table.shots is not None else "",
        f"shot seed {table.shot_seed}" if differ("shot_seed") else "",
        f"shot order {table.shot_order}" if differ("shot_order") else "",
        table.weights if table.weights != DENSE else "",
    ]
    return ", ".join(filter(None, parts))
