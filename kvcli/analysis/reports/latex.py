"""The tables of a report as LaTeX (booktabs), one table environment for each task and mode, to \\input in a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvcli.analysis.marked import Block, Bullets, Grid, Paragraph, Section, pieces, plain
from kvcli.analysis.reports.contents import Contents, head, warnings_section
from kvcli.analysis.reports.first_token import first_token_section
from kvcli.analysis.reports.how import how_section, provenance_section, task_facts
from kvcli.analysis.reports.overview import WARNED, Overview, explained, heads, mark, overviews, samples
from kvcli.analysis.reports.verdict_text import label, verdict_section
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.table import CellSummary, TaskTable

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "[": "{[}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "…": r"\dots{}", "–": "--", "—": "---", "×": r"$\times$",
    "→": r"$\rightarrow$", "≤": r"$\le$", "≥": r"$\ge$", "±": r"$\pm$", "−": "$-$",
}  # fmt: skip
WIDE = 5
"""More sizes than this, and intervals stand under the differences."""
WIDE_TASKS = 2
"""More tasks than this, and intervals stand under the scores in the table over tasks."""


def write_latex(made: Contents, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(latex(made), encoding="utf-8")
    return path


def latex(made: Contents) -> str:
    """Compiles by \\input in a document with \\usepackage{booktabs}; \\usepackage[T1]{fontenc} for quotes."""
    first, found = first_token_section(made.data.scores, made.tables, made.margin), overviews(made.tables)
    lines = [
        f"% KV cache compression: {_comment(made.run.model)}; run {_comment(made.run.name)}. Made by kvcli report.",
        r"% In the preamble: \usepackage[T1]{fontenc} \usepackage{booktabs} \usepackage{graphicx}", "",
        r"\subsection*{KV cache compression: " + escaped(made.run.model) + "}",
        *(inline(line) + "\n" for line in head(made)), *_section(verdict_section(made.tables, made.judged)),
        *(line for one in found for line in ("", *_overview(one, found, made))),
        "", *_section(warnings_section(made.tables, made.run)), *(_section(first) if first else ()),
    ]  # fmt: skip
    for table in made.tables:
        lines += ["", *_table(table, made), "", *_relative_table(table, made)]
    lines += ["", *_commented(how_section(made.run, made.tables)), *_commented(provenance_section(made.run))]
    return "\n".join(lines) + "\n"


def _commented(part: Section) -> list[str]:
    """A section as comments: what a paper need not print, and a reader of its source wants to know."""
    lines = [plain(part.title)]
    for block in part.blocks:
        if isinstance(block, Bullets):
            lines += [f"- {plain(text)}" for text, _ in block.items]
        elif isinstance(block, Grid):
            lines += [": ".join(map(plain, row)) for row in block.rows]
        else:
            lines += plain(block.text).splitlines()
    return [f"% {_comment(line)}" for line in lines]


def _section(part: Section) -> list[str]:
    lines = [r"\subsubsection*{" + inline(part.title) + "}"]
    for block in part.blocks:
        lines += _block(block)
    return lines


def _block(block: Block) -> list[str]:
    if isinstance(block, Paragraph):
        return [inline(block.text), ""]
    if isinstance(block, Bullets):
        lines = [r"\begin{itemize}"]
        lines += [r"  \item " + inline(text) for text, _ in block.items]  # a paper has the tables for the rest
        return [*lines, r"\end{itemize}", ""]
    if isinstance(block, Grid):
        return [r"\noindent", *_fitted(_tabular(block.head, block.rows, block.right)), ""]
    return [r"\begin{verbatim}", block.text, r"\end{verbatim}"]


def _fitted(tabular: Sequence[str]) -> list[str]:
    """No wider than the text."""
    return [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%", *tabular[:-1], tabular[-1] + "}"]


def _tabular(head: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int]) -> list[str]:
    columns = "".join("r" if i in right else "l" for i in range(len(head)))
    return _ruled(columns, _line(*map(inline, head)), [_line(*map(inline, row)) for row in rows])


def _ruled(columns: str, head: str, rows: Sequence[str]) -> list[str]:
    return [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]


def _overview(one: Overview, found: Sequence[Overview], made: Contents) -> list[str]:
    """Methods by tasks at one size; of many tasks the intervals stand under the scores."""
    stacked = len(one.tables) > WIDE_TASKS
    head = ["method"]
    for task, apart, warned in heads(one):
        above = rf"\textsuperscript{{{WARNED}}}" if warned else ""
        head.append(_name(task) + (f" ({escaped(apart)})" if apart else "") + above)
    fulls = [table.full for table in one.tables]
    rows = [_line("full", *(_score(f) if stacked else f"{_score(f)} {_score_ends(f)}" for f in fulls))]
    rows += [_line("", *map(_score_ends, fulls)) + "[2pt]"] * stacked
    for method, cells in one.rows:
        pairs = [(cell, full) for cell, full in zip(cells, fulls, strict=True)]
        rows.append(_line(_name(method), *(_beside(cell, full, made, not stacked) for cell, full in pairs)))
        rows += [_line("", *map(_ends, cells)) + "[2pt]"] * stacked
    mode = f", {one.mode}" if one.mode else ""
    caption = escaped(f"All tasks, {one.size}{mode}; {samples(one)}. {explained([one], made.judged)}")
    return [
        r"\begin{table*}[htbp]", r"\centering\small", rf"\caption{{{caption}}}",
        rf"\label{{tab:kv-all-{found.index(one) + 1}}}", *_fitted(_ruled(f"l{'r' * len(fulls)}", _line(*head), rows)),
        r"\end{table*}",
    ]  # fmt: skip


def _score(full: CellSummary | None) -> str:
    if full is None or not full.n:
        return "--"
    shares = escaped(" ".join(wording.shares(full).values()))
    return " ".join(filter(None, [wording.score(full.score), _small(shares) if shares else ""]))


def _score_ends(full: CellSummary | None) -> str:
    return _small(f"${wording.score_interval(full.interval)}$") if full and full.n and full.interval else ""


def _beside(cell: CellSummary | None, full: CellSummary | None, made: Contents, ends: bool) -> str:
    """Score, points to full, its mark and the shares unlike full's."""
    if cell is None or not cell.n:
        return "--"
    shares = escaped(" ".join(wording.shares(cell, full).values()))
    if cell.difference is None:
        return " ".join(filter(None, [wording.score(cell.score), _small(shares) if shares else ""]))
    parts = [f"{wording.score(cell.score)}, {_points(cell)}", _ends(cell) if ends else "", mark(cell, made.judged)]
    return " ".join(filter(None, [*parts, _small(shares) if shares else ""]))


def _table(table: TaskTable, made: Contents) -> list[str]:
    """Methods by sizes: points to full with their interval, bold where loss or gain stands in the family."""
    sizes = [column.text for column in table.columns]
    stacked = len(sizes) > WIDE
    rows = []
    for row in table.rows:
        cells = [row.cells.get(size) for size in sizes]
        rows.append(_line(_name(row.label), *(_value(c, table.full, made, not stacked) for c in cells)))
        if stacked:
            rows.append(_line("", *map(_ends, cells)) + r"[2pt]")
    return _float(table, made, "", _caption(table, made), rows)


def _relative_table(table: TaskTable, made: Contents) -> list[str]:
    """Methods by sizes: the paper's relative change, under it what was kept above chance."""
    rows = []
    for row in table.rows:
        cells = [row.cells.get(column.text) for column in table.columns]
        kept = [made.kept(table, cell) if cell else None for cell in cells]
        rows.append(_line(_name(row.label), *(_relative(cell) for cell in cells)))
        rows.append(_line("", *(_small(escaped(wording.kept(one))) if one else "" for one in kept)) + r"[2pt]")
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


def _float(table: TaskTable, made: Contents, key: str, caption: str, rows: Sequence[str]) -> list[str]:
    sizes = [escaped(column.text) for column in table.columns]
    return [
        r"\begin{table}[htbp]", r"\centering\small", rf"\caption{{{caption}}}",
        rf"\label{{tab:kv-{_key(label(table, made.tables))}{key}}}",
        *_fitted(_ruled(f"l{'r' * len(sizes)}", _line("method", *sizes), rows)), r"\end{table}",
    ]  # fmt: skip


def _name(text: str) -> str:
    return escaped(text, code=True)


def _line(*fields: str) -> str:
    return " & ".join(fields) + r" \\"


def _small(text: str) -> str:
    return r"{\footnotesize " + text + "}"


def _value(cell: CellSummary | None, full: CellSummary | None, made: Contents, ends: bool) -> str:
    if cell is None or cell.difference is None:
        return "--"
    shares = wording.shares(cell, full).values()
    return " ".join(
        filter(None, [_points(cell), _ends(cell) if ends else "", _small(escaped(" ".join(shares))) if shares else ""])
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
    return _small(f"${wording.points_interval(cell.difference.interval)}$")


def _caption(table: TaskTable, made: Contents) -> str:
    full = table.full
    score = ""
    if full and full.n:
        ends = wording.score_interval(full.interval)
        score = f" Full scores {wording.score(full.score)} {ends} ({wording.outputs(full)})."
    text = (
        f"{label(table, made.tables)}: {plain(task_facts(table))}; {wording.mode(table)}.{score} Points to full by "
        f"kept ratio or size, 95 % intervals, unadjusted; bold: loss or gain established with all "
        f"{made.judged.family.size} comparisons considered.{_marks(table)}"
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
    said = "".join(f" {'; '.join(part)}." for part in (flags, shares) if part)
    return said + (
        f" Where no such share stands it is within {100 * wording.ALIKE:.0f} points of full's." if shares else ""
    )


def inline(text: str) -> str:
    styles = {"code": r"\texttt{%s}", "strong": r"\textbf{%s}", "raised": r"\textsuperscript{%s}"}
    return "".join(styles.get(kind, "%s") % escaped(words, code=kind == "code") for words, kind in pieces(text))


def escaped(text: str, *, code: bool = False) -> str:
    """Nothing in it acts as LaTeX; signs that pdfLaTeX does not know become a question mark in brackets."""
    drawn = "".join(
        _SPECIAL.get(sign, sign if " " <= sign <= "~" or "\u00a1" <= sign <= "\u00ff" else "[?]") for sign in text
    )
    return drawn.replace(r"\_", r"\_\allowbreak{}").replace("--", "-{}-") if code else drawn


def _key(text: str) -> str:
    return "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in text)


def _comment(text: str) -> str:
    return " ".join(text.split())
