"""kvcli plot: figures of a result folder, or of bench's measurements."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvcli.analysis.figures.kinds import Kind
    from kvcli.analysis.figures.style import Style
    from kvcli.errors import KvcliError


def command(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Result folder, or the unique beginning of its name under runs/; or a "
                       "folder of kvcli bench."),
    ],
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", "-k", metavar="NAME[,NAME]|all", help="Figures to draw.",
                     show_default="difference,score; of bench latency,throughput"),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-M", metavar="NAME[,NAME]", help="Only these methods, and full.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", metavar="NAME[,NAME]", help="Only these tasks; globs work.")
    ] = None,
    ratio: Annotated[
        list[str] | None,
        typer.Option("--ratio", "-r", metavar="LIST", help="Only these requested ratios: 0.1,0.5 or 0.1..0.9:0.2."),
    ] = None,
    style: Annotated[
        str, typer.Option("--style", metavar="screen|paper", help="paper: column widths and type of a print page.")
    ] = "screen",
    theme: Annotated[str, typer.Option("--theme", metavar="light|dark", help="Colour of the page.")] = "light",
    titles: Annotated[
        bool,
        typer.Option("--titles/--no-titles", help="Title and subtitle in the picture; without, beside it in NAME.txt."),
    ] = True,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the figures.", show_default="RUN/figures")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option("--format", metavar="LIST", help="png, pdf or svg, joined by commas.",
                     show_default="png,pdf; with --style paper pdf"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document with the files written.")] = False,
) -> None:  # fmt: skip
    """Draw figures of a result folder or of bench's measurements.

    Beside each figure stands the data behind it as JSON (docs/plots.md). Kinds:

    \b
      difference  paired difference to full: what to compare methods with
      score       scores with their intervals
      relative    relative change of the score, the paper's delta P
      kl          KL divergence from full's predictions
      top1        share of tokens with the same likeliest token as full
      heatmap     methods x tasks, for many methods
      pareto      score against bytes
      shots       loss and score by number of shots
      gain        what shots gain against what compression loses
      needle      score by depth and length
      latency     times, of a folder of kvcli bench
      throughput  tokens per second, of a folder of kvcli bench

    First-token modes, query modes, shots and weights are never mixed.
    Needs no GPU and no model.

    \b
    Examples:
      kvcli plot runs/demo
      kvcli plot runs/demo --kind all --theme dark
      kvcli plot demo --kind heatmap --ratio 0.1 --style paper --out paper/figures
    """
    from kvcli.analysis.figures import bars, kinds
    from kvcli.analysis.figures import files as plots
    from kvcli.analysis.figures import style as styles
    from kvcli.cli import output
    from kvcli.cli.following import next_in
    from kvcli.errors import KvcliError

    chosen, look = kinds.chosen(kind or []), styles.style(style, theme, titles=titles)
    wanted = [name.strip() for name in (formats or ("pdf" if style == "paper" else "png,pdf")).split(",")]
    plots.check_formats(wanted)
    folder = bars.find(run)
    if folder is not None:
        if method or task or ratio:
            given = f"RUN {run}"
            raise KvcliError(
                "filters are for results of a sweep", given=given, fix="leave out --method, --task, --ratio"
            )
        written = plots.plot_bench(bars.load(folder), out or folder / "figures", wanted, chosen, look)
    else:
        folder, written = _of_run(run, chosen, (method or [], task or [], ratio or []), out, wanted, look)
    names = [str(path) for path in written]
    empty = [k for k in chosen if not any(path.name.startswith(k.name) for path in written)]
    if not written:
        raise _nothing(run, folder, chosen if kind and kinds.ALL not in kind else [])
    if kind:
        source = kinds.BENCH if (folder / bars.FILE).is_file() else kinds.RUN
        for one in (one for one in empty if one.source == source or kinds.ALL not in kind):
            output.note(f"no {one.name}: it needs {one.needs}")
    data = [name for name in names if name.endswith(".json")]
    captions = [name for name in names if name.endswith(".txt")]
    pictures = [name for name in names if not name.endswith((".json", ".txt"))]
    of_bench = (folder / bars.FILE).is_file()
    if json:
        output.json_result({"run": str(folder), "figures": pictures, "data": data, "captions": captions})
    else:
        output.result("\n".join(names))
    if not of_bench:
        next_in(folder, shlex.join(["kvcli", "show", str(folder)]))


def _warn_if_some_failed(folder: Path) -> None:
    """One line where a sweep that ended has fewer finished records than were asked for."""
    from kvcli.cli import output
    from kvcli.cli.status import status

    found = status(folder)
    if found["done"] >= found["planned"]:
        return
    failed = f", {found['errors']:,} failed" if found["errors"] else ""
    output.warn(
        f"{folder} is not finished: {found['done']:,} of {output.count(found['planned'], 'record')}{failed}; figures "
        f"show these (kvcli status {shlex.quote(str(folder))})"
    )


def _of_run(
    run: str, chosen: list[Kind], filters: tuple[list[str], list[str], list[str]], out: Path | None,
    formats: list[str], look: Style,
) -> tuple[Path, list[Path]]:  # fmt: skip
    from kvcli.analysis.figures.files import plot
    from kvcli.analysis.figures.views import filtered
    from kvcli.analysis.reading.load import find_run, load_run
    from kvcli.cli import output
    from kvcli.cli.following import unfinished
    from kvcli.grammar import parse_methods, parse_ratios, split_tasks

    methods, tasks, ratios = filters
    folder = find_run(run)
    loaded = load_run(folder)
    if not_whole := unfinished(folder, len(loaded)):
        output.warn(not_whole)
    else:
        _warn_if_some_failed(folder)
    part = filtered(loaded, [str(m) for m in parse_methods(methods)], split_tasks(tasks), parse_ratios(ratios))
    return folder, plot(part, out or folder / "figures", formats, None, chosen, look, loaded)


def _nothing(run: str, folder: Path, asked: list[Kind]) -> KvcliError:
    from kvcli.errors import KvcliError

    if asked:
        needed = "; ".join(f"{one.name} needs {one.needs}" for one in asked)
        given = f"--kind {','.join(one.name for one in asked)}"
        return KvcliError(f"nothing to draw in {folder}", given=given, fix=needed)
    fix = "kvcli sweep with the same --model and --out and a --method adds to it"
    return KvcliError(f"nothing to draw in {folder}: no method has finished samples", given=f"RUN {run}", fix=fix)
