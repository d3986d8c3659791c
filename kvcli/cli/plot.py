"""kvcli plot: figures of a result folder."""

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
        Path | None, typer.Option("--out", help="Folder for the figures.", show_default="RUN/figures")
    ] = None,
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help="png, pdf or svg, joined by commas.")
    ] = "png,pdf",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document with the files written.")] = False,
) -> None:
    """Draw score and loss against the measured kept ratio.

    Writes difference.* (paired difference to full: the figure to compare
    methods with) and score.*: a panel per task, a line per method, 95 %
    intervals, and beside each figure the data behind it as JSON.
    Hollow points: over budget, or prompts too short to compress.
    Needs no GPU and no model.

    \b
    Examples:
      kvcli plot runs/demo
      kvcli plot demo --format pdf --out paper/figures
      kvcli plot demo --json
    """
    from kvcli.analysis.load import find_run, load_run
    from kvcli.analysis.plots import plot
    from kvcli.cli import output
    from kvcli.errors import KvcliError

    folder = find_run(run)
    written = plot(load_run(folder), out or folder / "figures", [name.strip() for name in formats.split(",")])
    if not written:
        fix = "kvcli sweep with the same --model and --out and a --method adds to it"
        raise KvcliError(f"nothing to draw in {folder}: no method has finished samples", given=f"RUN {run}", fix=fix)
    data = [str(path) for path in written if path.suffix == ".json"]
    pictures = [str(path) for path in written if path.suffix != ".json"]
    if json:
        output.json_result({"run": str(folder), "figures": pictures, "data": data})
    else:
        output.result("\n".join(pictures + data))
    output.next_command(shlex.join(["kvcli", "report", str(folder)]))
