"""Pages laid out in inches from the top: title, rows of panels, axis label, legend. Nothing can overlap.

Widths of texts are measured from the font, never guessed. matplotlib's Figure is used directly (no pyplot), so nothing
global changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font

    from kvcli.analysis.figures.style import Style

EDGE = 0.12
"""Inches between contents and the edge of the page."""
HARD = "\N{NO-BREAK SPACE}"
Entry = tuple[Any, str]
"""A legend's handle and label."""


@dataclass(frozen=True)
class Plan:
    """What a page holds besides its data. Sizes in inches; None: the style's."""

    title: str
    subtitle: str
    rows: int
    columns: int
    x: str
    y: str
    legend: Sequence[Entry] = ()
    panel: tuple[float | None, float | None] = (None, None)
    left: float = 0.42
    """Room for the ticks of the first column; the axis label comes on top."""
    under: float = 0.2
    """Room for the ticks of each row."""
    above: float = 0.34
    """Room for the titles of each row."""
    head: float = 0.0
    """Room above the first row, on top of `above`."""
    gap: float = 0.17
    """Between columns."""
    right: float = 0.0
    """Room at the right for a colour bar."""
    width: float | None = None
    """Of the page, which its panels fill."""
    ticks_inside: bool = True
    """All rows have ticks of their own below them."""


@dataclass(frozen=True)
class Page:
    figure: Figure
    axes: tuple[Axes, ...]
    """Row by row."""
    bar: tuple[float, float, float, float] | None
    """Where a colour bar goes, in parts of the figure."""


def page(plan: Plan, style: Style, *, share: bool = True) -> Page:
    """share: all panels have the same axes. The figure's label is its caption, whether the page shows it or not."""
    from matplotlib.figure import Figure

    line = style.size * 1.3 / 72
    room = plan.rows * (plan.above + (plan.panel[1] or style.panel[1]) + plan.under)
    y_lines = wrapped(plan.y, style.size, room) if plan.y else []
    y_label = len(y_lines) * line + 0.04 if y_lines else 0.0
    left, across = EDGE + y_label + plan.left, plan.columns
    edges = left + EDGE + 0.05 + plan.right + (across - 1) * plan.gap
    width, panel = _widths(plan, style, edges)
    entries = legend_rows([label for _, label in plan.legend], width - 2 * EDGE, style)
    title = wrapped(plan.title, style.size + 2, width - 2 * EDGE, bold=True) if style.titles else []
    subtitle = wrapped(plan.subtitle, style.size, width - 2 * EDGE) if style.titles else []
    head = EDGE + len(title) * (style.size + 2) * 1.3 / 72
    top = head + len(subtitle) * line + 0.06 * style.titles + plan.head
    tall = plan.panel[1] or style.panel[1] * (panel / style.panel[0]) ** 0.5
    foot = (line + 0.05 if plan.x else 0.02) + EDGE * 0.6 + (entries * line * 1.12 + 0.06 if plan.legend else 0.0)
    height = top + plan.rows * (plan.above + tall + plan.under) + foot
    figure = Figure(figsize=(width, height))
    figure.set_label(f"{plan.title}. {plan.subtitle}.")
    grid: list[Axes] = []
    for row in range(plan.rows):
        for column in range(across):
            bottom = height - top - row * (plan.above + tall + plan.under) - plan.above - tall
            place = ((left + column * (panel + plan.gap)) / width, bottom / height, panel / width, tall / height)
            first = grid[0] if grid and share else None
            grid.append(figure.add_axes(place, sharex=first, sharey=first))
            if share:
                grid[-1].tick_params(labelleft=column == 0, labelbottom=plan.ticks_inside or row == plan.rows - 1)
    if style.titles:
        figure.text(EDGE / width, 1 - EDGE / height, "\n".join(title), fontsize=style.size + 2, fontweight="bold",
                    va="top", linespacing=1.15)  # fmt: skip
        figure.text(EDGE / width, 1 - head / height, "\n".join(subtitle), fontsize=style.size,
                    color=style.theme.muted, va="top", linespacing=1.15)  # fmt: skip
    middle = (left + (width - EDGE - 0.05 - plan.right - left) / 2) / width
    if plan.x:
        figure.text(middle, (foot - line * 0.55 - 0.02) / height, plan.x, ha="center", va="center")
    if y_lines:
        at = (EDGE + y_label / 2) / width, (foot + height - top) / 2 / height
        figure.text(*at, "\n".join(y_lines), rotation=90, ha="center", va="center", linespacing=1.15)
    if plan.legend:
        _legend(figure, plan, entries, width, height)
    bar = ((width - EDGE - plan.right + 0.16) / width, (foot + plan.under) / height, 0.1 / width,
           min(1.6, max(0.6, plan.rows * tall)) / height)  # fmt: skip
    return Page(figure, tuple(grid), bar if plan.right else None)


def _widths(plan: Plan, style: Style, edges: float) -> tuple[float, float]:
    """(figure, panel) in inches."""
    wanted = plan.panel[0] or style.panel[0] * (1.6 if plan.columns == 1 else 1.0)
    if plan.width is not None:
        return plan.width, (plan.width - edges) / plan.columns
    if style.width is None or plan.panel[0]:
        return max(4.4, edges + plan.columns * wanted), max((4.4 - edges) / plan.columns, wanted)
    width = style.width[0] if plan.columns == 1 else style.width[1]
    return width, (width - edges) / plan.columns


def _legend(figure: Figure, plan: Plan, rows: int, width: float, height: float) -> None:
    figure.legend(
        [handle for handle, _ in plan.legend], [label for _, label in plan.legend], loc="lower center",
        bbox_to_anchor=(0.5, EDGE * 0.4 / height), ncols=-(-len(plan.legend) // rows), frameon=False,
        handlelength=2.6, columnspacing=1.4, borderaxespad=0.0, handletextpad=0.5, labelspacing=0.3, borderpad=0.1,
    )  # fmt: skip


def legend_rows(labels: Sequence[str], room: float, style: Style) -> int:
    """As few rows as fit. matplotlib fills columns from the top, the first ones one longer."""
    em = style.size / 72
    widths = [text_width(label, style.size) + 3.1 * em for label in labels]
    for rows in range(1, len(labels) + 1):
        columns = -(-len(labels) // rows)
        short, longer = divmod(len(labels), columns)
        ends = [min(i, longer) * (short + 1) + max(0, i - longer) * short for i in range(columns + 1)]
        needed = sum(max(widths[start:end]) for start, end in pairwise(ends) if end > start)
        if needed + (columns - 1) * 1.4 * em + 0.1 <= room:
            return -(-len(labels) // columns)
    return max(1, len(labels))


def grid_shape(panels: int, most: int) -> tuple[int, int]:
    """(rows, columns) with few empty places."""
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3, 9: 3}.get(panels, 4)
    columns = min(columns, most)
    return -(-panels // columns), columns


def print_width(style: Style, panels: int, panel: float, gap: float, rest: float) -> tuple[float | None, int]:
    """(width of a printed page, panels side by side) for panels at least `panel` wide; (None, panels) for a screen.

    One column of the paper where all fit side by side, else two. rest: inches beside the panels.
    """
    if style.width is None:
        return None, panels
    fits = [max(1, int((width - rest + gap) / (panel + gap))) for width in style.width]
    if fits[0] >= panels and style.width[0] - rest >= panel:
        return style.width[0], panels
    return style.width[1], min(fits[1], panels)


def spare(axes: Sequence[Axes], used: int, columns: int) -> None:
    """Hides the places without a panel, and gives what stands above one its ticks."""
    for ax in axes[used:]:
        ax.set_visible(False)
    for ax in axes[max(0, used - columns) : used]:
        ax.tick_params(labelbottom=True)


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Inches of one line in the figures' font."""
    font = _font(bold)
    font.set_size(size, 72)
    font.set_text(text, 0.0)
    return float(font.get_width_height()[0]) / 64 / 72


@lru_cache(maxsize=2)
def _font(bold: bool) -> FT2Font:
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    return FT2Font(findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")))


def wrapped(text: str, size: float, room: float, bold: bool = False) -> list[str]:
    """Lines of whole words that fit `room` inches; a word that is longer is cut. Hard spaces hold words together."""
    lines: list[str] = []
    for word in text.replace(" %", f"{HARD}%").split(" "):
        piece = shortened(word, size, room, bold)
        if lines and text_width(f"{lines[-1]} {piece}", size, bold) <= room:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return [plain(line) for line in lines] or [""]


def shortened(text: str, size: float, room: float, bold: bool = False) -> str:
    """Cut in the middle to fit `room` inches: names of one file differ at their ends."""
    if text_width(text, size, bold) <= room:
        return text
    for keep in range(len(text) // 2, 1, -1):
        cut = f"{text[:keep]}…{text[-keep:]}"
        if text_width(cut, size, bold) <= room:
            return cut
    return text[:1] + "…"


def plain(text: str) -> str:
    """Dollar signs of names are not formulas."""
    return text.replace("$", r"\$")
