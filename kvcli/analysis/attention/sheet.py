"""What the figures of attention share: panels laid out in inches from the top, the regions' colours."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from kvcli.analysis.figures.style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REGION_COLOURS = {
    "special": "#666666", "system": "#0072B2", "context": "#009E73", "shot": "#E69F00", "question": "#D55E00",
}  # fmt: skip
SECOND_SHOT = "#F3C868"
"""Every other shot: where one ends is seen."""
SHADES = {"light": "YlGnBu", "dark": "YlGnBu_r"}
"""By theme, from the page's own shade on; apart in print and for colour-blind readers (ColorBrewer)."""
THROWN = {
    "light": {"all": "#56B4E9", "question": "#332288"}, "dark": {"all": "#56B4E9", "question": "#B9AEF5"},
}  # fmt: skip
"""By theme: attention thrown away, by whose it is; the same in figures and on the page."""
COLUMNS = 3
LONGEST = 36
"""Characters of a name in a legend."""


class Sheet:
    """A figure of rows x columns panels of a size in inches. gaps: inches between columns and rows.

    Of `--style paper` the figure is as wide as one or two columns of a print page, and panels that do not fit are made
    narrower (square: smaller). `size` is what they came to.
    """

    LEFT, RIGHT = 0.62, 0.25

    def __init__(
        self, look: Style, title: str, subtitle: str, rows: int, columns: int, size: tuple[float, float],
        *, gaps: tuple[float, float], top: float, bottom: float, left: float = LEFT, right: float = RIGHT,
        square: bool = False,
    ) -> None:  # fmt: skip
        from matplotlib.figure import Figure

        self.look, self.gaps, self.left = look, gaps, left
        beside = left + (columns - 1) * gaps[0] + right
        self.width = max(4.4, beside + columns * size[0])
        if look.width is not None:
            self.width = look.width[self.width > look.width[0]]
            wide = min(size[0], (self.width - beside) / columns)
            size = (wide, wide if square else size[1])
        self.size = size
        title, subtitle = fill(plain(title), int(9.5 * self.width)), fill(plain(subtitle), int(14.5 * self.width))
        head = 0.16 + 0.18 * (title.count("\n") + 1) + 0.14 * (subtitle.count("\n") + 1)
        self.top = head + top
        self.height = self.top + rows * size[1] + (rows - 1) * gaps[1] + bottom
        self.figure = Figure(figsize=(self.width, self.height))
        self.text(0.14, 0.11, title, fontsize=10.5, fontweight="bold", va="top")
        self.text(0.14, 0.15 + 0.18 * (title.count("\n") + 1), subtitle, fontsize=8, color=look.theme.muted, va="top")

    @property
    def columns(self) -> int:
        """Columns of an image that a panel can show, each at least a pixel wide."""
        return int(0.97 * self.size[0] * self.look.dpi)

    def sharp(self, columns: int) -> None:
        """More pixels per inch where a panel's image has more columns than pixels."""
        if columns > self.columns:
            self.figure.set_dpi(int(columns / (0.97 * self.size[0])) + 1)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """At inches from the left and the top."""
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)

    def place(self, row: int, column: int) -> tuple[float, float]:
        """Inches of a panel's left and top."""
        (wide, high), (between, below) = self.size, self.gaps
        return self.left + column * (wide + between), self.top + row * (high + below)

    def axes(self, row: int, column: int) -> Axes:
        return self.axes_at(*self.place(row, column), *self.size)

    def axes_at(self, x: float, y: float, wide: float, high: float) -> Axes:
        place = (x / self.width, 1 - (y + high) / self.height, wide / self.width, high / self.height)
        return self.figure.add_axes(place)

    def legend(self, handles: Sequence[Any], labels: Sequence[str], y: float) -> None:
        """Centred at inches from the bottom."""
        self.figure.legend(
            handles, [short(label, LONGEST) for label in labels], loc="lower center",
            bbox_to_anchor=(0.5, y / self.height), ncols=legend_columns(labels, self.width), frameon=False,
            handlelength=1.6, columnspacing=1.4, borderaxespad=0.2,
        )  # fmt: skip


def legend_columns(labels: Sequence[str], width: float) -> int:
    """As many as fit so many inches."""
    longest = max(min(len(label), LONGEST) for label in labels)
    return min(len(labels), max(1, int(width / (0.6 + 0.07 * longest))))


def columns_of(panels: int) -> int:
    return 2 if panels == 4 else min(COLUMNS, panels)


def whole_ticks(axis: Any, most: int) -> None:
    """At most so many ticks, at whole numbers, even where there is room for one number alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def plain(text: str) -> str:
    """Dollar signs of names are not formulas."""
    return text.replace("$", r"\$")


def short(text: str, most: int) -> str:
    keep = (most - 1) // 2
    return plain(text if len(text) <= most else f"{text[:keep]}…{text[-keep:]}")


def _colour(label: str) -> str:
    kind, _, number = label.partition(" ")
    return SECOND_SHOT if kind == "shot" and int(number) % 2 else REGION_COLOURS[kind]


def region_legend(sheet: Sheet, labels: Sequence[str], y: float) -> None:
    from matplotlib.patches import Patch

    there = {label.partition(" ")[0] for label in labels}
    names = [name for name in REGION_COLOURS if name in there]
    texts = ["shots" if name == "shot" else name for name in names]
    sheet.legend([Patch(color=REGION_COLOURS[name]) for name in names], texts, y)


def strip(ax: Axes, regions: Sequence[Any], *, left: bool, inches: tuple[float, float]) -> None:
    """A band of the regions' colours above a panel of that size, and one beside it."""
    from matplotlib.patches import Rectangle

    wide, high = inches
    x, y = ax.get_xaxis_transform(), ax.get_yaxis_transform()
    for label, start, end in regions:
        look: dict[str, Any] = {"facecolor": _colour(label), "edgecolor": "none", "clip_on": False}
        length = end - start
        ax.add_patch(Rectangle((start - 0.5, 1 + 0.03 / high), length, 0.08 / high, transform=x, **look))
        if left:
            ax.add_patch(Rectangle((-0.11 / wide, start - 0.5), 0.08 / wide, length, transform=y, **look))
