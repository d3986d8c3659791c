"""Figures of a run: difference to full and score against the measured ratio, one panel per task, a line per method.

Draws with matplotlib's Figure directly (Agg and PDF canvases): no pyplot, so nothing global changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any
from zlib import crc32

from kvcli.analysis.load import Run
from kvcli.analysis.tables import DENSE, CellSummary, Row, TaskTable, summarise
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
Mode = tuple[str, str, str]
"""First-token mode, query mode, weights: what a figure never mixes."""
X_LABEL = "measured ratio (bytes kept / 16-bit full)"
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288", "#882255", "#7A7A00", "#666666",
)  # fmt: skip
"""Okabe and Ito's palette without yellow and black, then four of Tol's: apart for colour-blind readers."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
LINES = ("-", "--", "-.")
"""A further turn through colours and markers changes the line style."""
BANDS_UP_TO = 3
"""More methods than this, and bands hide one another: intervals are drawn as bars."""
PANELS_PER_PAGE = 12
HOLLOW_NOOP = 0.05
"""A larger share of prompts that were not compressed at all, and the point is drawn hollow."""
_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8.5, "legend.fontsize": 8,
    "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4, "axes.spines.top": False,
    "axes.spines.right": False, "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "kvcli",
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "text.usetex": False,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One cell in a figure. y, low, high: percentage points or score."""

    asked: str
    x: float
    y: float
    low: float | None
    high: float | None
    n: int
    hollow: bool
    flags: dict[str, int]


@dataclass(frozen=True)
class Series:
    method: str
    label: str
    """The method as the legend shows it."""
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One task. full, chance: scores, None where there is none or the figure does not show them."""

    task: str
    title: str
    subtitle: str
    warning: bool
    full: float | None
    chance: float | None
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Sheet:
    """All that a figure shows; written as JSON beside it."""

    figure: str
    title: str
    subtitle: str
    x: str
    y: str
    panels: tuple[Panel, ...]


def plot(
    run: Run,
    out_dir: Path,
    formats: Sequence[str] = ("png", "pdf"),
    tables: Sequence[TaskTable] | None = None,
) -> list[Path]:
    """Writes difference.* and score.* with the data behind them; returns the pictures, then the data files.

    One pair of figures per first-token mode, query mode and kind of weights; where a run has several, their names say
    which. Empty where no method has finished samples. tables: the run's summary where it is known already.
    """
    for name in formats:
        if name not in FORMATS:
            raise KvcliError(f"unknown format '{name}'", given=f"--format {name}", fix=",".join(FORMATS))
    pages = sheets(run, summarise(run) if tables is None else tables)
    methods = list(dict.fromkeys(s.method for _, sheet in pages for p in sheet.panels for s in p.series))
    if pages:
        out_dir.mkdir(parents=True, exist_ok=True)
    pictures, data = [], []
    for name, sheet in pages:
        pictures += _draw(sheet, methods, out_dir / name, formats)
        data.append(out_dir / f"{name}.json")
        data[-1].write_text(json.dumps(asdict(sheet), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return pictures + data


def sheets(run: Run, tables: Sequence[TaskTable]) -> list[tuple[str, Sheet]]:
    """(file name without ending, what it shows) of every figure that the tables have data for."""
    modes = list(dict.fromkeys((t.first_token, t.query, t.weights) for t in tables))
    found = []
    for figure in ("difference", "score"):
        for mode in modes:
            drawn = [t for t in tables if (t.first_token, t.query, t.weights) == mode]
            panels = [p for p in (_panel(figure, table, drawn) for table in drawn) if p.series]
            pages = [panels[i : i + PANELS_PER_PAGE] for i in range(0, len(panels), PANELS_PER_PAGE)]
            for number, page in enumerate(pages, 1):
                name = "-".join([figure, *_suffix(mode, modes), *([str(number)] if len(pages) > 1 else [])])
                found.append((name, _sheet(figure, run, drawn, mode, tuple(page))))
    return found


def _suffix(mode: Mode, modes: Sequence[Mode]) -> list[str]:
    """What tells this mode from the run's others in a file name."""
    differs = [len({m[i] for m in modes}) > 1 for i in range(len(mode))]
    return [re.sub(r"[^\w.-]+", "-", part.replace("/", "")) for part, shown in zip(mode, differs, strict=True) if shown]


def _sheet(figure: str, run: Run, tables: Sequence[TaskTable], mode: Mode, panels: tuple[Panel, ...]) -> Sheet:
    what = "Difference to the full cache" if figure == "difference" else "Score"
    counts = [c.n for t in tables for c in t.cells()]
    n = f"n = {min(counts)}" if min(counts) == max(counts) else f"n = {min(counts)} to {max(counts)}"
    facts = [f"{n} per point", f"first token {mode[0]}", *([f"query {mode[1]}"] if mode[1] != "aware" else [])]
    facts += [f"weights {mode[2]}"] if mode[2] != DENSE else []
    y = "difference to full (points)" if figure == "difference" else "score"
    bars = "95 % paired intervals" if figure == "difference" else "95 % intervals, not for comparing methods"
    return Sheet(figure, f"{what}: {run.model}", ", ".join([*facts, bars]), X_LABEL, y, panels)


def _panel(figure: str, table: TaskTable, beside: Sequence[TaskTable]) -> Panel:
    several = sum(t.task == table.task for t in beside) > 1
    title = table.task + (f", {table.shots} shots" if several else "")
    series = tuple(s for s in (_series(figure, row, table) for row in table.rows) if s.points)
    full = table.full.score if figure == "score" and table.full and table.full.n else None
    chance = table.chance if figure == "score" else None
    return Panel(table.task, title, table.ability or "", bool(table.warnings), full, chance, series)


def _series(figure: str, row: Row, table: TaskTable) -> Series:
    points = (_point(figure, row.cells[c.text]) for c in table.columns if c.text in row.cells)
    return Series(row.method, row.label, tuple(sorted((p for p in points if p), key=lambda p: p.x)))


def _point(figure: str, cell: CellSummary) -> Point | None:
    """None for what cannot be placed: no sample, no full to compare with, or no ratio, measured or asked for."""
    try:
        x = cell.measured_ratio if cell.measured_ratio is not None else float(cell.column)
    except ValueError:
        return None
    if not cell.n or (figure == "difference" and cell.difference is None):
        return None
    hollow = cell.over_budget or cell.noop > HOLLOW_NOOP * cell.records
    if figure == "score" or cell.difference is None:
        y, n, ends, scale = cell.score, cell.n, cell.interval, 1.0
    else:
        y, n, ends, scale = cell.difference.value, cell.difference.n, cell.difference.interval, 100.0
    low, high = (scale * ends.low, scale * ends.high) if ends else (None, None)
    return Point(cell.column, x, scale * y, low, high, n, hollow, cell.flags)


def _draw(sheet: Sheet, methods: Sequence[str], path: Path, formats: Sequence[str]) -> list[Path]:
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = _figure(sheet, methods)
        written = []
        for name in formats:
            # Dates and versions out of the files: the same data give the same bytes.
            stamp = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[name]
            figure.savefig(path.with_name(f"{path.name}.{name}"), dpi=200, metadata=stamp)
            written.append(path.with_name(f"{path.name}.{name}"))
    return written


def _grid_shape(panels: int) -> tuple[int, int]:
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3, 9: 3}.get(panels, 4)
    return -(-panels // columns), columns


def _figure(sheet: Sheet, methods: Sequence[str]) -> Figure:
    """Laid out in inches, from the top: title, rows of panels, x label, legend. Nothing can overlap."""
    from matplotlib.figure import Figure

    rows, columns = _grid_shape(len(sheet.panels))
    width = max(4.6, 0.75 + 2.35 * columns)
    handles, labels = _legend(sheet, methods)
    legend_columns = _legend_columns(labels, width)
    bottom = 0.6 + 0.172 * -(-len(labels) // legend_columns)
    title, subtitle = fill(_plain(sheet.title), int(9.5 * width)), fill(_plain(sheet.subtitle), int(14 * width))
    under = 0.14 + 0.18 * (title.count("\n") + 1)
    top, panel, gap = under + 0.36 + 0.14 * (subtitle.count("\n") + 1), {1: 2.3, 2: 1.8}.get(columns, 1.5), 0.55
    height = top + rows * panel + (rows - 1) * gap + bottom
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(
        left=0.68 / width, right=1 - 0.17 / width, top=1 - top / height, bottom=bottom / height,
        hspace=gap / panel, wspace=0.1,
    )  # fmt: skip
    axes = list(grid.flat)
    for ax, content in zip(axes, sheet.panels, strict=False):
        _draw_panel(ax, content, sheet.figure, methods)
    for ax in axes[len(sheet.panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(sheet.panels) - columns) : len(sheet.panels)]:
        ax.tick_params(labelbottom=True)  # the lowest panel of each column, above an empty place too
    _limits(axes[0], sheet)
    left = 0.14 / width
    figure.text(left, 1 - 0.11 / height, title, fontsize=10.5, fontweight="bold", va="top")
    figure.text(left, 1 - under / height, subtitle, fontsize=8, color="#444444", va="top")
    figure.text(0.5, (bottom - 0.36) / height, sheet.x, ha="center", va="center", fontsize=8.5)
    middle = (bottom + (height - top)) / 2 / height
    figure.text(left, middle, sheet.y, rotation=90, va="center", fontsize=8.5)
    figure.legend(
        handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.02 / height), ncols=legend_columns, frameon=False,
        handlelength=2.4, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip
    return figure


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """As few rows as fit `width` inches. matplotlib fills columns from the top, the first ones one longer."""
    for rows in range(1, len(labels) + 1):
        columns = -(-len(labels) // rows)
        short, longer = divmod(len(labels), columns)
        ends = [min(i, longer) * (short + 1) + max(0, i - longer) * short for i in range(columns + 1)]
        widths = (max(map(len, labels[start:end])) for start, end in pairwise(ends))
        if sum(0.6 + 0.07 * longest for longest in widths) <= width - 0.2:
            return columns
    return 1


def _limits(ax: Axes, sheet: Sheet) -> None:
    widest = max([1.0, *(q.x for p in sheet.panels for s in p.series for q in s.points)])
    ax.set_xlim(-0.02, widest + 0.02)  # beyond 1 only where a method stores more than the full cache
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    if sheet.figure == "score":
        ax.set_ylim(-0.03, 1.03)
        return
    ends = [v for p in sheet.panels for s in p.series for q in s.points for v in (q.y, q.low, q.high) if v is not None]
    low, high = min([*ends, -5.0]), max([*ends, 5.0])
    margin = 0.04 * (high - low)
    ax.set_ylim(low - margin, high + margin)


def _draw_panel(ax: Axes, panel: Panel, figure: str, methods: Sequence[str]) -> None:
    ax.grid(True, color="#E4E4E4", linewidth=0.5)
    ax.set_axisbelow(True)
    if figure == "difference":
        ax.axhline(0, color="black", linewidth=0.9, zorder=1.5)
    if panel.full is not None:
        ax.axhline(panel.full, color="black", linewidth=1.0, linestyle="--", zorder=1.5)
    if panel.chance is not None:
        ax.axhline(panel.chance, color="#555555", linewidth=1.0, linestyle=":", zorder=1.5)
    bands = len(methods) <= BANDS_UP_TO
    for series in panel.series:
        _draw_series(ax, series, _numbers(methods)[series.method], bands)
    ax.set_title(_short(panel.title, 32), loc="left", fontweight="bold", pad=12 if panel.subtitle else 4)
    if panel.subtitle:
        ax.text(0, 1.02, _short(panel.subtitle, 32), transform=ax.transAxes, fontsize=7, color="#555555", va="bottom")
    if panel.warning:
        ax.text(1, 1.02, "sanity warning", transform=ax.transAxes, fontsize=7, color="#B00000", va="bottom", ha="right")


def _draw_series(ax: Axes, series: Series, number: int, bands: bool) -> None:
    look = _look(number)
    x, y = [p.x for p in series.points], [p.y for p in series.points]
    ax.plot(x, y, color=look["color"], linestyle=look["linestyle"], zorder=3)
    known = [(p.x, p.low, p.high) for p in series.points if p.low is not None and p.high is not None]
    if bands and len(known) > 1:
        at, low, high = zip(*known, strict=True)
        ax.fill_between(at, low, high, color=look["color"], alpha=0.16, linewidth=0, zorder=2)
    else:
        for one, bottom, top in known:
            ax.plot([one, one], [bottom, top], color=look["color"], linewidth=0.8, alpha=0.55, zorder=2.5)
    for p in series.points:
        face = "white" if p.hollow else look["color"]
        ax.plot(
            [p.x], [p.y], marker=look["marker"], color=look["color"], markerfacecolor=face, linestyle="none",
            markeredgewidth=0.9, zorder=4, clip_on=False,
        )  # fmt: skip


def _numbers(methods: Sequence[str]) -> dict[str, int]:
    """Number of each method's colour and marker: as far as possible the same in every figure.

    Each name has a slot of its own, drawn from the name; where two want the same, plain names come before those with
    settings and files, and the later takes the next free one.
    """
    found: dict[str, int] = {}
    for name in sorted(methods, key=lambda m: (not m.replace("_", "").islower(), ":" in m, m)):
        start = crc32(name.encode()) % len(COLOURS)
        free = (start + step for step in range(len(methods) + len(COLOURS)))
        found[name] = next(slot for slot in _wrapped(free, len(found)) if slot not in found.values())
    return found


def _wrapped(slots: Iterable[int], taken: int) -> Iterator[int]:
    """Slots inside the round of colours that `taken` methods have reached: a colour comes again when all are in use."""
    round_ = taken // len(COLOURS) * len(COLOURS)
    return (round_ + slot % len(COLOURS) for slot in slots)


def _look(number: int) -> dict[str, Any]:
    turn = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[(number + turn) % len(MARKERS)],
        "linestyle": LINES[turn % len(LINES)],
    }


def _legend(sheet: Sheet, methods: Sequence[str]) -> tuple[list[Any], list[str]]:
    """One entry per method of this sheet, then what the reference lines and hollow points are."""
    from matplotlib.lines import Line2D

    there = {s.method: s.label for p in sheet.panels for s in p.series}
    handles: list[Any] = [Line2D([], [], **_look(_numbers(methods)[m])) for m in methods if m in there]
    labels = [_short(there[m]) for m in methods if m in there]
    others: list[tuple[dict[str, Any], str, bool]] = [
        ({"color": "black", "linestyle": "--"}, "full", any(p.full is not None for p in sheet.panels)),
        ({"color": "#555555", "linestyle": ":"}, "chance", any(p.chance is not None for p in sheet.panels)),
        (
            {"color": "#555555", "marker": "o", "markerfacecolor": "white", "linestyle": "none"},
            "hollow: over budget or > 5 % noop",
            any(q.hollow for p in sheet.panels for s in p.series for q in s.points),
        ),
    ]
    for line, label, shown in others:
        if shown:
            handles.append(Line2D([], [], **line))
            labels.append(label)
    return handles, labels


def _short(label: str, longest: int = 44) -> str:
    """Cut in the middle: names of one file differ at their ends."""
    keep = (longest - 1) // 2
    return _plain(label if len(label) <= longest else f"{label[:keep]}…{label[-keep:]}")


def _plain(text: str) -> str:
    """Dollar signs of names are not formulas."""
    return text.replace("$", r"\$")
