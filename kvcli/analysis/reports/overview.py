"""One table over all tasks for each size: what a paper prints. Methods in rows, tasks in columns, `full` first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcli.analysis.marked import Block, Grid, Paragraph, Section, code, raised, section, strong, user
from kvcli.analysis.reports import phrases
from kvcli.analysis.reports.naming import told_apart
from kvcli.analysis.statistics.verdicts import Kind
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.doubts import NOTHING, nothing_to_say
from kvcli.analysis.tables.judged import Judged
from kvcli.analysis.tables.table import DENSE, MATCH, OWN, CellSummary, Column, TaskTable, joined, twin

LEAST = 2
"""A size of fewer tables than this has no table over tasks: it would be a column of that task's own table."""
WARNED, SILENT = "w", "x"
"""Raised behind a task whose sanity warning has to be read with its numbers, or of which nothing can be said."""
VERDICT_MARKS = {Kind.UNCHANGED: "=", Kind.NO_LOSS: "+"}


@dataclass(frozen=True)
class Overview:
    """One size in one query mode, kind of weights and first-token mode."""

    column: Column
    mode: str
    """What is not as usual; often empty."""
    tables: tuple[TaskTable, ...]
    rows: tuple[tuple[str, tuple[CellSummary | None, ...]], ...]
    """(method as shown, its cell in each table)."""

    @property
    def cells(self) -> list[CellSummary]:
        return [cell for _, cells in self.rows for cell in cells if cell is not None]

    @property
    def size(self) -> str:
        """'kept ratio 0.1'."""
        if self.column.kind == "ratio":
            return f"kept ratio {self.column.text}"
        if self.column.kind == "match":
            return f"the bytes of {self.column.text.removeprefix(MATCH)}"
        return "methods with a size of their own" if self.column.text == OWN else self.column.text


def overviews(tables: Sequence[TaskTable]) -> list[Overview]:
    """First-token mode prefill stands beside compressed in a section of its own, so not here too; methods that know
    no such modes stand with the others."""
    spoken = [t for t in joined(tables) if t.rows and not (t.first_token == "prefill" and twin(t, tables))]
    groups: dict[tuple[str, str, str], list[TaskTable]] = {}
    for table in spoken:
        groups.setdefault((table.query, table.weights, table.first_token), []).append(table)
    several = len({t.first_token for t in spoken}) > 1
    found = []
    for (query, weights, first_token), group in groups.items():
        parts = [f"query {query}"] * (query != "aware") + [f"weights {weights}"] * (weights != DENSE)
        parts += [f"first token {first_token}"] * several
        for column in sorted({c for t in group for c in t.columns}, key=lambda c: c.order):
            having = tuple(t for t in group if column in t.columns)
            if len(having) >= LEAST:
                found.append(Overview(column, ", ".join(parts), having, _rows(column, having)))
    return found


def _rows(column: Column, tables: Sequence[TaskTable]) -> tuple[tuple[str, tuple[CellSummary | None, ...]], ...]:
    """Controls last, as in the verdict."""
    cells = [{row.label: row.cells[column.text] for row in t.rows if column.text in row.cells} for t in tables]
    labels = list(dict.fromkeys(label for each in cells for label in each))
    found = [(label, tuple(each.get(label) for each in cells)) for label in labels]
    return tuple(sorted(found, key=lambda row: any(c is not None and phrases.is_control(c) for c in row[1])))


def heads(one: Overview) -> list[tuple[str, str, str]]:
    """Of every column the task, what tells it from others of that task here, and the letter of its sanity warning."""
    return [(t.task, told_apart(t, one.tables), _letter(t)) for t in one.tables]


def _letter(table: TaskTable) -> str:
    return SILENT if nothing_to_say(table) else WARNED if table.warnings else ""


def samples(one: Overview) -> str:
    """'n = 59', 'n = 59-60', or for each task where they differ."""
    ranges = [wording.sample_range(t) for t in one.tables]
    if len(set(ranges)) == 1:
        return f"n = {ranges[0]}"
    each = (f"{t.task}{f' ({apart})' if (apart := told_apart(t, one.tables)) else ''} {count}"
            for t, count in zip(one.tables, ranges, strict=True))  # fmt: skip
    return f"n: {', '.join(each)}"


def explained(found: Sequence[Overview], judged: Judged) -> str:
    """How to read a cell; flags and shares only as far as they occur."""
    within = phrases.margin_text(judged.margin)
    size = judged.family.size
    established = f"with all {size:,} comparisons considered" if size > 1 else "(the one comparison)"
    cells = [cell for one in found for cell in one.cells]
    flags = [
        f"{mark}: {flag.replace('_', ' ')}"
        for flag, mark in wording.MARKS.items()
        if any(c.flags.get(flag) for c in cells)
    ]
    letters = {_letter(t) for one in found for t in one.tables}
    flags += [f"{WARNED}: has a sanity warning"] * (WARNED in letters) + [f"{SILENT}: {NOTHING}"] * (SILENT in letters)
    shown = {mark for one in found for mark in _shares_of(one)}
    shares = [f"{mark} per cent of outputs {words}" for mark, words in wording.SHARE_WORDS.items() if mark in shown]
    text = (
        "Score, points to full [95 % interval of the cell alone, unadjusted]; bold: a loss or gain established "
        f"{established}; = unchanged within {within}, + no loss beyond {within}, all others not established."
    )
    flags += [wording.BOUND_MEANING] * any(map(wording.bounded, cells))
    text += f" Raised: {'; '.join(flags)}." if flags else ""
    near = f"beside methods only where further than {100 * wording.ALIKE:.0f} points from full's"
    return text + (f" {'; '.join(shares)}: {near}." if shares else "")


def _shares_of(one: Overview) -> set[str]:
    columns = zip(one.tables, zip(*(cells for _, cells in one.rows), strict=True), strict=True)
    pairs = [(cell, table.full) for table, cells in columns for cell in cells if cell is not None]
    pairs += [(table.full, None) for table in one.tables if table.full is not None and table.full.n]
    return {mark for cell, full in pairs for mark in wording.shares(cell, full)}


def overview_section(tables: Sequence[TaskTable], judged: Judged) -> Section | None:
    """All sizes below each other; None where no two tasks share one."""
    found = overviews(tables)
    if not found:
        return None
    blocks: list[Block] = [Paragraph(explained(found, judged))]
    for one in found:
        of = ", ".join(filter(None, [strong(_capital(one.size)), user(one.mode), user(samples(one))]))
        blocks += [Paragraph(f"{of}."), _grid(one, judged)]
    return section("overview", "All tasks at one size", *blocks)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _grid(one: Overview, judged: Judged) -> Grid:
    head = ["method"]
    for task, apart, letter in heads(one):
        head.append(code(task) + (f" ({user(apart)})" if apart else "") + raised(letter))
    full = [_full(table.full) for table in one.tables]
    rows = [[code("full"), *full]] if any(full) else []
    rows += [
        [code(label), *(_cell(c, t.full, judged) for c, t in zip(cells, one.tables, strict=True))]
        for label, cells in one.rows
    ]
    return Grid(head, rows, frozenset(range(1, len(head))))


def _full(full: CellSummary | None) -> str:
    if full is None or not full.n:
        return ""
    shares = " ".join(wording.shares(full).values())
    return f"{wording.score(full.score)} {wording.score_interval(full.interval)} {shares}".rstrip()


def _cell(cell: CellSummary | None, full: CellSummary | None, judged: Judged) -> str:
    """'0.80, -18.6 [-30.4, -10.7]', the difference bold where it is established."""
    if cell is None or not cell.n:
        return ""
    flags = raised(wording.flag_marks(cell))
    shares = " ".join(wording.shares(cell, full).values())
    if cell.difference is None:
        return " ".join(filter(None, [wording.score(cell.score) + flags, shares]))
    value = wording.points(cell.difference.value)
    value = strong(value) if wording.established(cell) else value
    ends = wording.points_interval(cell.difference.interval) + raised(wording.BOUND * wording.bounded(cell))
    said = f"{wording.score(cell.score)}, {value}{flags} {ends}"
    return " ".join(filter(None, [said, mark(cell, judged), shares]))


def mark(cell: CellSummary, judged: Judged) -> str:
    """'=' or '+' of a cell that is shown to have lost nothing or little."""
    verdict = judged.of(cell)
    return VERDICT_MARKS.get(verdict.kind, "") if verdict else ""
