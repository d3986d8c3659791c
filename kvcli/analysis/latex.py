"""The tables of a report as LaTeX (booktabs), one table environment for each task and mode, to \\input in a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvcli.analysis import wording
from kvcli.analysis.contents import Contents, head, task_facts
from kvcli.analysis.marked import Block, Bullets, Grid, Paragraph, Section, pieces, plain
from kvcli.analysis.tables import CellSummary, TaskTable
from kvcli.analysis.verdict_text import label, verdict_section
from kvcli.analysis.verdicts import Kind

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "[": "{[}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "…": r"\dots{}", "–": "--", "—": "---", "×": r"$\times$",
    "→": r"$\rightarrow$", "≤": r"$\le$", "≥": r"$\ge$", "±": r"$\pm$", "−": "$-$",
}  # fmt: skip
WIDE = 5
"""More sizes than this, and intervals stand under the differences."""


def write_latex(made: Contents, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(latex(made), encoding="utf-8")
    return path


def latex(made: Contents) -> str:
    """Compiles by \\input in a document with \\usepackage{booktabs}; \\usepackage[T1]{fontenc} for quotes."""
    lines = [
        f"% KV cache compression: {_comment(made.run.model)}; run {_comment(made.run.name)}. Made by kvcli report.",
        r"% In the preamble: \usepackage[T1]{fontenc} \usepackage{booktabs} \usepackage{graphicx}", "",
        r"\subsection*{KV cache compression: " + escaped(made.run.model) + "}",
        *(inline(line) + "\n" for line in head(made)), *_section(verdict_section(made.tables, made.judged)),
    ]  # fmt: skip
    for table in made.tables:
        lines += ["", *_table(table, made)]
    return "\n".join(lines) + "\n"


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
        return _tabular(block.head, block.rows, block.right)
    return [r"\begin{verbatim}", block.text, r"\end{verbatim}"]


def _tabular(head: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int]) -> list[str]:
    columns = "".join("r" if i in right else "l" for i in range(len(head)))
    drawn = [" & ".join(inline(field) for field in row) + r" \\" for row in rows]
    top = " & ".join(inline(field) for field in head) + r" \\"
    return [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", top, r"\midrule", *drawn, r"\bottomrule", r"\end{tabular}"]


def _table(table: TaskTable, made: Contents) -> list[str]:
    """Methods by sizes: points to full with their interval, bold where loss or gain stands in the family."""
    sizes = [column.text for column in table.columns]
    stacked = len(sizes) > WIDE
    rows = []
    for row in table.rows:
        cells = [row.cells.get(size) for size in sizes]
        rows.append(_line(escaped(row.label, code=True), [_value(c, made, not stacked) for c in cells]))
        if stacked:
            rows.append(_line("", [_ends(c) for c in cells]) + r"[2pt]")
    return [
        r"\begin{table}[htbp]", r"\centering\small", rf"\caption{{{_caption(table, made)}}}",
        rf"\label{{tab:kv-{_key(label(table, made.tables))}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * len(sizes)}}}", r"\toprule", _line("method", [escaped(size) for size in sizes]),
        r"\midrule", *rows, r"\bottomrule", r"\end{tabular}}", r"\end{table}",
    ]  # fmt: skip


def _line(first: str, fields: Sequence[str]) -> str:
    return " & ".join([first, *fields]) + r" \\"


def _value(cell: CellSummary | None, made: Contents, ends: bool) -> str:
    if cell is None or cell.difference is None:
        return "--"
    verdict = made.verdict(cell)
    value = f"${wording.points(cell.difference.value)}$"
    if verdict and verdict.kind in (Kind.LOSS, Kind.GAIN):
        value = rf"$\mathbf{{{wording.points(cell.difference.value)}}}$"
    value += r"\textsuperscript{o}" if cell.over_budget else ""
    shares = (
        r"{\footnotesize " + escaped(" ".join(found)) + "}" if (found := wording.shares(cell, None).values()) else ""
    )
    return " ".join(filter(None, [value, _ends(cell) if ends else "", shares]))


def _ends(cell: CellSummary | None) -> str:
    if cell is None or cell.difference is None:
        return ""
    return r"{\footnotesize " + f"${wording.points_interval(cell.difference.interval)}$" + "}"


def _caption(table: TaskTable, made: Contents) -> str:
    full = table.full
    score = ""
    if full and full.n:
        score = f" Full scores {wording.score(full.score)} {wording.score_interval(full.interval)}."
    warnings = "".join(f" Warning: {text}." for text in (*table.warnings, *table.notes))
    text = (
        f"{label(table, made.tables)}: {plain(task_facts(table))}; {wording.mode(table)}.{score} Points to full by "
        f"kept ratio or size, 95 % intervals, unadjusted; bold: loss or gain with all {made.judged.family.size} "
        f"comparisons considered; o: over budget; ?, >: per cent of outputs without an answer, cut.{warnings}"
    )
    return escaped(text)


def inline(text: str) -> str:
    styles = {"code": r"\texttt{%s}", "strong": r"\textbf{%s}"}
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
