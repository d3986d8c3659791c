"""Finding 6: long answers lose more than 20 points at and below 0.3, and keeping whole shots loses less than tokens."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

from kvcli.analysis.findings.data import Data, deep_columns, most_shots, named, named_tasks
from kvcli.analysis.findings.outcome import LEVEL, STEEP, Finding, Outcome, listed, points, shared, untested
from kvcli.analysis.findings.part import Part, part_of, smallest_common
from kvcli.analysis.findings.same_bytes import kind_against_tokens
from kvcli.analysis.marked import code
from kvcli.analysis.reading.roles import names_of
from kvcli.analysis.tables.table import TaskTable

TITLE = "Long answers are sensitive, and whole shots help"


def is_long(table: TaskTable) -> bool:
    return any(fnmatch(table.task, form) for form in names_of("long_generation"))


def long_generation(data: Data, level: float = LEVEL) -> Finding:
    """Two tests at half the risk each. The finding holds where both do and does not where one does not."""
    half, tables = shared(level, 2), [table for table in data.usual() if is_long(table)]
    if not tables:
        asked = f"it takes a task of long generation (LongGenBench, tb_longgen) with one of {named('token')}"
        return untested(6, TITLE, f"{asked} at a ratio of 0.3 or less")
    first = steep_loss(data, tables, half)
    asked = (
        f"whole shots against tokens takes {named('shot')} and one of {named('token')} at the same measured bytes of "
        "0.3 or less, full clearly above chance"
    )
    second = kind_against_tokens(6, TITLE, data, tables, "shot", half, asked)
    said = (
        f"Loss beyond {100 * STEEP:.0f} points with methods that keep tokens: {first.outcome}. {first.said}".rstrip()
        + f" Whole shots against tokens: {second.outcome}. {second.said}".rstrip()
    )
    outcome = _both(first.outcome, second.outcome)
    needs = "; ".join(filter(None, [first.needs, second.needs])) if outcome is not Outcome.NOT else ""
    return Finding(6, TITLE, outcome, said, needs)


def _both(first: Outcome, second: Outcome) -> Outcome:
    """Not established is said only where both were tested: what the run lacks, more samples do not give."""
    outcomes = {first, second}
    for outcome in (Outcome.NOT, Outcome.UNTESTED, Outcome.OPEN):
        if outcome in outcomes:
            return outcome
    return Outcome.HOLDS


def steep_loss(data: Data, tables: Sequence[TaskTable], level: float) -> Finding:
    """Every task where full can fall so far: the mean over methods that keep tokens, paired with full."""
    there = most_shots([table for table in tables if deep_columns([table], "token")])
    tall = [table for table in there if data.full_above(table, STEEP, level) and data.above_chance(table, level)]
    parts = [part for table in tall if (part := _part(data, table))]
    if not parts:
        return untested(6, TITLE, *_lacking(there))
    each = shared(level, len(parts))
    changes = [part.difference() for part in parts]
    ends = [change.at(each) for change in changes]
    said = "; ".join(
        f"{code(part.name)} at {part.column}, mean over {listed(part.methods)}: {points(change.value, end)} "
        f"(n = {change.n})"
        for part, change, end in zip(parts, changes, ends, strict=True)
    )
    low = [table for table in there if table not in tall]
    said += f". Not tested, full scores too little to fall so far: {named_tasks(low)}." if low else "."
    if any(end and end.high < -STEEP for end in ends):
        return Finding(6, TITLE, Outcome.HOLDS, said)
    if all(end and end.low > -STEEP for end in ends):
        return Finding(6, TITLE, Outcome.NOT, said)
    needs = f"an interval that lies on one side of -{100 * STEEP:.0f} points: more samples"
    return Finding(6, TITLE, Outcome.OPEN, said, needs)


def _lacking(tables: Sequence[TaskTable]) -> tuple[str, str]:
    """What it takes, and what is here."""
    limit = f"{100 * STEEP:.0f} points"
    if not tables:
        return f"the loss takes one of {named('token')} at a ratio of 0.3 or less", ""
    asked = f"the loss takes a task where full scores clearly above chance and above {limit}"
    return asked, f"full is not shown to score more than {limit}: {named_tasks(tables)}."


def _part(data: Data, table: TaskTable) -> Part | None:
    common = smallest_common([table], "token")
    return part_of(data, table, common) if common else None
