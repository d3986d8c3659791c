"""kvcli export: a result folder as tables, or in the formats of other projects."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

RELATIONSHIPS = ("first_party", "third_party", "collaborative", "other")


def command(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Result folder, or the unique beginning of its name under runs/.")
    ],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="csv, parquet, lm-eval or every-eval-ever.",
            show_default="as --out ends, else csv",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder to write to; or with csv and parquet a file.", show_default="RUN/exports/FORMAT"
        ),
    ] = None,
    outputs: Annotated[bool, typer.Option("--outputs", help="Outputs, answers and targets in tables too.")] = False,
    harmful: Annotated[
        bool, typer.Option("--harmful-texts", help="Texts of harmful tasks too; prompts only where they were stored.")
    ] = False,
    margin: Annotated[
        float, typer.Option("--margin", help="Points; of the verdicts in tables, as in kvcli report.")
    ] = 2.0,
    organization: Annotated[
        str, typer.Option("--organization", metavar="NAME", help="Who measured, for every-eval-ever.")
    ] = "unknown",
    relationship: Annotated[
        str,
        typer.Option(
            "--relationship",
            metavar="WORD",
            help="To the model's makers: first_party, third_party, collaborative or other.",
        ),
    ] = "other",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document: the files.")] = False,
) -> None:
    """Write results as CSV, Parquet, lm-eval or Every Eval Ever files.

    Tables: one row per cell and sample, and one per cell with intervals,
    differences to full and verdicts. The other two have one model per method and size
    (docs/export.md). Texts of harmful tasks are left out unless asked for.

    \b
    Examples:
      kvcli export runs/demo --out results.csv
      kvcli export demo --format parquet --outputs
      kvcli export demo --format lm-eval --out shared/lm-eval
    """
    from kvcli.analysis.exports.shared import FORMATS, TABLES, Wanted, export, hidden
    from kvcli.analysis.reading.load import find_run, load_run
    from kvcli.cli import output
    from kvcli.cli.following import next_in
    from kvcli.errors import KvcliError, unknown

    if form is not None and form not in FORMATS:
        fix = f"--format {' or '.join(FORMATS)}"
        raise KvcliError(f"unknown format '{form}'", given=f"--format {form}", fix=fix)
    if not 0 < margin < 100:
        raise KvcliError("a margin lies between 0 and 100 points", given=f"--margin {margin:g}", fix="--margin 2")
    if relationship not in RELATIONSHIPS:
        given = f"--relationship {relationship}"
        raise unknown("relationship", relationship, RELATIONSHIPS, given=given, listing="kvcli export --help")
    folder = find_run(run)
    loaded = load_run(folder)
    ending = out.suffix.removeprefix(".") if out else ""
    form = form or (ending if ending in TABLES else TABLES[0])
    wanted = Wanted(outputs, harmful, organization, relationship, margin / 100)
    written = export(loaded, form, out, wanted)
    kept_back = sorted({cell.task for cell in loaded.cells if hidden(loaded, cell.task)})
    if kept_back and not harmful and (outputs or form not in TABLES):
        output.warn(f"texts of {', '.join(kept_back)} left out: harmful, or run.json does not say (--harmful-texts)")
    if as_json:
        output.json_result({"run": str(folder), "format": form, "files": [str(path) for path in written]})
    else:
        for path in written:
            output.result(str(path))
    next_in(folder, shlex.join(["kvcli", "plot", str(folder)]))
