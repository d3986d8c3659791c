"""The summary as tables for the terminal and as JSON. Fits its width: cells in one line, stacked, or in blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvcli.analysis.tables import wording
from kvcli.analysis.tables.table import CellSummary, Column, TaskTable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    from kvcli.analysis.marked import Section
    from kvcli.analysis.tables.judged import Judged

WIDEST = 120
"""Off a terminal; on one, tables take the room there is."""
_NAME_WIDTH = 24
"""Longer names are folded to this where their columns need the room."""
_GAP = 2
_BETWEEN = _GAP + 1
"""What a column takes beside its text: padding, and the space that rich draws between two."""
STYLES = {"loss": "bold dark_orange", "gain": "bold dodger_blue1", "open": "dim", "none": "dim"}
"""Orange and blue stay apart for colour-blind readers; the mark * says the same without colour."""


class SummaryView:
    """All tables of a run with warnings above and one legend below, drawn for the width it is printed at."""

    def __init__(self, tables: Sequence[TaskTable]) -> None:
        self.tables = tables

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        width = options.max_width
        drawn = _drawn(self.tables, width)
        for table, columns in zip(self.tables, drawn, strict=True):
            yield _title(table)
            for warning in table.warnings:
                yield Text(f"warning: {warning}", style="bold yellow")
            for note in table.notes:
                yield Text(note, style="dim")
            yield from _blocks(table, columns, width)
            yield Text("")
        yield from _legend(self.tables)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(min(60, options.max_width), min(WIDEST, options.max_width))


class VerdictView:
    """The leads of a report's verdict: one line for each task, and how to read them."""

    def __init__(self, part: Section) -> None:
        self.part = part

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.padding import Padding
        from rich.text import Text

        from kvcli.analysis.marked import Bullets, Paragraph, pieces

        yield Text(self.part.title, style="bold")
        for block in self.part.blocks:
            lines = [text for text, _ in block.items] if isinstance(block, Bullets) else []
            lines += [block.text] if isinstance(block, Paragraph) else []
            for line in lines:
                text = Text(style="" if isinstance(block, Bullets) else "dim")
                for words, kind in pieces(line):
                    text.append(words, style="bold" if kind == "strong" else "")
                yield Padding(text, (0, 0, 0, 2), expand=False)
        yield Text("")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(min(60, options.max_width), min(WIDEST, options.max_width))


def as_json(summary: Sequence[TaskTable], judged: Judged | None = None) -> list[dict[str, Any]]:
    """The summary as plain values: one object per table, with every number unrounded. judged: adds what a verdict
    considers all comparisons for."""
    return [
        {
            **{k: v for k, v in dataclasses.asdict(table).items() if k not in ("rows", "full", "columns")},
            "columns": [column.text for column in table.columns],
            "full": table.full and _cell_json(table.full, judged),
            "cells": [_cell_json(cell, judged) for cell in table.cells()],
        }
        for table in summary
    ]


def _cell_json(cell: CellSummary, judged: Judged | None) -> dict[str, Any]:
    facts = {**dataclasses.asdict(cell), "verdict": cell.verdict, "over_budget": cell.over_budget}
    verdict = judged.of(cell) if judged else None
    if verdict is not None:
        facts["judged"] = {
            "kind": str(verdict.kind), "interval": verdict.interval and dataclasses.asdict(verdict.interval),
            "p_holm": verdict.p, "margin": verdict.margin, "needed": verdict.needed and verdict.needed.samples,
        }  # fmt: skip
    return facts


def _title(table: TaskTable) -> Text:
    from rich.text import Text

    what = ", ".join(str(part) for part in (table.ability, table.metric) if part)
    text = Text(table.task, style="bold")
    text.append("".join(f"  {part}" for part in (what, wording.mode(table)) if part), style="not bold")
    facts = [_full_text(table), f"n {wording.sample_range(table)}"]
    facts.append(wording.clusters(table))
    if table.chance is not None:
        facts.append(f"chance {wording.score(table.chance)}")
    if table.n_prompt is not None:
        facts.append(f"prompt {table.n_prompt:.0f} tokens")
    return text.append("\n" + "  ".join(filter(None, facts)), style="not bold dim")


def _full_text(table: TaskTable) -> str:
    if table.full is None or not table.full.n:
        return ""
    parts = [f"full {wording.score(table.full.score)} {wording.score_interval(table.full.interval)}"]
    return " ".join(parts + list(wording.shares(table.full).values()))


def _drawn(tables: Sequence[TaskTable], width: int) -> list[dict[str, _Drawn]]:
    """The columns of every table: cells of one line where all tables fit so, else stacked in all of them."""
    flat = [{column.text: _draw(table, column, stacked=False) for column in table.columns} for table in tables]
    if all(len(_fit(table, columns, width)) == 1 for table, columns in zip(tables, flat, strict=True)):
        return flat
    return [{column.text: _draw(table, column, stacked=True) for column in table.columns} for table in tables]


def _blocks(table: TaskTable, drawn: dict[str, _Drawn], width: int) -> Iterator[Table]:
    """The table, or several parts of its columns below one another."""
    if table.rows:
        yield from (_grid(table, columns, drawn, width) for columns in _fit(table, drawn, width))


def _longest(table: TaskTable) -> int:
    return max([len("method"), *(len(row.label) for row in table.rows)])


def _fit(table: TaskTable, drawn: dict[str, _Drawn], width: int) -> list[list[Column]]:
    """Columns in blocks that fit the width beside the names."""
    left = min(_longest(table), _NAME_WIDTH)
    parts: list[list[Column]] = [[]]
    used = left
    for column in table.columns:
        need = drawn[column.text].width + _BETWEEN
        if parts[-1] and used + need > width:
            parts.append([])
            used = left
        parts[-1].append(column)
        used += need
    return parts


def _grid(table: TaskTable, columns: Sequence[Column], drawn: dict[str, _Drawn], width: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, padding=(0, _GAP, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
    room = width - sum(drawn[column.text].width + _BETWEEN for column in columns)
    names = max(min(_longest(table), room), min(_longest(table), _NAME_WIDTH))
    grid.add_column("method", min_width=names, max_width=names, overflow="fold")
    for column in columns:
        grid.add_column(drawn[column.text].head, no_wrap=True)
    for row in table.rows:
        grid.add_row(Text(row.label), *(drawn[column.text].cells.get(row.method, "") for column in columns))
    return grid


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """One column as drawn, padded by hand: numbers stand right-aligned with their marks to the right of them."""

    head: str
    cells: dict[str, Text]
    width: int


def _draw(table: TaskTable, column: Column, stacked: bool) -> _Drawn:
    """Score, difference to full in points with its marks, measured ratio where it is not what was asked for, shares of
    outputs without an answer and of cut ones where there are any."""
    from rich.text import Text

    cells = {row.method: row.cells[column.text] for row in table.rows if column.text in row.cells}
    marks = {name: wording.marks(cell, table.full) for name, cell in cells.items()}
    change = {name: wording.points(c.difference.value) if c.difference else "" for name, c in cells.items()}
    ratio = {n: f"@{wording.measured(c.measured_ratio)}" if wording.off_target(c) else "" for n, c in cells.items()}
    mark_width = max(map(len, marks.values()), default=0)
    ratio_width = max(map(len, ratio.values()), default=0)
    wide = max([4, *map(len, change.values()), *(len(r) for r in ratio.values() if stacked)])
    shares = _shares(cells, table.full)
    drawn = {}
    for name, cell in cells.items():
        changed = change[name].rjust(wide) + marks[name].ljust(mark_width)
        score = wording.score(cell.score).rjust(wide if stacked else 4)
        at = ratio[name].rjust(wide) if stacked else ratio[name].ljust(ratio_width) if shares[name] else ratio[name]
        behind = shares[name].strip().rjust(wide) if stacked else shares[name]
        parts = [(score, ""), (changed, STYLES[cell.in_family]), (at, "dim"), (behind, "dim")]
        lines = [
            Text(text, style=style) for text, style in parts if text if text.strip() or (shares[name] and not stacked)
        ]
        drawn[name] = Text("\n" if stacked else " ").join(lines)
    number = wide if stacked else 5 + wide
    width = max([len(line) for text in drawn.values() for line in text.plain.split("\n")] + [len(column.text)])
    return _Drawn(column.text.rjust(number), drawn, max(width, number))


def _shares(cells: Mapping[str, CellSummary], full: CellSummary | None) -> dict[str, str]:
    """Per method its shares that are unlike full's, each kind in a column of its own; empty where there are none."""
    found = {name: wording.shares(cell, full) for name, cell in cells.items()}
    widths = {mark: max((len(shares.get(mark, "")) for shares in found.values()), default=0) for mark in wording.SHARES}
    columns = [mark for mark, width in widths.items() if width]
    return {
        name: " ".join(shares.get(mark, "").ljust(widths[mark]) for mark in columns).rstrip()
        for name, shares in found.items()
    }


def _legend(tables: Sequence[TaskTable]) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    cells = [(cell, table) for table in tables for cell in table.cells()]
    if not cells:
        return
    lines = [("", "columns: kept ratio asked for; cells: score, then difference to full in points on the same samples")]
    if any(column.kind == "match" for table in tables for column in table.columns):
        lines.append(("=", "held, prompt by prompt, to the bytes of this method, which stands in the column too"))
    if any(wording.off_target(cell) for cell, _ in cells):
        lines.append(("@", "measured ratio (bytes kept / bytes of the 16-bit full cache); elsewhere within 0.01 of it"))
    elif all(cell.measured_ratio is not None for cell, _ in cells):
        lines.append(("", "measured ratios are within 0.01 of what was asked for"))
    lines += wording.legend(wording.marks(cell, table.full) for cell, table in cells)
    found = {mark for cell, table in cells for mark in wording.shares(cell, table.full)}
    found |= {mark for table in tables if table.full for mark in wording.shares(table.full)}
    lines += [(mark, meaning) for mark, meaning in wording.SHARE_MEANING.items() if mark in found]
    if found and any(table.full and table.full.n for table in tables):
        lines.append(("", f"where no such share stands it is within {100 * wording.ALIKE:.0f} points of full's"))
    seeds = sorted({cell.seeds for cell, _ in cells if cell.seeds > 1})
    if seeds:
        lines.append(("", f"scores are means of {' or '.join(map(str, seeds))} seeds or draws within each sample"))
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=1)
    grid.add_column()
    for mark, meaning in lines:
        grid.add_row(Text(mark, style="dim"), Text(meaning, style="dim"))
    yield grid
