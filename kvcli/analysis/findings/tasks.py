"""Finding 1: how much is lost depends on the task."""

from __future__ import annotations

from itertools import combinations

from kvcli.analysis.findings.data import Data, deep_columns, most_shots, named_tasks
from kvcli.analysis.findings.outcome import LARGE, LEVEL, Finding, Outcome, mean_over, percent, shared, untested
from kvcli.analysis.findings.part import kept_apart, part_of, widest_common
from kvcli.analysis.marked import code

TITLE = "Loss depends on the task"


def task_dependent(data: Data, level: float = LEVEL) -> Finding:
    """Tasks keep different shares of their score at the smallest ratio that they have in common."""
    deep = most_shots([table for table in data.usual() if deep_columns([table])])
    tables = [table for table in deep if data.above_chance(table, level)]
    found = widest_common(tables)
    parts = [part for table in found[1] if (part := part_of(data, table, found[0]))] if found else []
    known = [part for part in parts if part.kept(level).interval is not None]
    if found is None or len(known) < 2:
        return untested(
            1, TITLE, "it takes two tasks with full clearly above chance, and a method that both have at one ratio "
            "of 0.3 or less",
        )  # fmt: skip
    pairs = list(combinations(known, 2))
    narrow = {part.name: part.kept(shared(level, len(pairs))) for part in known}
    apart = [kept_apart(narrow[a.name], narrow[b.name]) for a, b in pairs]
    differ = sum(interval is not None and not interval.low <= 0 <= interval.high for interval in apart)
    kept = sorted(((part.kept(level), part) for part in known), key=lambda k: k[0].value or 0.0)
    said = (
        f"At {found[0].column}, {mean_over(len(found[0].labels))}, kept of what full has above chance: "
        + ", ".join(f"{code(part.name)} {percent(one)} (n = {len(part.full)})" for one, part in kept)
        + f"; {differ} of {len(pairs)} pairs of tasks differ."
    )
    others = [table for table in tables if table.task not in narrow]
    said += f" Not compared, without these methods there: {named_tasks(others)}." if others else ""
    if differ:
        return Finding(1, TITLE, Outcome.HOLDS, said)
    if all(interval and interval.low > -LARGE and interval.high < LARGE for interval in apart):
        return Finding(1, TITLE, Outcome.NOT, said + f" No pair can differ by more than {100 * LARGE:.0f} %.")
    return Finding(1, TITLE, Outcome.OPEN, said, "more samples per task")
