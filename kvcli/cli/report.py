"""kvcli report: what a result folder shows, in words and tables."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kvcli.analysis.contents import Contents


def command(
    run: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Result folder, or the unique beginning of its name under runs/; more to compare it with.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Markdown file to write.", show_default="RUN/report.md")
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="One page to open from disk, beside the Markdown.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Tables for a paper (booktabs), beside the Markdown.")] = False,
    margin: Annotated[
        float, typer.Option("--margin", help="Points; a loss up to so much counts as none. State it beforehand.")
    ] = 2.0,
    against: Annotated[
        str | None, typer.Option("--against", metavar="PAPER", help="Printed numbers beside it: kvfundabench.")
    ] = None,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw the figures it shows.")] = True,
    harmful_texts: Annotated[
        bool, typer.Option("--harmful-texts", help="In the page: outputs, and prompts if stored, of harmful tasks.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document: files and all numbers.")] = False,
) -> None:
    """Write a report: verdicts, tables with intervals and paired differences, figures, provenance.

    Says for each task what is lost, at which kept ratio and with which method:
    same samples, intervals that hold for all comparisons of the sweep at once
    (docs/statistics.md), and what the samples are too few to say.
    Does not rank methods where full is not where its task's reference is.
    Several runs: paired where model and prompts are the same, else side by side.
    Needs no GPU and no model.

    \b
    Examples:
      kvcli report runs/demo
      kvcli report demo --html --latex --out paper/results.md
      kvcli report demo --against kvfundabench --margin 1
      kvcli report demo other --json --no-figures
    """
    from kvcli.analysis.against import check
    from kvcli.analysis.contents import contents
    from kvcli.analysis.load import find_run, load_run
    from kvcli.analysis.report import FIGURES, write_report
    from kvcli.analysis.tables import worst_flip
    from kvcli.analysis.verdict_text import verdict_section
    from kvcli.cli import output
    from kvcli.cli.tables import SummaryView, VerdictView, as_json
    from kvcli.errors import KvcliError

    if not 0 < margin < 100:
        raise KvcliError("a margin lies between 0 and 100 points", given=f"--margin {margin:g}", fix="--margin 2")
    if against is not None:
        check(against)
    folders = [find_run(name) for name in run]
    loaded, *others = (load_run(folder) for folder in folders)
    made = contents(loaded, margin=margin / 100, others=others, paper=against)
    path = out or folders[0] / "report.md"
    path = path / "report.md" if path.is_dir() else path
    drawn = []
    if figures:
        from kvcli.analysis.plots import plot

        drawn = plot(loaded, path.parent / FIGURES, ("png",), made.tables)
    files = [write_report(loaded, path, made=made)]
    if latex:
        from kvcli.analysis.latex import write_latex

        files.append(write_latex(made, path.with_suffix(".tex")))
    if html:
        from kvcli.analysis.page import write_page

        files.append(write_page(made, path.with_suffix(".html"), figures=figures, harmful_texts=harmful_texts))
    if json:
        pictures = [str(p) for p in drawn if p.suffix != ".json"]
        output.json_result({
            "run": str(folders[0]), "report": str(path), "files": [str(file) for file in files], "figures": pictures,
            "margin": made.margin, "family": {"size": made.judged.family.size, "level": made.judged.family.level},
            "tables": as_json(made.tables, made.judged), "findings": _findings(made),
            "warnings": [warning for table in made.tables for warning in table.warnings],
        })  # fmt: skip
    else:
        output.result(VerdictView(verdict_section(made.tables, made.judged)))
        output.result(SummaryView(made.tables))
        for file in files:
            output.result(f"report: {file}")
    flip = worst_flip(loaded, made.tables)
    show = ["show", str(folders[0]), "--task", flip[0], "--sample", flip[1]] if flip else []
    output.next_command(shlex.join(["kvcli", *(show or ["plot", str(folders[0]), "--format", "pdf"])]))


def _findings(made: Contents) -> list[dict[str, Any]]:
    from kvcli.analysis.marked import plain

    return [
        {
            "number": f.number,
            "title": f.title,
            "outcome": str(f.outcome),
            "said": plain(f.said),
            "needs": plain(f.needs),
        }
        for f in made.findings
    ]
