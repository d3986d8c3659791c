"""Finding 3: the fewer exemplars, the larger the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcli.analysis.findings.data import Data, by_task, deep_columns
from kvcli.analysis.findings.outcome import LEVEL, Finding, mean_over, percent, shared, untested, verdict_of
from kvcli.analysis.findings.part import Part, kept_apart, part_of, smallest_common
from kvcli.analysis.marked import code
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.table import TaskTable

TITLE = "Fewer shots, larger loss"
ASKED = (
    "it takes one task with two numbers of shots at a ratio of 0.3 or less, full clearly above chance with both: "
    f"{code('kvcli sweep --shots 1,8 --ratio 0.1')}"
)


def short_prompts(data: Data, level: float = LEVEL) -> Finding:
    """With fewer exemplars the loss at and below 0.3 is larger."""
    found = [two for tables in by_task(data.usual()).values() if (two := _extremes(data, tables))]
    compared = [(few, many) for few, many in found if few.kept(level).interval and many.kept(level).interval]
    if not compared:
        return untested(3, TITLE, ASKED)
    each = shared(level, len(compared))
    apart = [kept_apart(many.kept(each), few.kept(each)) for few, many in compared]
    said = "; ".join(
        f"{code(few.name)} at {few.column}, {mean_over(len(few.methods))}: {_kept(few, level)}, {_kept(many, level)}"
        for few, many in compared
    )
    return Finding(3, TITLE, *verdict_of(apart, said, claimed=True))


def _kept(part: Part, level: float) -> str:
    shots = part.table.shots or 0
    return f"{wording.shots(shots)} keep{'s' * (shots == 1)} {percent(part.kept(level))} (n = {len(part.full)})"


def _extremes(data: Data, tables: Sequence[TaskTable]) -> tuple[Part, Part] | None:
    """The fewest shots, of at least 1, and the most that share a method at a ratio of 0.3 or less."""
    for few, many in _pairs(sorted((t for t in tables if t.shots and deep_columns([t])), key=lambda t: t.shots or 0)):
        common = smallest_common([few, many])
        parts = [part for table in (few, many) if common and (part := part_of(data, table, common))]
        if len(parts) == 2:
            return parts[0], parts[1]
    return None


def _pairs(tables: Sequence[TaskTable]) -> Iterator[tuple[TaskTable, TaskTable]]:
    """tables: by their shots. The two furthest apart first."""
    for place, few in enumerate(tables):
        for many in reversed(tables[place + 1 :]):
            yield few, many
