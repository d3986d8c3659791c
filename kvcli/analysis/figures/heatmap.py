"""Methods x tasks: the difference to full as colour and number, a panel per requested size. For many methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.analysis.figures import layout
from kvcli.analysis.figures.layout import Plan, plain, shortened, text_width
from kvcli.analysis.figures.sheets import FALLBACK, NOOP, OVER, SIMULATED, marks
from kvcli.analysis.figures.style import Style
from kvcli.analysis.figures.values import difference_of
from kvcli.analysis.figures.views import View, counted
from kvcli.analysis.tables import Column, TaskTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

LETTERS = {OVER: "b", NOOP: "n", FALLBACK: "f", SIMULATED: "s"}
"""What stands behind a number for each mark."""
MOST_COLUMNS = 12
"""Tasks on one page."""


@dataclass(frozen=True)
class Box:
    """One cell. y: percentage points; established: docs/statistics.md, unadjusted."""

    method: str
    task: str
    y: float
    low: float | None
    high: float | None
    n: int
    established: bool
    measured_ratio: float | None
    marks: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    asked: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Heat:
    """methods: label by recorded name."""

    figure: str
    title: str
    subtitle: str
    bar: str
    methods: dict[str, str]
    tasks: tuple[str, ...]
    grids: tuple[Grid, ...]
    part: str = ""


def build(view: View) -> list[Heat]:
    """Pages of at most MOST_COLUMNS tasks; empty where there is no full to compare with. Methods with a size of their
    own, which are at no ratio, have a page of their own."""
    tables = [t for t in view.tables if any(cell.difference for cell in t.cells())]
    columns = sorted({c for t in tables for c in t.columns}, key=lambda c: c.order)
    pages = []
    for own in (False, True):
        mine = [c for c in columns if (c.kind == "own") == own]
        part = "own" if own and len(mine) < len(columns) else ""
        for start in range(0, len(tables), MOST_COLUMNS):
            pages += _page(view, tables[start : start + MOST_COLUMNS], mine, part)
    return pages


def _page(view: View, tables: Sequence[TaskTable], columns: Sequence[Column], part: str) -> list[Heat]:
    grids = [grid for column in columns if (grid := _grid(view, tables, column)).boxes]
    if not grids:
        return []
    boxes = [box for grid in grids for box in grid.boxes]
    there = {box.method for box in boxes}
    subtitle = ", ".join([f"{counted(box.n for box in boxes)} per cell", *view.mode.words])
    return [
        Heat(
            "heatmap",
            view.title("Difference to the full cache, in points"),
            subtitle,
            "points",
            {m: view.labels[m] for m in view.methods if m in there},
            tuple(dict.fromkeys(view.task(t) for t in tables)),
            tuple(grids),
            part,
        )
    ]


def _grid(view: View, tables: Sequence[TaskTable], column: Column) -> Grid:
    boxes = []
    for table in tables:
        for row in table.rows:
            cell = row.cells.get(column.text)
            if cell is not None and (value := difference_of(cell)):
                boxes.append(
                    Box(
                        row.method,
                        view.task(table),
                        value.y,
                        value.low,
                        value.high,
                        value.n,
                        cell.verdict in ("loss", "gain"),
                        cell.measured_ratio,
                        marks(cell),
                    )
                )
    return Grid(column.text, tuple(boxes))


def draw(sheet: Heat, style: Style) -> Figure:
    size = style.size - 1
    names = {m: plain(shortened(label, size, 1.9)) for m, label in sheet.methods.items()}
    left = max(text_width(name, size) for name in names.values()) + 0.1
    box = (0.4 * style.size / 8, 0.172 * style.size / 8)
    tilt = max(text_width(task, size) for task in sheet.tasks)
    head = min(1.2, tilt) * 0.72 + 0.12
    panel = (box[0] * len(sheet.tasks), box[1] * len(names))
    room = (style.width[1] if style.width else 11.0) - left - 1.2
    columns = max(1, min(len(sheet.grids), int(room / (panel[0] + 0.2))))
    rows = -(-len(sheet.grids) // columns)
    found = {m for g in sheet.grids for b in g.boxes for m in b.marks}
    key = ["*: established (95 %, unadjusted)", *(f"{LETTERS[m]}: {m}" for m in LETTERS if m in found)]
    page = layout.page(
        Plan(
            sheet.title, f"{sheet.subtitle}. {', '.join(key)}", rows, columns, "", "", panel=panel, left=left,
            under=0.05, above=head + 0.3, gap=0.2, right=0.75,
        ),
        style, share=False,
    )  # fmt: skip
    widest = max([5.0, *(abs(b.y) for g in sheet.grids for b in g.boxes)])
    shades = diverging(style)
    image = None
    for number, (ax, grid) in enumerate(zip(page.axes, sheet.grids, strict=False)):
        image = _panel(ax, sheet, grid, names if number % columns == 0 else {}, shades, widest, style)
    for ax in page.axes[len(sheet.grids) :]:
        ax.set_visible(False)
    if image is not None and page.bar:
        bar = page.figure.colorbar(image, cax=page.figure.add_axes(page.bar))
        bar.outline.set_linewidth(0.4)
        bar.set_label(sheet.bar, fontsize=size)
        bar.ax.tick_params(labelsize=size)
    return page.figure


def diverging(style: Style) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("losses", style.theme.losses)


def _panel(
    ax: Axes, sheet: Heat, grid: Grid, names: dict[str, str], shades: Colormap, widest: float, style: Style
) -> AxesImage:
    import numpy as np
    from matplotlib.colors import to_rgb

    size = style.size - 1
    rows, columns = {m: i for i, m in enumerate(sheet.methods)}, {t: i for i, t in enumerate(sheet.tasks)}
    values = np.full((len(rows), len(columns)), np.nan)
    for one in grid.boxes:
        values[rows[one.method], columns[one.task]] = one.y
    image = ax.imshow(np.ma.masked_invalid(values), cmap=shades, vmin=-widest, vmax=widest, aspect="auto")
    for one in grid.boxes:
        red, green, blue = to_rgb(shades((one.y + widest) / (2 * widest)))
        ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#FFFFFF"
        letters = "".join(LETTERS[m] for m in one.marks)
        said = f"{one.y:+.0f}".replace("-", "\N{MINUS SIGN}") if abs(one.y) >= 0.5 else "0"
        ax.text(columns[one.task], rows[one.method], f"{said}{'*' * one.established}{letters}", ha="center",
                va="center", fontsize=size - 0.8, color=ink)  # fmt: skip
    ax.set_yticks(range(len(rows)), list(names.values()) if names else [""] * len(rows), fontsize=size)
    tasks = [plain(shortened(t, size, 1.2)) for t in sheet.tasks]
    ax.set_xticks(range(len(columns)), tasks, rotation=45, ha="left", rotation_mode="anchor", fontsize=size)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, pad=2)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color=style.theme.page, linewidth=0.8)
    ax.tick_params(which="minor", length=0)
    ax.annotate(f"asked: {grid.asked}", (0, 1), xycoords="axes fraction", xytext=(0, _above(sheet, size)),
                textcoords="offset points", fontweight="bold", fontsize=style.size + 0.5)  # fmt: skip
    return image


def _above(sheet: Heat, size: float) -> float:
    """Points between a panel and its heading: the height of the tilted names."""
    return (min(1.2, max(text_width(t, size) for t in sheet.tasks)) * 0.72 + 0.12) * 72
