"""Methods x tasks: the difference to full as colour and number, a panel per requested size. For many methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING

from kvcli.analysis.figures import layout
from kvcli.analysis.figures.layout import Plan, plain, shortened, text_width
from kvcli.analysis.figures.sheets import FALLBACK, NOOP, OVER, SIMULATED, marks
from kvcli.analysis.figures.style import Style
from kvcli.analysis.figures.values import difference_of
from kvcli.analysis.figures.views import View, counted
from kvcli.analysis.statistics.verdicts import Kind
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.table import Column, TaskTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

LETTERS = {
    OVER: wording.MARKS["over_budget"], NOOP: wording.MARKS["noop"], FALLBACK: wording.MARKS["fallback"],
    SIMULATED: wording.MARKS["simulated"],
}  # fmt: skip
"""What stands behind a number for each mark: the letters of tables."""
GAP, RIGHT = 0.2, 0.75
"""Inches between panels, and for the colour bar."""
MOST_COLUMNS = 12
"""Tasks on one page."""


@dataclass(frozen=True)
class Box:
    """One cell. y: percentage points; low, high: 95 %, unadjusted; established: a loss or gain, all comparisons of the
    run considered, as its report says."""

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
    family: int
    """Comparisons that verdicts are adjusted for."""
    part: str = ""
    widest: float = 5.0
    """Points at both ends of the colours, on all pages alike."""


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
            view.whole.judged.family.size,
            part,
            max([5.0, *(abs(box.y) for box in boxes)]),
        )
    ]


def _grid(view: View, tables: Sequence[TaskTable], column: Column) -> Grid:
    boxes = []
    for table in tables:
        for row in table.rows:
            cell = row.cells.get(column.text)
            if cell is not None and (value := difference_of(cell)):
                verdict = view.whole.judged.of(cell)
                boxes.append(
                    Box(
                        row.method,
                        view.task(table),
                        value.y,
                        value.low,
                        value.high,
                        value.n,
                        verdict is not None and verdict.kind in (Kind.LOSS, Kind.GAIN),
                        cell.measured_ratio,
                        marks(cell),
                    )
                )
    return Grid(column.text, tuple(boxes))


def draw(sheet: Heat, style: Style) -> Figure:
    size = style.size - 1
    names = {m: plain(shortened(label, size, 1.9)) for m, label in sheet.methods.items()}
    left = max(text_width(name, size) for name in names.values()) + 0.1
    box = (max(0.3, *(text_width(_said(b), size) for g in sheet.grids for b in g.boxes)) + 0.05, 0.172 * style.size / 8)
    tilt = max(text_width(task, size) for task in sheet.tasks)
    head = min(1.2, tilt) * 0.72 + 0.12
    panel = (box[0] * len(sheet.tasks), box[1] * len(names))
    width, columns = layout.print_width(style, len(sheet.grids), panel[0], GAP, left + RIGHT + 2 * layout.EDGE + 0.05)
    if width is None:
        columns = max(1, min(len(sheet.grids), int((11.0 - left - 1.2) / (panel[0] + GAP))))
    rows = -(-len(sheet.grids) // columns)
    found = {m for g in sheet.grids for b in g.boxes for m in b.marks}
    many = f", all {sheet.family:,} comparisons considered" if sheet.family > 1 else " (95 %)"
    key = [
        f"{wording.ESTABLISHED}: loss or gain{many}",
        *(f"{LETTERS[m]}:{layout.HARD}{m.replace(' ', layout.HARD)}" for m in LETTERS if m in found),
    ]
    page = layout.page(
        Plan(
            sheet.title, f"{sheet.subtitle}. {', '.join(key)}", rows, columns, "", "", panel=panel, left=left,
            under=0.05, above=0.3, head=head, gap=GAP, right=RIGHT, width=width,
        ),
        style, share=False,
    )  # fmt: skip
    shades = diverging(style)
    image = None
    for number, (ax, grid) in enumerate(zip(page.axes, sheet.grids, strict=False)):
        image = _panel(ax, sheet, grid, names if number % columns == 0 else {}, number < columns, shades, style)
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
    ax: Axes, sheet: Heat, grid: Grid, names: dict[str, str], top: bool, shades: Colormap, style: Style
) -> AxesImage:
    """names: empty but at the left; top: tasks are named above."""
    import numpy as np
    from matplotlib.colors import to_rgb

    size = style.size - 1
    rows, columns = {m: i for i, m in enumerate(sheet.methods)}, {t: i for i, t in enumerate(sheet.tasks)}
    values = np.full((len(rows), len(columns)), np.nan)
    for one in grid.boxes:
        values[rows[one.method], columns[one.task]] = one.y
    image = ax.imshow(np.ma.masked_invalid(values), cmap=shades, vmin=-sheet.widest, vmax=sheet.widest, aspect="auto")
    for one in grid.boxes:
        red, green, blue = to_rgb(shades((one.y + sheet.widest) / (2 * sheet.widest)))
        ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#FFFFFF"
        ax.text(columns[one.task], rows[one.method], _said(one), ha="center", va="center", fontsize=size, color=ink)
    ax.set_yticks(range(len(rows)), list(names.values()) if names else [""] * len(rows), fontsize=size)
    tasks = [plain(shortened(t, size, 1.2)) if top else "" for t in sheet.tasks]
    ax.set_xticks(range(len(columns)), tasks, rotation=45, ha="left", rotation_mode="anchor", fontsize=size)
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, pad=2)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color=style.theme.page, linewidth=0.8)
    ax.tick_params(which="minor", length=0)
    ax.annotate(f"asked: {grid.asked}", (0, 1), xycoords="axes fraction", xytext=(0, _above(sheet, size) if top else 3),
                textcoords="offset points", fontweight="bold", fontsize=style.size + 0.5)  # fmt: skip
    return image


def _said(box: Box) -> str:
    """'−12*o'."""
    return f"{rounded(box.y)}{wording.ESTABLISHED * box.established}{''.join(LETTERS[m] for m in box.marks)}"


def rounded(points: float) -> str:
    """Whole points, halves away from zero; one decimal below 1, so that a small difference is not called none."""
    exact = Decimal(repr(round(points, 9)))
    digits = Decimal("0.1") if abs(exact) < 1 else Decimal(1)
    found = exact.quantize(digits, ROUND_HALF_UP)
    if not found:
        return "0"
    return (f"{found:+.0f}" if found == int(found) else f"{found:+}").replace("-", "\N{MINUS SIGN}")


def _above(sheet: Heat, size: float) -> float:
    """Points between a panel and its heading: the height of the tilted names."""
    return (min(1.2, max(text_width(t, size) for t in sheet.tasks)) * 0.72 + 0.12) * 72
