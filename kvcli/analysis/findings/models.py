"""Finding 2: how much is lost depends on how the model was trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvcli.analysis.findings.data import Data, deep_columns, most_shots
from kvcli.analysis.findings.outcome import LEVEL, Finding, percent, shared, untested, verdict_of
from kvcli.analysis.findings.part import Part, kept_apart, part_of, smallest_common
from kvcli.analysis.marked import code
from kvcli.analysis.tables.table import TaskTable

TITLE = "Loss depends on how the model was trained"
ASKED = (
    f"it takes runs of two models with the same task, shots, methods and ratio: {code('kvcli report RUN OTHER-RUN')}"
)
CAVEAT = (
    "How the models were trained is not in the data, nor do they differ in that alone: this says of these models only "
    "whether they differ."
)


def model_type(runs: Sequence[Data], level: float = LEVEL) -> Finding:
    """Models trained otherwise (instruct, reasoning, base) lose different shares on the same task."""
    compared = [
        (mine, yours, other)
        for other in runs[1:]
        if other.run.model != runs[0].run.model
        for mine, yours in _twins(runs[0], other)
        if mine.kept(level).interval and yours.kept(level).interval
    ]
    if not compared:
        return untested(2, TITLE, ASKED)
    each = shared(level, len(compared))
    apart = [kept_apart(mine.kept(each), yours.kept(each)) for mine, yours, _ in compared]
    said = "; ".join(
        f"{code(mine.name)} at {mine.column}: {code(runs[0].run.model)} keeps {percent(mine.kept(level))}, "
        f"{code(other.run.model)} {percent(yours.kept(level))}"
        for mine, yours, other in compared
    )
    outcome, text, needs = verdict_of(apart, said)
    return Finding(2, TITLE, outcome, f"{text} {CAVEAT}", needs)


def _twins(first: Data, other: Data) -> Iterator[tuple[Part, Part]]:
    """The same prompts with the methods that both have at their smallest common ratio."""
    theirs = {_prompts(table): table for table in _deepest(other)}
    for table in _deepest(first):
        twin = theirs.get(_prompts(table))
        common = smallest_common([table, twin]) if twin else None
        mine = part_of(first, table, common) if common else None
        yours = part_of(other, twin, common) if twin and common else None
        if mine and yours:
            yield mine, yours


def _deepest(data: Data) -> list[TaskTable]:
    return most_shots([table for table in data.usual() if deep_columns([table])])


def _prompts(table: TaskTable) -> tuple[Any, ...]:
    return table.task, table.shots, table.first_token, table.version
