"""Figures of a result folder: which to draw, their files, and the data behind each as JSON (docs/plots.md).

Draws with matplotlib's Figure directly (Agg, PDF and SVG canvases): no pyplot, so nothing global changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcli.analysis.figures.bars import Measurements
from kvcli.analysis.figures.kinds import BENCH, KINDS, RUN, Kind, chosen
from kvcli.analysis.figures.paging import fitted
from kvcli.analysis.figures.style import Style, style
from kvcli.analysis.figures.views import in_file_names, views
from kvcli.analysis.reading.load import Run
from kvcli.analysis.tables.table import TaskTable
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
_STYLE = style().rc()
"""Of figures that are not made here, such as those of attention."""


def plot(
    run: Run, out_dir: Path, formats: Sequence[str] = ("png", "pdf"), tables: Sequence[TaskTable] | None = None,
    kinds: Sequence[Kind] | None = None, look: Style | None = None, whole: Run | None = None,
) -> list[Path]:  # fmt: skip
    """Writes the figures and the data behind them; returns the pictures, then the data files, then the captions that
    a look without titles leaves out of the pictures.

    One figure per first-token mode, query mode, kind of weights, seed and order of shots; where a run has several, file
    names say which. Empty where no method has finished samples. tables: the run's summary where it is known already.
    whole: the run of which this is a part, so that verdicts are those of all its comparisons.
    """
    check_formats(formats)
    return save(sheets(run, tables, kinds, whole), out_dir, formats, look)


def plot_bench(
    found: Sequence[Measurements], out_dir: Path, formats: Sequence[str] = ("png", "pdf"),
    kinds: Sequence[Kind] | None = None, look: Style | None = None,
) -> list[Path]:  # fmt: skip
    """The same of a folder that `kvcli bench` wrote."""
    check_formats(formats)
    built = [
        named
        for kind in kinds or chosen([])
        if kind.source == BENCH
        for one in found
        for named in _named(kind, one.suffix, kind.build(one))
    ]
    return save(built, out_dir, formats, look)


def sheets(
    run: Run, tables: Sequence[TaskTable] | None = None, kinds: Sequence[Kind] | None = None, whole: Run | None = None
) -> list[tuple[str, Any]]:
    """(file name without ending, what it shows) of every figure that the run has data for."""
    parts = views(run, tables, whole)
    return [
        named
        for kind in kinds or chosen([])
        if kind.source == RUN
        for view in parts
        for named in _named(kind, view.suffix, kind.build(view))
    ]


def _named(kind: Kind, suffix: Sequence[str], found: Sequence[Any]) -> list[tuple[str, Any]]:
    """Sheets with their file names: what tells them from other modes, then from others of their kind, then a number."""
    parts = [in_file_names(getattr(sheet, "part", "")) for sheet in found]
    named = []
    for i, (part, sheet) in enumerate(zip(parts, found, strict=True)):
        number = [str(parts[: i + 1].count(part))] if parts.count(part) > 1 else []
        named.append(("-".join([kind.name, *suffix, *([part] if part else []), *number]), sheet))
    return named


def save(
    built: Sequence[tuple[str, Any]], out_dir: Path, formats: Sequence[str], look: Style | None = None
) -> list[Path]:
    if built:
        out_dir.mkdir(parents=True, exist_ok=True)
    pictures, data, captions = [], [], []
    look = look or style()
    for name, sheet, figure in _pages(built, look):
        pictures += _write(figure, out_dir / name, formats, look)
        data.append(out_dir / f"{name}.json")
        data[-1].write_text(data_text(sheet), encoding="utf-8")
        if not look.titles:
            captions.append(out_dir / f"{name}.txt")
            captions[-1].write_text(f"{figure.get_label()}\n", encoding="utf-8")
    return pictures + data + captions


def data_text(sheet: Any) -> str:
    """The data behind one figure as JSON; what is not a number becomes null."""
    return json.dumps(_finite(asdict(sheet)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _pages(built: Sequence[tuple[str, Any]], look: Style) -> Iterator[tuple[str, Any, Figure]]:
    """(file name without ending, what it shows, its figure) of every page."""
    import matplotlib as mpl

    for name, sheet in built:
        with mpl.rc_context(look.rc()):
            found = fitted(sheet, KINDS[sheet.figure].draw, look)
        for number, (page, figure) in enumerate(found, 1):
            yield (f"{name}-{number}" if len(found) > 1 else name), page, figure


def _write(figure: Figure, path: Path, formats: Sequence[str], look: Style) -> list[Path]:
    import matplotlib as mpl

    written = []
    with mpl.rc_context(look.rc()):
        for name in formats:
            # Dates and versions out of the files: the same data give the same bytes.
            stamp = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[name]
            figure.savefig(path.with_name(f"{path.name}.{name}"), dpi=look.dpi, metadata=stamp)
            written.append(path.with_name(f"{path.name}.{name}"))
    return written


def check_formats(formats: Sequence[str]) -> None:
    for name in formats:
        if name not in FORMATS:
            fix = f"--format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; several joined by commas: --format png,pdf"
            raise KvcliError(f"unknown format '{name}'", given=f"--format {name}", fix=fix)


__all__ = ["FORMATS", "KINDS", "plot", "plot_bench", "sheets"]
