"""Draws a Sheet: lines over the measured ratio, or rows of points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvcli.analysis.figures import layout, nested
from kvcli.analysis.figures.layout import Entry, Plan, plain, shortened, text_width
from kvcli.analysis.figures.sheets import FALLBACK, MARKS, NOOP, OVER, SIMULATED, Panel, Point, Series, Sheet
from kvcli.analysis.figures.style import LINES, MARKERS, Style, looks
from kvcli.analysis.tables.table import FULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Mapping[str, dict[str, Any]]
"""Per series what matplotlib needs to draw it."""
BANDS_UP_TO = 3
"""More lines than this, and bands hide one another: intervals are drawn as bars."""
APART = 0.0107
"""Between two intervals at most, as a share of the axis."""
OPEN_SIZE, OPEN_EDGE = 1.5, 0.5
"""Hollow and half filled points are larger and have a thinner edge (in points), or the page does not show in them."""
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
    bands = len(series) <= BANDS_UP_TO
    beside = any(len(_whiskered(panel, bands)) > 1 for panel in sheet.panels)
    page = layout.page(
        Plan(
            sheet.title,
            sheet.subtitle + ", intervals moved apart sideways" * beside,
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
    for ax, panel in zip(page.axes, sheet.panels, strict=False):
        _frame(ax, panel, sheet, style)
        depths = _depths(ax, panel) if sheet.keys == "shots" else {}
        for one in panel.series:
            _draw_series(ax, one, drawn[one.key], style, depths)
        _draw_intervals(ax, panel, drawn, bands, widest + 0.04)
    layout.spare(page.axes, len(sheet.panels), columns)
    return page.figure


def _depths(ax: Axes, panel: Panel) -> dict[tuple[str, str], int]:
    """Per point of the panel how many later ones lie on it."""
    points = [(one.key, p) for one in panel.series for p in one.points]
    found = nested.depths(ax, [(p.x, p.y) for _, p in points])
    return {(key, p.asked): depth for (key, p), depth in zip(points, found, strict=True)}


def _draw_series(
    ax: Axes, series: Series, line: dict[str, Any], style: Style, depths: Mapping[tuple[str, str], int]
) -> None:
    """Line and points where they were measured; depths: how many points of later series lie on one."""
    x, y = [p.x for p in series.points], [p.y for p in series.points]
    ax.plot(x, y, color=line["color"], linestyle=line["linestyle"], zorder=3)
    for depth in sorted({depths.get((series.key, p.asked), 0) for p in series.points}):
        mine = [p for p in series.points if depths.get((series.key, p.asked), 0) == depth]
        more = {"markersize": (4.0 if style.width is None else 3.2) + nested.STEP * depth} if depth else {}
        for marks, points in _by_marks(mine).items():
            mark(ax, [p.x for p in points], [p.y for p in points], line["color"], line["marker"], marks, style, **more)


def _draw_intervals(ax: Axes, panel: Panel, drawn: Lines, bands: bool, span: float) -> None:
    """span: measured ratios of the whole axis."""
    whiskered = _whiskered(panel, bands)
    for one in panel.series:
        known = _known(one)
        if known and one.key not in {key for key, _ in whiskered}:
            at, low, high = zip(*((p.x, p.low, p.high) for p in known), strict=True)
            ax.fill_between(at, low, high, color=drawn[one.key]["color"], alpha=0.18, linewidth=0, zorder=2)
    places = apart([p.x for _, p in whiskered], span)
    for (key, p), place in zip(whiskered, places, strict=True):
        if p.low is not None and p.high is not None:
            colour = drawn[key]["color"]
            whiskers(ax, [(place, p.low, p.high)], color=colour, linewidth=0.8, alpha=0.6, zorder=2.5)


def _known(series: Series) -> list[Point]:
    return [p for p in series.points if p.low is not None and p.high is not None]


def _whiskered(panel: Panel, bands: bool) -> list[tuple[str, Point]]:
    """(series, point) of all intervals drawn as bars: a band between points at one ratio would have no width."""
    drawn = [s for s in panel.series if not (bands and len({p.x for p in _known(s)}) > 1)]
    return [(s.key, p) for s in drawn for p in _known(s)]


def apart(x: Sequence[float], span: float) -> list[float]:
    """Places of intervals: in the order of x, each as near to its x as its neighbours let it.

    The least squares of places at least a step apart are an isotonic regression.
    """
    import numpy as np
    from scipy.optimize import isotonic_regression

    if not len(x):
        return []
    steps = min(APART, 0.8 / len(x)) * span * np.arange(len(x))
    order = np.argsort(x, kind="stable")
    found = np.empty(len(x))
    found[order] = isotonic_regression(np.asarray(x, float)[order] - steps).x + steps
    return [float(place) for place in found]


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
    if open_marks(marks):
        look["markersize"] *= OPEN_SIZE
    edge = OPEN_EDGE if open_marks(marks) else 0.9
    ax.plot(x, y, marker=marker, linestyle="none", markeredgewidth=edge, zorder=4, clip_on=False, **look)
    if SIMULATED in marks:
        ring = {**more, "markersize": look["markersize"] + 4}
        ax.plot(
            x, y, marker="o", linestyle="none", markerfacecolor="none", markeredgecolor=colour,
                markeredgewidth=0.6, zorder=4, clip_on=False, **ring)  # fmt: skip


def open_marks(marks: Sequence[str]) -> bool:
    """Whether a point is hollow or half filled."""
    return any(m in marks for m in (OVER, NOOP, FALLBACK))


def marking(marks: Sequence[str], colour: str, style: Style) -> dict[str, Any]:
    if OVER in marks or NOOP in marks:
        return {"color": colour, "markerfacecolor": style.theme.page}
    if FALLBACK in marks:
        return {"color": colour, "fillstyle": "bottom", "markerfacecoloralt": style.theme.page}
    return {"color": colour, "markerfacecolor": colour}


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
        (_line({"color": shades[a], "marker": MARKERS[i % 10], "linestyle": "none"}), a if a == FULL else f"asked: {a}")
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
