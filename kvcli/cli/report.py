"""kvcli report: what a result folder shows, in words and tables."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Result folder, or the unique beginning of its name under runs/.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Markdown file to write.", show_default="RUN/report.md")
    ] = None,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw the figures it shows.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document: files and all numbers.")] = False,
) -> None:
    """Write a report: verdicts, tables with intervals and paired differences, figures, provenance.

    Says for each method, task and kept ratio whether a loss against the full
    cache is established: same samples, 95 % intervals (docs/statistics.md).
    Warns where full itself is near chance or its answers cannot be read.
    Prints the tables and writes them as Markdown. Needs no GPU and no model.

    \b
    Examples:
      kvcli report runs/demo
      kvcli report demo --out paper/results.md
      kvcli report demo --json --no-figures
    """
    from kvcli.analysis.load import find_run, load_run
    from kvcli.analysis.report import FIGURES, write_report
    from kvcli.analysis.tables import summarise, worst_flip
    from kvcli.cli import output
    from kvcli.cli.tables import SummaryView, as_json

    folder = find_run(run)
    loaded = load_run(folder)
    tables = summarise(loaded)
    path = out or folder / "report.md"
    path = path / "report.md" if path.is_dir() else path
    drawn = []
    if figures:
        from kvcli.analysis.plots import plot

        drawn = plot(loaded, path.parent / FIGURES, ("png",), tables)
    write_report(loaded, path, tables)
    if json:
        pictures = [str(p) for p in drawn if p.suffix != ".json"]
        output.json_result({"run": str(folder), "report": str(path), "figures": pictures, "tables": as_json(tables)})
    else:
        output.result(SummaryView(tables))
        output.result(f"report: {path}")
    flip = worst_flip(loaded, tables)
    show = ["show", str(folder), "--task", flip[0], "--sample", flip[1]] if flip else []
    output.next_command(shlex.join(["kvcli", *(show or ["plot", str(folder), "--format", "pdf"])]))
