"""The report in Markdown: the verdict first, then warnings, rankings, findings, tables and provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kvcli.analysis.reading.load import Run
from kvcli.analysis.reports.contents import Contents, contents
from kvcli.analysis.reports.how import how_section, provenance_section, table_facts
from kvcli.analysis.reports.markdown import as_code, escaped, inline, section
from kvcli.analysis.reports.naming import named
from kvcli.analysis.reports.opening import head
from kvcli.analysis.reports.overview import mark, overview_section
from kvcli.analysis.statistics.stats import Difference
from kvcli.analysis.tables import detectable, wording
from kvcli.analysis.tables.table import CellSummary, TaskTable

FIGURES = "figures"
"""Folder of pictures beside a report."""
LONG = 60
"""A table of more rows than this has a line for each method; the numbers of each cell are in the page and in --json."""

COLUMNS = (
    "method", "asked", "measured", "n", "score [95 %]", "no answer", "incoherent", "cut",
    "points to full [95 %, unadjusted]", "relative", "kept", "p (Holm)", "better / worse", "verdict", "flags",
)  # fmt: skip
WORDS = ("method", "asked", "verdict", "also", "flags")
"""Columns that hold no numbers."""


def figures_folder(path: Path) -> Path:
    """Where the pictures of this report lie: beside it, and never those of another one in the same folder."""
    return path.with_name(FIGURES if path.stem == "report" else f"{path.stem}-{FIGURES}")


def write_report(
    run: Run, path: Path, tables: Sequence[TaskTable] | None = None, made: Contents | None = None,
    pictures: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Writes the report and returns its path.

    tables: the run's summary where it is known already; made: all of its contents; pictures: files to show, named from
    the report's folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    made = contents(run, tables) if made is None else made
    path.write_text(document(made, pictures), encoding="utf-8")
    return path


def markdown(run: Run, tables: Sequence[TaskTable], pictures: Sequence[str] = ()) -> str:
    """The whole report of one run. pictures: links relative to the report's folder."""
    return document(contents(run, tables), pictures)


def document(made: Contents, pictures: Sequence[str] = ()) -> str:
    parts = [[f"# KV cache compression: {escaped(made.run.model)}", "", *_head(made)]]
    verdict, *further = made.sections()
    over_tasks = overview_section(made.tables, made.judged)
    parts += [section(part) for part in (verdict, *([over_tasks] if over_tasks else []), *further)]
    parts += [_figures(pictures), _tables(made), section(how_section(made.run, made.tables))]
    parts += [section(provenance_section(made.run))]
    return "\n\n".join("\n".join(part).rstrip("\n") for part in parts if part) + "\n"


def _head(made: Contents) -> list[str]:
    text, *warned = (inline(line) for line in head(made))
    return [text, *(part for line in warned for part in ("", f"> {line}"))]


def _figures(pictures: Sequence[str]) -> list[str]:
    lines = ["## Figures", ""]
    for link in pictures:
        lines += [f"![{Path(link).stem}]({link.replace(' ', '%20')})", ""]
    return lines[:-1] if pictures else []


def _tables(made: Contents) -> list[str]:
    lines = ["## Tables"]
    for table in made.tables:
        lines += ["", f"### {inline(named(table, made.tables))}", "", *table_lines(table, made)]
    return [*lines, "", *_legend(made.tables)]


def table_lines(table: TaskTable, made: Contents) -> list[str]:
    """One task as a Markdown table: a row per method and ratio, full first; of many, a row per method."""
    seen = detectable.sentence(table, made.judged)
    lines = [f"{inline(table_facts(table))}{' ' * bool(seen)}{seen}", ""]
    lines += [f"> {escaped(text)}\n" for text in (*(f"warning: {w}" for w in table.warnings), *table.notes)]
    if len(table.cells()) > LONG:
        return [*lines, *_short_table(table, made)]
    cells = ([table.full] if table.full else []) + table.cells()
    more = any(cell.extra for cell in cells)
    head = [*COLUMNS[:-1], *["also"] * more, COLUMNS[-1]]
    lines += ["| " + " | ".join(head) + " |"]
    lines += ["| " + " | ".join("---" if title in WORDS else "---:" for title in head) + " |"]
    lines += [_row(cell, table, made, more) for cell in cells]
    return [*lines, "", *_intervals_used(table)]


def _short_table(table: TaskTable, made: Contents) -> list[str]:
    """Methods by sizes: points to full, bold where the loss or gain stands in its family."""
    columns = [column.text for column in table.columns]
    lines = ["| method | " + " | ".join(map(escaped, columns)) + " |", "| --- |" + " ---: |" * len(columns)]
    for row in table.rows:
        fields = [_short_cell(row.cells.get(column), table.full, made) for column in columns]
        lines.append(f"| {as_code(row.label)} | " + " | ".join(fields) + " |")
    full = table.full
    if full is None:
        return lines
    kept = wording.score_interval(full.interval)
    shown = [wording.shares(cell, full) for cell in table.cells()]
    marks = [mark for mark in wording.SHARES if any(mark in found for found in shown)]
    shares = "".join(f" {mark}: {wording.SHARE_WORDS[mark]}, in per cent of the outputs." for mark in marks)
    return [
        f"Full scores {wording.score(full.score)} {kept} ({wording.outputs(full)}). In the table: points to full, 95 % "
        "interval of the cell alone, unadjusted; bold: a loss or gain with all comparisons considered; = unchanged, + "
        f"no loss beyond the margin; letters: flags, below, with the records that carry them.{shares} Where no such "
        f"share stands it is within {100 * wording.ALIKE:.0f} points of full's. Scores, relative change, kept and p of "
        "every cell: the page (--html) and --json.",
        "",
        *lines,
    ]


def _short_cell(cell: CellSummary | None, full: CellSummary | None, made: Contents) -> str:
    if cell is None or cell.difference is None:
        return ""
    value = wording.points(cell.difference.value)
    value = f"**{value}**" if wording.established(cell) else value
    flags = [f"{wording.MARKS[flag]}{count}/{cell.records}" for flag, count in cell.flags.items()]
    shares = wording.shares(cell, full).values()
    ends = wording.points_interval(cell.difference.interval)
    ends += f"<sup>{wording.BOUND}</sup>" * wording.bounded(cell)
    parts = [value, ends, mark(cell, made.judged), *flags, *shares]
    return " ".join(filter(None, parts))


def _row(cell: CellSummary, table: TaskTable, made: Contents, more: bool) -> str:
    """Of full with other weights the difference is to full of the dense model."""
    verdict = made.verdict(cell)
    own = cell is table.full
    change = table.against_dense if own else cell.difference
    kept = made.kept(table, cell)
    marks = [wording.flag_counts(cell), f"{cell.errors} failed" if cell.errors else ""]
    marks += ["points to full of the dense model"] * bool(own and change)
    fields = [
        as_code(cell.label), escaped(cell.column), wording.measured(cell.measured_ratio),
        " x ".join(filter(None, [str(cell.n), wording.repeats(cell)])),
        f"{wording.score(cell.score)} {wording.score_interval(cell.interval)}", wording.share(cell.no_answer),
        wording.share(cell.incoherent), wording.share(cell.truncated),
        _difference(change, wording.established(cell)),
        wording.relative(cell.relative) if cell.difference else "", wording.kept(kept) if kept else "",
        wording.p_value(verdict.p) if verdict else "", f"{change.better} / {change.worse}" if change else "",
        made.judged.said(cell),
        *[escaped(wording.figures(cell))] * more, ", ".join(filter(None, marks)),
    ]  # fmt: skip
    return "| " + " | ".join(fields) + " |"


def _difference(change: Difference | None, established: bool) -> str:
    """'**-12.3** [-16.4, -8.1]'."""
    if change is None:
        return ""
    value = wording.points(change.value)
    if established:
        value = f"**{value}**"
    bound = change.interval is not None and change.interval.bound
    return f"{value} {wording.points_interval(change.interval)}{f'<sup>{wording.BOUND}</sup>' * bound}"


def _intervals_used(table: TaskTable) -> list[str]:
    used: Counter[str] = Counter()
    for cell in table.cells():
        if cell.difference:
            used[_way(cell.difference)] += 1
    if not used:
        return []
    said = "; ".join(f"{way} ({count} row{'s' * (count > 1)})" for way, count in used.most_common())
    return [f"Intervals of the differences and their tests: {said}."]


def _way(difference: Difference) -> str:
    interval = difference.interval
    if interval is None:
        return "no interval: one sample" if difference.n == 1 else "no interval: all samples are one cluster"
    return f"{interval.method}, p by {difference.test}" + (f" ({interval.note})" if interval.note else "")


def _legend(tables: Sequence[TaskTable]) -> list[str]:
    """What the columns and the flags that occur mean."""
    lines = [
        "Columns: *asked* kept ratio or budget; *measured* bytes kept over the 16-bit full cache; *no answer* share "
        "of outputs without an extractable answer (of requests: incoherent or empty ones); *incoherent* share of "
        "outputs that are no text: empty, in circles, signs or words at random (- where nothing is generated); *cut* "
        "share stopped by the token limit; *relative* delta P = (P - P_full) / P_full; *kept* (P - chance) / (P_full - "
        "chance); *p (Holm)* two-sided, and *verdict*: all comparisons considered; *better / worse* samples that "
        "changed; *also* means of what the scorer gives beside the score. "
        "Intervals are of each cell alone: 95 %, unadjusted. **Bold**: established, a loss or gain by the verdict.",
    ]
    if any(column.kind == "match" for table in tables for column in table.columns):
        lines[0] += (" *Asked* `= METHOD`: held, prompt by prompt, to the bytes of that method (whole KV pairs, so to "
                     "within half a pair per KV head), which stands beside them.")  # fmt: skip
    if any(wording.bounded(cell) for table in tables for cell in table.cells()):
        lines += ["", f"Raised {wording.BOUND_MEANING}."]
    flags = {flag for table in tables for cell in table.cells() for flag in cell.flags}
    meanings = [(wording.MARKS[flag], wording.MEANING[wording.MARKS[flag]]) for flag in wording.MARKS if flag in flags]
    return lines + ["", *(f"- {mark}, {escaped(text)}" for mark, text in meanings)] * bool(meanings)
