"""The tables of a report as LaTeX: methods by tasks for each size, and methods by sizes for each task."""

from __future__ import annotations

from collections.abc import Sequence

from kvcli.analysis.marked import plain
from kvcli.analysis.reports.contents import Contents
from kvcli.analysis.reports.how import table_facts
from kvcli.analysis.reports.latex_text import escaped, fitted, key, line, ruled, small
from kvcli.analysis.reports.naming import label
from kvcli.analysis.reports.overview import Overview, explained, heads, mark, samples
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.table import CellSummary, TaskTable

WIDE = 5
"""More sizes than this, and intervals stand under the differences."""
WIDE_TASKS = 2
"""More tasks than this, and intervals stand under the scores in the table over tasks."""


def overview(one: Overview, found: Sequence[Overview], made: Contents) -> list[str]:
    """Methods by tasks at one size; of many tasks the intervals stand under the scores."""
    stacked = len(one.tables) > WIDE_TASKS
    head = ["method"]
    for task, apart, letter in heads(one):
        above = rf"\textsuperscript{{{letter}}}" if letter else ""
        head.append(_name(task) + (f" ({escaped(apart)})" if apart else "") + above)
    fulls = [table.full for table in one.tables]
    rows = [line("full", *(_score(f) if stacked else f"{_score(f)} {_score_ends(f)}" for f in fulls))]
    rows += [line("", *map(_score_ends, fulls)) + "[2pt]"] * stacked
    for method, cells in one.rows:
        pairs = [(cell, full) for cell, full in zip(cells, fulls, strict=True)]
        rows.append(line(_name(method), *(_beside(cell, full, made, not stacked) for cell, full in pairs)))
        rows += [line("", *map(_ends, cells)) + "[2pt]"] * stacked
    mode = f", {one.mode}" if one.mode else ""
    caption = escaped(f"All tasks, {one.size}{mode}; {samples(one)}. {explained([one], made.judged)}")
    return [
        r"\begin{table*}[htbp]", r"\centering\small", rf"\caption{{{caption}}}",
        rf"\label{{tab:kv-all-{found.index(one) + 1}}}", *fitted(ruled(f"l{'r' * len(fulls)}", line(*head), rows)),
        r"\end{table*}",
    ]  # fmt: skip


def _score(full: CellSummary | None) -> str:
    if full is None or not full.n:
        return "--"
    shares = escaped(" ".join(wording.shares(full).values()))
    return " ".join(filter(None, [wording.score(full.score), small(shares) if shares else ""]))


def _score_ends(full: CellSummary | None) -> str:
    return small(f"${wording.score_interval(full.interval)}$") if full and full.n and full.interval else ""


def _beside(cell: CellSummary | None, full: CellSummary | None, made: Contents, ends: bool) -> str:
    """Score, points to full, its mark and the shares unlike full's."""
    if cell is None or not cell.n:
        return "--"
    shares = escaped(" ".join(wording.shares(cell, full).values()))
    if cell.difference is None:
        return " ".join(filter(None, [wording.score(cell.score), small(shares) if shares else ""]))
    parts = [f"{wording.score(cell.score)}, {_points(cell)}", _ends(cell) if ends else "", mark(cell, made.judged)]
    return " ".join(filter(None, [*parts, small(shares) if shares else ""]))


def task_table(table: TaskTable, made: Contents) -> list[str]:
    """Methods by sizes: points to full with their interval, bold where loss or gain stands in the family."""
    sizes = [column.text for column in table.columns]
    stacked = len(sizes) > WIDE
    rows = []
    for row in table.rows:
        cells = [row.cells.get(size) for size in sizes]
        rows.append(line(_name(row.label), *(_value(c, table.full, made, not stacked) for c in cells)))
        if stacked:
            rows.append(line("", *map(_ends, cells)) + r"[2pt]")
    return _float(table, made, "", _caption(table, made), rows)


def relative_table(table: TaskTable, made: Contents) -> list[str]:
    """Methods by sizes: the paper's relative change, under it what was kept above chance."""
    rows = []
    for row in table.rows:
        cells = [row.cells.get(column.text) for column in table.columns]
        kept = [made.kept(table, cell) if cell else None for cell in cells]
        rows.append(line(_name(row.label), *(_relative(cell) for cell in cells)))
        rows.append(line("", *(small(escaped(wording.kept(one))) if one else "" for one in kept)) + r"[2pt]")
    caption = (
        f"{label(table, made.tables)}: relative change (P - P full) / P full, and under it the share kept of what full "
        f"has above chance, (P - chance) / (P full - chance), chance {wording.score(table.chance or 0.0)}, with its "
        "95 % interval, unadjusted."
    )
    return _float(table, made, "-relative", escaped(caption), rows) if table.full and table.rows else []


def _relative(cell: CellSummary | None) -> str:
    if cell is None or cell.difference is None or cell.relative is None:
        return "--"
    return f"${wording.points(cell.relative)}$ \\%"


def _float(table: TaskTable, made: Contents, kind: str, caption: str, rows: Sequence[str]) -> list[str]:
    sizes = [escaped(column.text) for column in table.columns]
    return [
        r"\begin{table}[htbp]", r"\centering\small", rf"\caption{{{caption}}}",
        rf"\label{{tab:kv-{key(label(table, made.tables))}{kind}}}",
        *fitted(ruled(f"l{'r' * len(sizes)}", line("method", *sizes), rows)), r"\end{table}",
    ]  # fmt: skip


def _name(text: str) -> str:
    return escaped(text, code=True)


def _value(cell: CellSummary | None, full: CellSummary | None, made: Contents, ends: bool) -> str:
    if cell is None or cell.difference is None:
        return "--"
    shares = wording.shares(cell, full).values()
    return " ".join(
        filter(None, [_points(cell), _ends(cell) if ends else "", small(escaped(" ".join(shares))) if shares else ""])
    )


def _points(cell: CellSummary) -> str:
    """The difference with its flags raised, bold where it is established."""
    if cell.difference is None:
        return ""
    value = wording.points(cell.difference.value)
    marks = wording.flag_marks(cell)
    drawn = rf"$\mathbf{{{value}}}$" if wording.established(cell) else f"${value}$"
    return drawn + (rf"\textsuperscript{{{marks}}}" if marks else "")


def _ends(cell: CellSummary | None) -> str:
    if cell is None or cell.difference is None:
        return ""
    raised = rf"\textsuperscript{{{wording.BOUND}}}" * wording.bounded(cell)
    return small(f"${wording.points_interval(cell.difference.interval)}${raised}")


def _caption(table: TaskTable, made: Contents) -> str:
    full = table.full
    score = ""
    if full and full.n:
        ends = wording.score_interval(full.interval)
        score = f" Full scores {wording.score(full.score)} {ends} ({wording.outputs(full)})."
    text = (
        f"{label(table, made.tables)}: {plain(table_facts(table))}{score} Points to full by "
        f"kept ratio or size, 95 % intervals, unadjusted; bold: loss or gain established with all "
        f"{made.judged.family.size:,} comparisons considered.{_marks(table)}"
    )
    text += "".join(f" Warning: {said}." for said in table.warnings)
    return escaped(text + "".join(f" Note: {said}." for said in table.notes))


def _marks(table: TaskTable) -> str:
    """What the raised letters and the shares that occur mean."""
    cells = table.cells()
    flags = [
        f"{mark}: {flag.replace('_', ' ')}"
        for flag, mark in wording.MARKS.items()
        if any(c.flags.get(flag) for c in cells)
    ]
    found = {mark for cell in cells for mark in wording.shares(cell, table.full)}
    shares = [f"{mark}: per cent of outputs {wording.SHARE_WORDS[mark]}" for mark in wording.SHARES if mark in found]
    flags += [wording.BOUND_MEANING] * any(map(wording.bounded, cells))
    said = "".join(f" {'; '.join(part)}." for part in (flags, shares) if part)
    return said + (
        f" Where no such share stands it is within {100 * wording.ALIKE:.0f} points of full's." if shares else ""
    )
