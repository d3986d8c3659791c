"""Draws a Sheet: lines over the measured ratio, or rows of points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kvcli.analysis.figures import layout
from kvcli.analysis.figures.layout import Entry, Plan, plain, shortened, text_width
from kvcli.analysis.figures.sheets import FALLBACK, MARKS, NOOP, OVER, SIMULATED, Panel, Point, Series, Sheet
from kvcli.analysis.figures.style import LINES, MARKERS, Style, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Mapping[str, dict[str, Any]]
"""Per series what matplotlib needs to draw it."""
BANDS_UP_TO = 3
"""More lines than this, and bands hide one another: intervals are drawn as bars."""
DODGE = 0.024
"""Inches between points at equal x."""
ALIKE = 0.02
"""Measured ratios this near are drawn side by side."""
KL_LINEAR = 1e-3
"""Below it the axis of the logarithmic scale is linear, so that 0 has a place."""


def draw(sheet: Sheet, style: Style) -> Figure:
    return draw_rows(sheet, style) if sheet.layout == "rows" else draw_lines(sheet, style)


# --- lines ------------------------------------------------------------------------------------------------------------


def draw_lines(sheet: Sheet, style: Style) -> Figure:
    series = _every(sheet)
    drawn = _lines(sheet, style, series)
    rows, columns = layout.grid_shape(len(sheet.panels), style.most_columns)
    entries = [*((_line(drawn[key]), plain(_cut(label, style))) for key, label in series.items()),
               *_references(sheet, style)]  # fmt: skip
    page = layout.page(
        Plan(
            sheet.title,
            sheet.subtitle,
            rows,
            columns,
            sheet.x,
            sheet.y,
            entries,
            above=_above(sheet.panels, style),
            left=0.42 * style.size / 8,
        ),
        style,
    )
    widest = max([1.0, *(p.x for p in _points(sheet))])
    for ax in page.axes:
        ax.set_xlim(-0.02, widest + 0.02)  # beyond 1 only where a method stores more than the full cache
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        _limits(ax, sheet)
    dodges = _dodges(sheet, list(series), page.axes[0].get_window_extent().width / page.figure.dpi, widest + 0.04)
    for ax, panel in zip(page.axes, sheet.panels, strict=False):
        _frame(ax, panel, sheet, style)
        for one in panel.series:
            _draw_series(ax, one, drawn[one.key], style, dodges.get(one.key), len(series) <= BANDS_UP_TO)
    layout.spare(page.axes, len(sheet.panels), columns)
    return page.figure


def _draw_series(
    ax: Axes, series: Series, line: dict[str, Any], style: Style, dodge: float | None, bands: bool
) -> None:
    from matplotlib.transforms import ScaledTranslation

    x, y = [p.x for p in series.points], [p.y for p in series.points]
    where = ax.transData
    if dodge and not bands:
        where = ax.transData + ScaledTranslation(dodge, 0, ax.figure.dpi_scale_trans)
    ax.plot(x, y, color=line["color"], linestyle=line["linestyle"], zorder=3, transform=where)
    known = [(p.x, p.low, p.high) for p in series.points if p.low is not None and p.high is not None]
    if bands and len(known) > 1:
        at, low, high = zip(*known, strict=True)
        ax.fill_between(at, low, high, color=line["color"], alpha=0.18, linewidth=0, zorder=2)
    else:
        whiskers(ax, known, color=line["color"], linewidth=0.8, alpha=0.6, zorder=2.5, transform=where)
    for marks, points in _by_marks(series.points).items():
        mark(
            ax,
            [p.x for p in points],
            [p.y for p in points],
            line["color"],
            line["marker"],
            marks,
            style,
            transform=where,
        )


def whiskers(ax: Axes, ends: Sequence[tuple[float, float, float]], across: bool = False, **more: Any) -> None:
    """Intervals (place, low, high) as one broken line; across: along the x axis."""
    gap = float("nan")
    places = [v for place, _, _ in ends for v in (place, place, gap)]
    values = [v for _, low, high in ends for v in (low, high, gap)]
    if ends:
        ax.plot(*((values, places) if across else (places, values)), **more)


def _by_marks(points: Sequence[Point]) -> dict[tuple[str, ...], list[Point]]:
    found: dict[tuple[str, ...], list[Point]] = {}
    for p in points:
        found.setdefault(p.marks, []).append(p)
    return found


def mark(
    ax: Axes, x: Sequence[float], y: Sequence[float], colour: str, marker: str, marks: Sequence[str], style: Style,
    **more: Any,
) -> None:  # fmt: skip
    """Points: hollow over budget or noop, half filled for a fallback, ringed where memory is simulated."""
    look = {"markersize": 4.0 if style.width is None else 3.2, **marking(marks, colour, style), **more}
    ax.plot(x, y, marker=marker, linestyle="none", markeredgewidth=0.9, zorder=4, clip_on=False, **look)
    if SIMULATED in marks:
        ring = {**more, "markersize": look["markersize"] + 4}
        ax.plot(
            x, y, marker="o", linestyle="none", markerfacecolor="none", markeredgecolor=colour,
                markeredgewidth=0.6, zorder=4, clip_on=False, **ring)  # fmt: skip


def marking(marks: Sequence[str], colour: str, style: Style) -> dict[str, Any]:
    if OVER in marks or NOOP in marks:
        return {"color": colour, "markerfacecolor": style.theme.page}
    if FALLBACK in marks:
        return {"color": colour, "fillstyle": "bottom", "markerfacecoloralt": style.theme.page}
    return {"color": colour, "markerfacecolor": colour}


def _dodges(sheet: Sheet, keys: Sequence[str], inches: float, span: float) -> dict[str, float]:
    """How far each line is moved to the right, in inches, where points of several share an x."""
    if not any(_share_x(panel) for panel in sheet.panels):
        return {}
    groups = _groups(sorted({p.x for p in _points(sheet)}))
    gaps = [b[0] - a[-1] for a, b in pairwise(groups)]
    room = 0.4 * min([*gaps, 1.0]) * inches / span
    step = min(DODGE, room / max(1, len(keys) - 1))
    return {key: (place - (len(keys) - 1) / 2) * step for place, key in enumerate(keys)}


def _share_x(panel: Panel) -> bool:
    found = sorted((p.x, s.key) for s in panel.series for p in s.points)
    return any(b[0] - a[0] < ALIKE and a[1] != b[1] for a, b in pairwise(found))


def _groups(values: Sequence[float]) -> list[list[float]]:
    found: list[list[float]] = []
    for value in values:
        if found and value - found[-1][-1] < ALIKE:
            found[-1].append(value)
        else:
            found.append([value])
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


def draw_rows(sheet: Sheet, style: Style) -> Figure:
    """A row per method, a panel per task; requested sizes stand one below the other."""
    series = _every(sheet)
    asked = sheet.asked
    single = len(asked) == 1
    drawn = _lines(sheet, style, series)
    shades = dict(zip(asked, ordered(len(asked), style), strict=True))
    longest = 1.9 * style.size / 8
    names = [plain(shortened(label, style.size - 0.5, longest)) for label in series.values()]
    left = max(text_width(name, style.size - 0.5) for name in names) + 0.14
    tall = max(0.6, len(series) * (0.125 + 0.045 * len(asked)) * style.size / 8 + 0.1)
    rows, columns = layout.grid_shape(len(sheet.panels), style.most_columns)
    entries: list[Entry] = [] if single else [
        (_line({"color": shades[a], "marker": MARKERS[i % 10], "linestyle": "none"}), f"asked: {a}")
        for i, a in enumerate(asked)
    ]  # fmt: skip
    subtitle = f"{sheet.subtitle}, asked: {asked[0]}" if single else sheet.subtitle
    page = layout.page(
        Plan(
            sheet.title,
            subtitle,
            rows,
            columns,
            sheet.y,
            "",
            [*entries, *_references(sheet, style)],
            left=left,
            panel=(None, tall),
            gap=0.22,
            above=_above(sheet.panels, style),
        ),
        style,
    )
    places = {key: place for place, key in enumerate(series)}
    for ax in page.axes:
        ax.set_ylim(len(series) - 0.5, -0.5)
        ax.set_yticks(range(len(series)), names)
        ax.tick_params(axis="y", length=0)
        _limits(ax, sheet, across=True)
    for ax, panel in zip(page.axes, sheet.panels, strict=False):
        _frame(ax, panel, sheet, style, across=True)
        for one in panel.series:
            _draw_row(ax, one, places[one.key], asked, shades, drawn[one.key], style)
    layout.spare(page.axes, len(sheet.panels), columns)
    return page.figure


def _draw_row(
    ax: Axes, series: Series, place: int, asked: Sequence[str], shades: Mapping[str, str], line: dict[str, Any],
    style: Style,
) -> None:  # fmt: skip
    """One size: the method's own look. Several: a colour and marker per size."""
    for p in series.points:
        turn = asked.index(p.asked)
        at = place + (turn - (len(asked) - 1) / 2) * 0.62 / len(asked)
        colour = line["color"] if len(asked) == 1 else shades[p.asked]
        marker = line["marker"] if len(asked) == 1 else MARKERS[turn % len(MARKERS)]
        if p.low is not None and p.high is not None:
            whiskers(ax, [(at, p.low, p.high)], across=True, color=colour, linewidth=0.9, alpha=0.7, zorder=2.5)
        mark(ax, [p.y], [at], colour, marker, p.marks, style, markersize=3.4 * style.size / 8)


# --- shared -----------------------------------------------------------------------------------------------------------


def _every(sheet: Sheet) -> dict[str, str]:
    """Series key -> label, in the order of the first panel that has it."""
    return {s.key: s.label for panel in sheet.panels for s in panel.series}


def _points(sheet: Sheet) -> list[Point]:
    return [p for panel in sheet.panels for s in panel.series for p in s.points]


def _lines(sheet: Sheet, style: Style, series: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    if sheet.keys != "shots":
        return {key: style.line(look) for key, look in looks(series).items()}
    colours = ordered(len(series), style)
    return {
        key: {"color": colours[i], "marker": MARKERS[i % len(MARKERS)], "linestyle": LINES[i // len(MARKERS)]}
        for i, key in enumerate(series)
    }


def ordered(count: int, style: Style) -> list[str]:
    """Colours of an ordered set, from little to much."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    low, high = (0.0, 0.8) if style.theme.name == "light" else (0.35, 1.0)
    shades = mpl.colormaps["plasma"]
    return [to_hex(shades(low + (high - low) * i / max(1, count - 1))) for i in range(count)]


def _line(line: dict[str, Any]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **line)


def _cut(label: str, style: Style) -> str:
    return shortened(label, style.size, 2.6)


def _references(sheet: Sheet, style: Style) -> list[Entry]:
    """What the reference lines are, and how marked points differ."""
    theme = style.theme
    entries: list[tuple[dict[str, Any], str, bool]] = [
        ({"color": theme.ink, "linestyle": "--"}, "full", any(p.full is not None for p in sheet.panels)),
        ({"color": theme.muted, "linestyle": ":"}, "chance", any(p.chance is not None for p in sheet.panels)),
    ]
    entries += mark_entries({m for p in _points(sheet) for m in p.marks}, style)
    return [(_line(line), label) for line, label, shown in entries if shown]


def mark_entries(there: set[str], style: Style) -> list[tuple[dict[str, Any], str, bool]]:
    base: dict[str, Any] = {"marker": "o", "linestyle": "none"}
    hollow = " or ".join(m for m in MARKS[:2] if m in there)
    ring = {"color": style.theme.muted, "markerfacecolor": "none", "markersize": 8, "markeredgewidth": 0.6}
    return [
        ({**base, **marking([OVER], style.theme.muted, style)}, f"hollow: {hollow}", bool(hollow)),
        ({**base, **marking([FALLBACK], style.theme.muted, style)}, "half: fallback", FALLBACK in there),
        ({**base, **ring}, "ring: memory not freed (simulated)", SIMULATED in there),
    ]


def _above(panels: Sequence[Panel], style: Style) -> float:
    return (0.36 if any(p.subtitle or p.warning for p in panels) else 0.24) * style.size / 8


def _frame(ax: Axes, panel: Panel, sheet: Sheet, style: Style, across: bool = False) -> None:
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
    lower = size - 1.2
    pad = 2 if not (subtitle or warning) else 2 + lower * 1.45
    ax.set_title(plain(shortened(title, size + 0.5, room, bold=True)), loc="left", fontweight="bold", pad=pad)
    left = room - (text_width(warning, lower) + 0.08 if warning else 0)
    offset: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": lower, "va": "bottom"}
    if subtitle:
        ax.annotate(plain(shortened(subtitle, lower, left)), (0, 1), xycoords="axes fraction", ha="left",
                    color=style.theme.muted, **offset)  # fmt: skip
    if warning:
        ax.annotate(warning, (1, 1), xycoords="axes fraction", ha="right", color=style.theme.alarm, **offset)


def _limits(ax: Axes, sheet: Sheet, across: bool = False) -> None:
    limit = ax.set_xlim if across else ax.set_ylim
    ends = [v for p in _points(sheet) for v in (p.y, p.low, p.high) if v is not None]
    if sheet.scale == "unit":
        limit(-0.03, 1.03)
    elif sheet.scale == "log":
        (ax.set_xscale if across else ax.set_yscale)("symlog", linthresh=KL_LINEAR)
        limit(0, max([*ends, 10 * KL_LINEAR]) * 1.3)
    else:
        low, high = min([*ends, -5.0]), max([*ends, 5.0])
        margin = 0.04 * (high - low)
        limit(low - margin, high + margin)
