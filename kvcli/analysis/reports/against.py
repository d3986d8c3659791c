"""A run beside the numbers printed in a paper, where both measured the same thing."""

from __future__ import annotations

from collections.abc import Sequence

from kvcli.analysis.marked import Bullets, Grid, Paragraph, Section, code, section
from kvcli.analysis.reading import names
from kvcli.analysis.reading.load import Run
from kvcli.analysis.reports.naming import named
from kvcli.analysis.tables import published, wording
from kvcli.analysis.tables.published import Published
from kvcli.analysis.tables.table import DENSE, FULL, CellSummary, TaskTable
from kvcli.errors import KvcliError

PAPERS = ("kvfundabench",)


def check(paper: str) -> None:
    """Raises KvcliError for a paper whose numbers are not there."""
    if paper not in PAPERS:
        raise KvcliError(f"no printed numbers of '{paper}'", given=f"--against {paper}", fix="--against kvfundabench")


def against_section(run: Run, tables: Sequence[TaskTable]) -> Section:
    """Rows where model, task, shots, method and ratio are the paper's; and what is known to be wrong with them."""
    title = "Beside the numbers printed in KVFundaBench (arXiv:2502.01941v4)"
    rows, letters = [], set()
    for table in tables:
        if table.weights != DENSE or table.query != "aware" or table.shot_seed or table.shot_order:
            continue
        every = published.find(run.model, task=table.task, shots=table.shots, variant="")
        full = next((row for row in every if row.method == FULL), None)
        for cell in ([table.full] if table.full else []) + table.cells():
            row = _printed(every, cell)
            if row is not None and cell.n:
                rows.append(_row(table, tables, cell, row, full))
                letters |= set(row.notes)
    if not rows:
        return section("against", title, Paragraph(_nothing(run, tables)))
    notes = published.notes()
    explained = (
        "Change: relative to full, as the paper prints it. Its prompts, templates and settings were not published, so "
        "a score that differs proves neither wrong; it states no intervals and rarely a number of samples. Intervals "
        "are of each cell alone, unadjusted."
    )
    head = (
        "task", "method", "asked", "printed", "its change", "here [95 %]", "outputs here", "change here", "n", "notes",
    )  # fmt: skip
    return section(
        "against", title, Paragraph(explained), Grid(head, rows, frozenset({3, 4, 5, 7, 8})),
        Bullets.of([f"{letter}: {notes[letter]}" for letter in sorted(letters)]),
    )  # fmt: skip


def _printed(every: Sequence[Published], cell: CellSummary) -> Published | None:
    """Of the method with its default settings."""
    if cell.method == FULL:
        return next((row for row in every if row.method == FULL), None)
    spelt = names.spellings(cell.method)
    plain = cell.method in spelt and ":" not in cell.method and " [" not in cell.method
    return next((row for row in every if plain and row.method == cell.method and cell.column == f"{row.ratio:g}"), None)


def _row(
    table: TaskTable, tables: Sequence[TaskTable], cell: CellSummary, row: Published, full: Published | None
) -> list[str]:
    theirs = None if full is None or row.method == FULL else row.score / full.score - 1
    return [
        named(table, tables), code(cell.label), "" if row.method == FULL else cell.column, row.printed,
        "" if theirs is None else wording.relative(theirs),
        f"{cell.score:.4f} {wording.score_interval(cell.interval)}", wording.outputs(cell),
        wording.relative(cell.relative) if cell.difference else "", str(cell.n), " ".join(row.notes),
    ]  # fmt: skip


def _nothing(run: Run, tables: Sequence[TaskTable]) -> str:
    known = published.find(run.model)
    if not known:
        models = ", ".join(map(code, published.models()))
        return f"The paper prints nothing of {code(run.model)}. Its models: {models}."
    grid = sorted({(row.task, row.shots) for row in known})
    had = ", ".join(f"{code(task)} with {wording.shots(shots)}" for task, shots in grid)
    mine = ", ".join(code(t.task) + (f" with {wording.shots(t.shots)}" if t.shots is not None else "") for t in tables)
    return f"No cell of this run is one of the paper's. Of this model it prints {had}; here are {mine}."
