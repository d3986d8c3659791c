"""A report as LaTeX (booktabs), to \\input in a paper: all its sections but the other tables of Markdown."""

from __future__ import annotations

from pathlib import Path

from kvcli.analysis.reports.contents import Contents
from kvcli.analysis.reports.how import how_section, provenance_section
from kvcli.analysis.reports.latex_tables import overview, relative_table, task_table
from kvcli.analysis.reports.latex_text import comment, commented, escaped, inline, section
from kvcli.analysis.reports.opening import head
from kvcli.analysis.reports.overview import overviews


def write_latex(made: Contents, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(latex(made), encoding="utf-8")
    return path


def latex(made: Contents) -> str:
    """Compiles by \\input in a document with \\usepackage{booktabs}; \\usepackage[T1]{fontenc} for quotes.

    A paper has the tables for what the verdict says under its points.
    """
    (verdict, *further), found = made.sections(), overviews(made.tables)
    lines = [
        f"% KV cache compression: {comment(made.run.model)}; run {comment(made.run.name)}. Made by kvcli report.",
        r"% In the preamble: \usepackage[T1]{fontenc} \usepackage{booktabs} \usepackage{graphicx}", "",
        r"\subsection*{KV cache compression: " + escaped(made.run.model) + "}",
        *(inline(text) + "\n" for text in head(made)), *section(verdict, under=False),
        *(text for one in found for text in ("", *overview(one, found, made))),
        *(text for part in further for text in ("", *section(part))),
    ]  # fmt: skip
    for table in made.tables:
        lines += ["", *task_table(table, made), "", *relative_table(table, made)]
    lines += ["", *commented(how_section(made.run, made.tables)), *commented(provenance_section(made.run))]
    return "\n".join(lines) + "\n"
