"""One self-contained page of a report: verdicts, a table to sort and filter, changed samples, figures, provenance.

Everything is in the file and no request leaves it (its Content-Security-Policy forbids any). The report's sentences are
escaped by the template; texts of prompts and outputs are packed JSON that the script writes with textContent.
"""

from __future__ import annotations

import base64
import json
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcli.analysis.attention.page import script_json
from kvcli.analysis.marked import Block, Bullets, Command, Grid, Paragraph, Section, pieces, plain
from kvcli.analysis.reports import flips
from kvcli.analysis.reports.contents import Contents
from kvcli.analysis.reports.flips import CellFlips
from kvcli.analysis.reports.how import how_section, provenance_section, repeated, table_facts
from kvcli.analysis.reports.naming import label, told_apart
from kvcli.analysis.reports.opening import head
from kvcli.analysis.tables import detectable, wording
from kvcli.analysis.tables.table import CellSummary, TaskTable
from kvcli.results import store

MOST_BYTES = 4_700_000
"""Of a page: under 5 MB."""
MOST_FIGURES = 1_300_000
PER_CELL = (flips.PER_CELL, 10, 5, 3, 1, 0)
"""Changed samples of a cell whose texts are in the page: the first number with which it is small enough."""


def write_page(made: Contents, path: Path, *, figures: bool = True, harmful_texts: bool = False) -> Path:
    """Writes the page and returns its path. harmful_texts: texts of harmful tasks too, as far as they are stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(made, figures=figures, harmful_texts=harmful_texts), encoding="utf-8")
    return path


def page(made: Contents, *, figures: bool = True, harmful_texts: bool = False) -> str:
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("kvcli"), autoescape=select_autoescape(default=True))
    environment.globals.update(pieces=pieces, kind_of=_kind_of)
    template = environment.get_template("report.html.j2")
    pictures = _pictures(made) if figures else []
    parts, last = made.sections(), [how_section(made.run, made.tables), provenance_section(made.run)]
    fixed = {"title": f"KV cache compression: {made.run.model}", "head": head(made), "sections": parts, "last": last,
             "pictures": pictures}  # fmt: skip
    every = {id(t): flips.flips_of(made.data.scores, t) for t in made.tables}
    keys = {key for t in made.tables for key in flips.wanted(made.run, t, every[id(t)])}
    records = flips.read_records(made.run.folder, keys) if keys else {}
    prompts = _prompts(made, records)
    text = ""
    for most in PER_CELL:
        chunks = [_packed(made, t, _first(every[id(t)], most), records, prompts, harmful_texts) for t in made.tables]
        data = page_data(made, [every[id(t)] for t in made.tables], most)
        text = template.render(**fixed, data=script_json(data), chunks=chunks)
        if len(text.encode()) <= MOST_BYTES:
            break
    return text


def _kind_of(block: Block | Section) -> str:
    return {Paragraph: "paragraph", Bullets: "bullets", Grid: "grid", Command: "command"}[type(block)]


def page_data(made: Contents, every: Sequence[Sequence[CellFlips]], most: int) -> dict[str, Any]:
    """What the page's script reads: a row for each cell, and what each table is."""
    rows = []
    for number, (table, found) in enumerate(zip(made.tables, every, strict=True)):
        if table.full is not None:
            rows.append(_row(made, number, table, table.full, -1, 0, 0))
        changed = {one.cell.cell_ids: (i, one) for i, one in enumerate(found)}
        for cell in table.cells():
            place, one = changed.get(cell.cell_ids, (-1, None))
            total, shown = (one.total, len(one.shown[:most])) if one else (0, 0)
            rows.append(_row(made, number, table, cell, place, total, shown))
    command = "\n".join(repeated(made.run)[1])
    return {
        "run": str(made.run.folder), "rows": rows, "most": most, "tables": [_table(made, t) for t in made.tables],
        "family": made.judged.family.size, "margin": made.margin, "command": command,
    }  # fmt: skip


def _table(made: Contents, table: TaskTable) -> dict[str, Any]:
    facts = f"{plain(table_facts(table))} {detectable.sentence(table, made.judged)}".strip()
    return {
        "label": label(table, made.tables), "task": table.task, "apart": told_apart(table, made.tables),
        "facts": facts, "warnings": list(table.warnings), "notes": list(table.notes), "harmful": table.harmful,
    }  # fmt: skip


def _row(
    made: Contents, number: int, table: TaskTable, cell: CellSummary, place: int, total: int, shown: int
) -> list[Any]:
    """In the order of COLUMNS in the template's script. Of full with other weights the difference is to full of the
    dense model."""
    own = cell is table.full
    change, verdict = table.against_dense if own else cell.difference, made.verdict(cell)
    kept = made.kept(table, cell)
    column = next((c for c in table.columns if c.text == cell.column), None)
    order = 1e9 if column is None else ("ratio", "budget", "match", "own").index(column.kind) * 1e6 + column.value
    flags = (
        [wording.flag_counts(cell)]
        + [f"{cell.errors} failed"] * (cell.errors > 0)
        + ["interval is a worst-case bound"] * bool(change and change.interval and change.interval.bound)
        + ["sanity warning"] * bool(table.warnings)
        + ["points to full of the dense model"] * bool(own and change)
    )
    return [
        number, cell.label, cell.column, order, _number(cell.measured_ratio), cell.n, _number(cell.score),
        _ends(cell.interval), _number(cell.no_answer), _number(cell.incoherent), _number(cell.truncated),
        _number(change.value) if change else None, _ends(change.interval) if change else None,
        _ends(verdict.interval) if verdict else None, _number(cell.relative) if cell.difference else None,
        _number(kept.value) if kept else None, _ends(kept.interval) if kept else None,
        _number(verdict.p) if verdict else None,
        [change.better, change.worse] if change else None, made.judged.said(cell),
        ", ".join(filter(None, flags)), wording.repeats(cell), wording.figures(cell), place, total, shown,
        cell.over_budget, verdict.needed.samples if verdict and verdict.needed else None,
        _number(made.detectable(change)), _number(cell.kl), _number(cell.top1),
    ]  # fmt: skip


def _number(value: float | None) -> float | None:
    return None if value is None or value != value or abs(value) == float("inf") else round(value, 6)


def _ends(interval: Any) -> list[float | None] | None:
    return None if interval is None else [_number(interval.low), _number(interval.high)]


def _first(found: Sequence[CellFlips], most: int) -> list[CellFlips]:
    return [CellFlips(one.cell, one.total, one.shown[:most]) for one in found]


def _prompts(made: Contents, records: Any) -> dict[str, Any]:
    wanted = {record.get("prompt_sha") for record in records.values()}
    return {sha: entry for sha, entry in store.read_prompts(made.run.folder).items() if sha in wanted} if wanted else {}


def _packed(
    made: Contents, table: TaskTable, found: Sequence[CellFlips], records: Any, prompts: Any, harmful_texts: bool
) -> str:
    """Deflated JSON in base64: read only when a sample of this table is opened."""
    part = flips.chunk(made.run, table, found, records, prompts, hidden=table.harmful and not harmful_texts)
    text = json.dumps(part, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode("utf-8", "replace"), 9)).decode()


def _pictures(made: Contents) -> list[tuple[str, str]]:
    """(name, data address) of the run's figures: SVG, or PNG where that is smaller; as many as there is room for."""
    from kvcli.analysis.figures.files import plot

    found, used = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        drawn = plot(made.run, Path(temporary), ("svg", "png"), made.tables)
        for svg in (path for path in drawn if path.suffix == ".svg"):
            best = min((svg, svg.with_suffix(".png")), key=lambda p: p.stat().st_size)
            kind = "svg+xml" if best.suffix == ".svg" else "png"
            address = f"data:image/{kind};base64,{base64.b64encode(best.read_bytes()).decode()}"
            if used + len(address) <= MOST_FIGURES:
                used += len(address)
                found.append((svg.stem, address))
    return found
