"""Score by where the needle lies and how long the text is: a map per method and requested size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcli.analysis.figures import layout
from kvcli.analysis.figures.layout import Plan, text_width
from kvcli.analysis.figures.panels import heading
from kvcli.analysis.figures.sheets import marks
from kvcli.analysis.figures.style import Style
from kvcli.analysis.figures.views import View, counted
from kvcli.analysis.tables.table import FULL, CellSummary, TaskTable
from kvcli.grammar import task_base

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTH, LENGTH = "depth", "length"
"""What the scorer of a needle task adds to each record (`extra`)."""
MAPS_PER_PAGE = 16


@dataclass(frozen=True)
class Spot:
    """All samples of one depth and length."""

    length: float
    depth: float
    score: float
    n: int


@dataclass(frozen=True)
class Map:
    method: str
    label: str
    asked: str
    marks: tuple[str, ...]
    spots: tuple[Spot, ...]


@dataclass(frozen=True)
class Needle:
    figure: str
    title: str
    subtitle: str
    lengths: tuple[float, ...]
    depths: tuple[float, ...]
    maps: tuple[Map, ...]
    part: str = ""


def build(view: View) -> list[Needle]:
    """Tasks that differ by length or depth only (`niah:length=4096`, `niah:length=8192`) share a map."""
    found: list[Needle] = []
    names: dict[tuple[str, int | None], list[TaskTable]] = {}
    for table in view.tables:
        names.setdefault((_without(table.task), table.shots), []).append(table)
    for (name, _), tables in names.items():
        maps = [m for m in _maps(view, tables) if m.spots]
        if not any(m.method != FULL for m in maps):
            continue
        spots = [s for m in maps for s in m.spots]
        lengths, depths = (tuple(sorted({getattr(s, a) for s in spots})) for a in (LENGTH, DEPTH))
        subtitle = ", ".join([f"{counted(s.n for s in spots)} per field", *view.mode.words])
        pages = [maps[i : i + MAPS_PER_PAGE] for i in range(0, len(maps), MAPS_PER_PAGE)]
        title = view.title(f"Score by depth and length, {name}")
        found += [
            Needle("needle", title, subtitle, lengths, depths, tuple(page), name * (len(names) > 1)) for page in pages
        ]
    return found


def _without(task: str) -> str:
    """The task without settings of length and depth, which the map shows."""
    base = task_base(task)
    rest = [s for s in task[len(base) + 1 :].split(",") if s and s.split("=")[0] not in (DEPTH, LENGTH)]
    return f"{base}:{','.join(rest)}" if rest else base


def _maps(view: View, tables: Sequence[TaskTable]) -> Iterator[Map]:
    full = [t.full for t in tables if t.full and t.full.n]
    yield Map(FULL, FULL, FULL, (), _spots(view, full))
    columns = sorted({c for t in tables for c in t.columns}, key=lambda c: c.order)
    for method in dict.fromkeys(row.method for t in tables for row in t.rows):
        for column in columns:
            mine = [c for t in tables for c in t.cells() if c.method == method and c.column == column.text]
            if mine:
                found = tuple(dict.fromkeys(m for c in mine for m in marks(c)))
                yield Map(method, view.labels[method], column.text, found, _spots(view, mine))


def _spots(view: View, cells: Sequence[CellSummary]) -> tuple[Spot, ...]:
    found: dict[tuple[float, float], list[float]] = {}
    for cell in cells:
        scores, _ = view.scores.of(cell.cell_ids)
        depth, length = (view.measured.of(cell.cell_ids, name) for name in (DEPTH, LENGTH))
        for i in np.flatnonzero(~np.isnan(scores) & ~np.isnan(depth) & ~np.isnan(length)):
            found.setdefault((float(length[i]), float(depth[i])), []).append(float(scores[i]))
    return tuple(Spot(*place, float(np.mean(s)), len(s)) for place, s in sorted(found.items()))


def draw(sheet: Needle, style: Style) -> Figure:
    size, scale = style.size - 1, style.size / 8
    name = max(text_width(one.label, style.size + 0.5, bold=True) for one in sheet.maps)
    wide = min(1.35 if style.width else 2.2, max(0.9 * scale, name + 0.02, 0.32 * scale * len(sheet.lengths)))
    width, columns = layout.print_width(style, len(sheet.maps), wide, 0.17, 2.0)
    columns = min(style.most_columns, columns)
    rows = -(-len(sheet.maps) // columns)
    tall = min(1.8, max(0.9, 0.16 * len(sheet.depths))) * scale
    page = layout.page(
        Plan(
            sheet.title, sheet.subtitle, rows, columns, "length (tokens)", "depth (0: beginning of the text)",
            panel=(wide, tall), left=0.36, above=0.4 * scale, right=0.75, width=width,
        ),
        style,
    )  # fmt: skip
    image: Any = None
    for number, (ax, one) in enumerate(zip(page.axes, sheet.maps, strict=False)):
        values = np.full((len(sheet.depths), len(sheet.lengths)), np.nan)
        for spot in one.spots:
            values[sheet.depths.index(spot.depth), sheet.lengths.index(spot.length)] = spot.score
        image = ax.imshow(np.ma.masked_invalid(values), cmap=style.theme.shades, vmin=0, vmax=1, aspect="auto")
        ax.tick_params(length=2, labelsize=size)
        room = ax.get_window_extent().width / ax.figure.dpi
        asked = "nothing evicted" if one.method == FULL else f"asked: {one.asked}"
        heading(ax, one.label, ", ".join([asked, *one.marks]), "", style, room, style.size)
        if number == 0:
            at = _thinned(len(sheet.depths), int(tall / (0.16 * scale)))
            ax.set_yticks(at, [f"{sheet.depths[i]:g}" for i in at])
            at = _thinned(len(sheet.lengths), int(room / (0.3 * scale)))
            ax.set_xticks(at, [_tokens(sheet.lengths[i]) for i in at])
    layout.spare(page.axes, len(sheet.maps), columns)
    if image is not None and page.bar:
        bar = page.figure.colorbar(image, cax=page.figure.add_axes(page.bar))
        bar.outline.set_linewidth(0.4)
        bar.set_label("score", fontsize=size)
        bar.ax.tick_params(labelsize=size)
    return page.figure


def _thinned(count: int, most: int) -> list[int]:
    return list(range(0, count, -(-count // max(1, most))))


def _tokens(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"
