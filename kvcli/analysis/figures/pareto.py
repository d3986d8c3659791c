"""Score against bytes: every method at every size, and the front of those that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvcli.analysis.figures import layout
from kvcli.analysis.figures.layout import Plan, plain, shortened
from kvcli.analysis.figures.marks import mark, mark_entries
from kvcli.analysis.figures.panels import heading
from kvcli.analysis.figures.sheets import MOST_LINES, PANELS_PER_PAGE, marks
from kvcli.analysis.figures.style import Style, looks
from kvcli.analysis.figures.views import View
from kvcli.analysis.tables.table import CellSummary, TaskTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FADED = 0.55
"""How strong points are drawn that are not on the front."""


@dataclass(frozen=True)
class Spot:
    """One cell. low, high: of the score, not for comparing methods. front: no other cell, full among them, has at
    most as many bytes and at least the mean score; neighbours on it may not differ by more than chance."""

    method: str
    label: str
    asked: str
    bytes: float
    score: float
    low: float | None
    high: float | None
    n: int
    front: bool
    marks: tuple[str, ...]
    read: float | None = None
    """Bytes that a new token reads, where a method chooses them and frees nothing."""


@dataclass(frozen=True)
class Field:
    task: str
    subtitle: str
    warning: bool
    full: tuple[float, float] | None
    """Bytes and score of full."""
    spots: tuple[Spot, ...]
    full_front: bool = False
    """Whether full is on the front."""


@dataclass(frozen=True)
class Pareto:
    figure: str
    title: str
    subtitle: str
    x: str
    y: str
    panels: tuple[Field, ...]


def build(view: View) -> list[Pareto]:
    """One panel per task. Bytes are of the prompt's kept cache; of the whole cache at the end of the answer where
    some method compressed while generating."""
    ids = {i for t in view.tables for cell in t.cells() for i in cell.cell_ids}
    name = "bytes_end" if any(c.decode for c in view.run.cells if c.cell_id in ids) else "bytes_prefill"
    panels = [panel for table in view.tables if (panel := _field(view, table, name)).spots]
    what = "prompt and answer" if name == "bytes_end" else "prompt"
    cells = [cell for table in view.tables for cell in table.cells() if cell.n]
    reading = sorted({s.label for panel in panels for s in panel.spots if s.read is not None})
    bars = ["bars: 95 % intervals of the front, not for comparing methods"]
    bars += [f"{', '.join(reading)}: nothing is freed"] if reading else []
    return [
        Pareto(
            "pareto", view.title("Score against bytes"),
            view.subtitle(cells, *bars),
            f"cache of the {what} (KiB, 16-bit, mean)", "score", tuple(panels[i : i + PANELS_PER_PAGE]),
        )
        for i in range(0, len(panels), PANELS_PER_PAGE)
    ]  # fmt: skip


def _field(view: View, table: TaskTable, name: str) -> Field:
    def size(cell: CellSummary, name: str = name) -> float | None:
        values = view.measured.of(cell.cell_ids, name)
        known = values[~np.isnan(values)]
        return float(known.mean()) if len(known) else None

    placed = [(cell, amount) for cell in table.cells() if cell.n and (amount := size(cell)) is not None]
    whole = size(table.full) if table.full and table.full.n else None
    full = (whole, table.full.score) if table.full and whole is not None else None
    front = _front([*((amount, cell.score) for cell, amount in placed), *([full] if full else [])])
    spots = [
        Spot(
            cell.method, cell.label, cell.column, amount, cell.score, cell.interval.low if cell.interval else None,
            cell.interval.high if cell.interval else None, cell.n, there, marks(cell), size(cell, "bytes_read"),
        )
        for (cell, amount), there in zip(placed, front, strict=False)
    ]  # fmt: skip
    on_front = full is not None and front[-1]
    return Field(view.task(table), table.ability or "", bool(table.warnings), full, tuple(spots), on_front)


def _front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point has at most as many bytes and at least the score, and is better in one of them."""
    return [
        not any(b <= bytes_ and s >= score and (b, s) != (bytes_, score) for b, s in points) for bytes_, score in points
    ]


def front_line(panel: Field, end: float) -> list[tuple[float, float]]:
    """(KiB, score) of the front, full among them, from left to right, then level to `end`: no cell further right has
    a better score, and a front of one cell is a line too."""
    places = {(s.bytes / 1024, s.score) for s in panel.spots if s.front}
    if panel.full and panel.full_front:
        places.add((panel.full[0] / 1024, panel.full[1]))
    found = sorted(places)
    return [*found, (end, found[-1][1])] if found else []


def draw(sheet: Pareto, style: Style) -> Figure:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator

    labels = {s.method: s.label for panel in sheet.panels for s in panel.spots}
    look = looks(labels)
    on_front = {s.method for panel in sheet.panels for s in panel.spots if s.front}
    crowded = len(labels) > MOST_LINES
    named = {m: label for m, label in labels.items() if m in on_front or not crowded}
    rows, columns = layout.grid_shape(len(sheet.panels), style.most_columns)
    entries = [
        (Line2D([], [], **{**style.line(look[m]), "linestyle": "none"}), plain(shortened(label, style.size, 2.6)))
        for m, label in named.items()
    ]
    others = [
        ({"color": style.theme.ink, "linewidth": 1.0}, "front", True),
        ({"color": style.theme.ink, "marker": "*", "linestyle": "none", "markersize": 8}, "full",
         any(p.full for p in sheet.panels)),
        ({"color": style.theme.muted, "marker": "o", "linestyle": "none", "alpha": 0.5, "markersize": 3},
         "methods never on the front", crowded and len(named) < len(labels)),
        ({"color": style.theme.muted, "marker": "o", "linestyle": "none", "alpha": FADED},
         "faded: not on the front", any(s.method in named and not s.front for p in sheet.panels for s in p.spots)),
        ({"color": style.theme.muted, "marker": "|", "linestyle": ":", "linewidth": 1.0},
         "to what a new token reads", any(s.read is not None for p in sheet.panels for s in p.spots)),
        *mark_entries({m for p in sheet.panels for s in p.spots for m in s.marks}, style),
    ]  # fmt: skip
    entries += [(Line2D([], [], **line), text) for line, text, shown in others if shown]
    above = 0.36 * style.size / 8
    page = layout.page(
        Plan(sheet.title, sheet.subtitle, rows, columns, sheet.x, sheet.y, entries, above=above, gap=0.34), style
    )
    sizes = [v / 1024 for p in sheet.panels for v in (*(s.bytes for s in p.spots), *([p.full[0]] if p.full else []))]
    sizes += [s.read / 1024 for p in sheet.panels for s in p.spots if s.read]
    first = page.axes[0]
    first.set_xscale("log", base=2)
    first.set_xlim(min(sizes) / 1.15, max(sizes) * 1.15)
    first.set_ylim(-0.03, 1.06)
    first.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
    first.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))
    for ax, panel in zip(page.axes, sheet.panels, strict=False):
        ax.grid(True, color=style.theme.grid, linewidth=0.5)
        ax.set_axisbelow(True)
        front = front_line(panel, first.get_xlim()[1])
        ax.step([x for x, _ in front], [y for _, y in front], where="post", color=style.theme.ink, linewidth=1.0,
                zorder=2)  # fmt: skip
        for s in sorted(panel.spots, key=lambda s: s.front):
            if s.method not in named:
                ax.plot([s.bytes / 1024], [s.score], marker="o", markersize=2.2, linestyle="none",
                        color=style.theme.muted, alpha=0.5, zorder=2)  # fmt: skip
                continue
            colour, marker = style.colour(look[s.method]), style.line(look[s.method])["marker"]
            if s.front and s.low is not None and s.high is not None:
                ax.plot([s.bytes / 1024] * 2, [s.low, s.high], color=colour, linewidth=0.9, alpha=0.7, zorder=3)
            mark(ax, [s.bytes / 1024], [s.score], colour, marker, s.marks, style, alpha=1.0 if s.front else FADED)
            if s.read:
                ax.plot([s.bytes / 1024, s.read / 1024], [s.score] * 2, color=colour, linestyle=":", linewidth=1.0,
                        marker="|", markevery=[1], markersize=6, zorder=2.5)  # fmt: skip
        if panel.full:
            ax.plot([panel.full[0] / 1024], [panel.full[1]], marker="*", markersize=8, color=style.theme.ink,
                    linestyle="none", zorder=5, clip_on=False)  # fmt: skip
        room = ax.get_window_extent().width / ax.figure.dpi
        heading(ax, panel.task, panel.subtitle, "sanity warning" * panel.warning, style, room, style.size)
    layout.spare(page.axes, len(sheet.panels), columns)
    return page.figure
