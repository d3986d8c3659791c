"""What panels of lines and of rows share: their frame, heading and limits, and the legend's entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvcli.analysis.figures.layout import Entry, plain, shortened, text_width
from kvcli.analysis.figures.marks import mark_entries
from kvcli.analysis.figures.sheets import Panel, Point, Sheet
from kvcli.analysis.figures.style import DASHES, MARKERS, Style, looks, pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALLEST = 6.0
"""Points: smaller type is not readable in print."""
KL_LINEAR = 1e-3
"""Below it the axis of the logarithmic scale is linear, so that 0 has a place."""


def every(sheet: Sheet) -> dict[str, str]:
    """Series key -> label, in the order of the first panel that has it."""
    return {s.key: s.label for panel in sheet.panels for s in panel.series}


def points_of(sheet: Sheet) -> list[Point]:
    return [p for panel in sheet.panels for s in panel.series for p in s.points]


def lines_of(sheet: Sheet, style: Style, series: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    if sheet.keys != "shots":
        return {key: style.line(look) for key, look in looks(series).items()}
    colours = ordered(len(series), style)
    return {
        key: {"color": colours[i], "marker": MARKERS[i % len(MARKERS)], "linestyle": pattern(i % len(DASHES))}
        for i, key in enumerate(series)
    }


def ordered(count: int, style: Style) -> list[str]:
    """Colours of an ordered set, from little to much."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    low, high = (0.0, 0.8) if style.theme.name == "light" else (0.35, 1.0)
    shades = mpl.colormaps["plasma"]
    return [to_hex(shades(low + (high - low) * i / max(1, count - 1))) for i in range(count)]


def handle(line: dict[str, Any]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **line)


def cut(label: str, style: Style) -> str:
    return shortened(label, style.size, 2.6)


def references(sheet: Sheet, style: Style) -> list[Entry]:
    """What the reference lines are, and how marked points differ."""
    theme = style.theme
    entries: list[tuple[dict[str, Any], str, bool]] = [
        ({"color": theme.ink, "linestyle": "--"}, "full", any(p.full is not None for p in sheet.panels)),
        ({"color": theme.muted, "linestyle": ":"}, "chance", any(p.chance is not None for p in sheet.panels)),
    ]
    entries += mark_entries({m for p in points_of(sheet) for m in p.marks}, style)
    return [(handle(line), label) for line, label, shown in entries if shown]


def above(panels: Sequence[Panel], style: Style) -> float:
    return (0.36 if any(p.subtitle or p.warning for p in panels) else 0.24) * style.size / 8


def frame(ax: Axes, panel: Panel, sheet: Sheet, style: Style, across: bool = False) -> None:
    """Grid, reference lines and title. across: values lie on the x axis."""
    theme, size = style.theme, style.size
    straight = ax.axvline if across else ax.axhline
    ax.grid(True, color=theme.grid, linewidth=0.5)
    ax.set_axisbelow(True)
    if sheet.scale == "points":
        straight(0, color=theme.ink, linewidth=0.9, zorder=1.5)
    if panel.full is not None:
        straight(panel.full, color=theme.ink, linewidth=1.0, linestyle="--", zorder=1.5)
    if panel.chance is not None:
        straight(panel.chance, color=theme.muted, linewidth=1.0, linestyle=":", zorder=1.5)
    room = ax.get_window_extent().width / ax.figure.dpi
    heading(ax, panel.title, panel.subtitle, "sanity warning" if panel.warning else "", style, room, size)


def heading(ax: Axes, title: str, subtitle: str, warning: str, style: Style, room: float, size: float) -> None:
    """Title, a smaller line below it, and a warning at that line's right end; all within the panel's width."""
    lower = max(SMALLEST, size - 1.2)
    pad = 4 if not (subtitle or warning) else 2 + lower * 1.45
    ax.set_title(plain(shortened(title, size + 0.5, room, bold=True)), loc="left", fontweight="bold", pad=pad)
    left = room - (text_width(warning, lower) + 0.08 if warning else 0)
    offset: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": lower, "va": "bottom"}
    if subtitle:
        ax.annotate(plain(shortened(subtitle, lower, left)), (0, 1), xycoords="axes fraction", ha="left",
                    color=style.theme.muted, **offset)  # fmt: skip
    if warning:
        ax.annotate(warning, (1, 1), xycoords="axes fraction", ha="right", color=style.theme.alarm, **offset)


def limits(ax: Axes, sheet: Sheet, across: bool = False) -> None:
    limit = ax.set_xlim if across else ax.set_ylim
    ends = [v for p in points_of(sheet) for v in (p.y, p.low, p.high) if v is not None]
    if sheet.scale == "unit":
        limit(-0.03, 1.03)
    elif sheet.scale == "log":
        (ax.set_xscale if across else ax.set_yscale)("symlog", linthresh=KL_LINEAR)
        limit(0, max([*ends, 10 * KL_LINEAR]) * 1.3)
    else:
        low, high = min([*ends, -5.0]), max([*ends, 5.0])
        margin = 0.04 * (high - low)
        limit(low - margin, high + margin)
