"""kvcli report: what a result folder shows, in words and tables."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvcli.analysis.reports.contents import Contents


MOST_LINES = 40
"""Longer tables are left to the report unless --table asks for them."""
MOST_NAMED = 3
"""A comparison with more runs than this does not have all of them in the name of its file."""


def command(
    run: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Result folder, or the unique beginning of its name under runs/; more to compare it with.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Markdown file to write.",
            show_default="RUN/report.md; of several runs RUN/report-vs-OTHER.md",
        ),
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
    table: Annotated[
        bool | None,
        typer.Option("--table/--no-table", help="Print the tables too.", show_default=f"yes, up to {MOST_LINES} lines"),
    ] = None,
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
    from kvcli.analysis.reading.load import load_run
    from kvcli.analysis.reports.against import check
    from kvcli.analysis.reports.contents import contents
    from kvcli.analysis.reports.report import write_report
    from kvcli.analysis.tables.worst_flip import worst_flip
    from kvcli.cli import output
    from kvcli.cli.following import unfinished
    from kvcli.cli.report_json import numbers
    from kvcli.errors import KvcliError

    if not 0 < margin < 100:
        raise KvcliError("a margin lies between 0 and 100 points", given=f"--margin {margin:g}", fix="--margin 2")
    if against is not None:
        check(against)
    folders = [_folder(name) for name in run]
    loaded, *others = (load_run(folder) for folder in folders)
    for folder, one in zip(folders, (loaded, *others), strict=True):
        if not_whole := unfinished(folder, len(one)):
            output.warn(not_whole)
    made = contents(loaded, margin=margin / 100, others=others, paper=against)
    path = _path(out, folders[0], [other.name for other in others])
    drawn = _drawn(made, path) if figures else []
    pictures = [str(p) for p in drawn if p.suffix == ".png"]
    files = [write_report(loaded, path, made=made, pictures=[str(Path(p).relative_to(path.parent)) for p in pictures])]
    if latex:
        from kvcli.analysis.reports.latex import write_latex

        files.append(write_latex(made, path.with_suffix(".tex")))
    if html:
        from kvcli.analysis.reports.page import write_page

        files.append(write_page(made, path.with_suffix(".html"), figures=figures, harmful_texts=harmful_texts))
    if json:
        output.json_result({
            "run": str(folders[0]), "report": str(path), "files": [str(file) for file in files], "figures": pictures,
            **numbers(made),
        })  # fmt: skip
    else:
        _print(made, files, table)
    flip = worst_flip(loaded, made.tables)
    show = ["show", str(folders[0]), "--task", flip[0], "--sample", flip[1]] if flip else []
    output.next_command(shlex.join(["kvcli", *(show or ["plot", str(folders[0]), "--format", "pdf"])]))


def _folder(name: str) -> Path:
    """The result folder; of what bench measured it says which command draws it."""
    from kvcli.analysis.figures import bars
    from kvcli.analysis.reading.load import find_run
    from kvcli.errors import KvcliError

    try:
        return find_run(name)
    except KvcliError:
        measured = bars.find(name)
        if measured is None:
            raise
    fix = f"{shlex.join(['kvcli', 'plot', str(measured)])}     (draws them)"
    raise KvcliError(f"{measured} holds times that kvcli bench measured, no scores", given=f"RUN {name}", fix=fix)


def _path(out: Path | None, folder: Path, others: list[str]) -> Path:
    """A comparison has a file of its own, so that the run's own report stays."""
    named = others if len(others) <= MOST_NAMED else [others[0], "and", str(len(others) - 1), "more"]
    usual = f"report-vs-{'-'.join(named)}.md" if others else "report.md"
    path = out or folder / usual
    return path / usual if path.is_dir() else path


def _drawn(made: Contents, path: Path) -> list[Path]:
    from kvcli.analysis.figures.files import plot
    from kvcli.analysis.reports.report import figures_folder

    return plot(made.run, figures_folder(path), ("png",), made.tables)


def _print(made: Contents, files: list[Path], table: bool | None) -> None:
    """Verdicts, comparisons and tables for the terminal. table: whether the last; None: short ones."""
    from kvcli.analysis.reports.verdict_text import verdict_section
    from kvcli.cli import output
    from kvcli.cli.tables import SummaryView, VerdictView

    for part in (verdict_section(made.tables, made.judged), *made.comparisons):
        output.result(VerdictView(part))
    view = SummaryView(made.tables)
    lines = 0 if table is not None else output.height(view)
    if table or (table is None and lines <= MOST_LINES):
        output.result(view)
    for file in files:
        output.result(f"report: {file}")
    if lines > MOST_LINES:
        output.note(f"tables of {lines:,} lines are in the report; --table prints them here")
