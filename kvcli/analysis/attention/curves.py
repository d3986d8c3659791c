"""Cumulative attention: the share of it that the most attended tokens hold, beside that of evenly spread attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcli.analysis.attention.data import Atlas
from kvcli.analysis.attention.even import even_curves
from kvcli.analysis.attention.sheet import Sheet, legend_columns
from kvcli.analysis.figures.style import Style, looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVEN = "evenly spread attention"


@dataclass(frozen=True)
class Curve:
    """A line: `low` and `high` over the prompts, None for a single one."""

    label: str
    y: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None


@dataclass(frozen=True)
class CurvePanel:
    """even: evenly spread attention, mean over the groups."""

    title: str
    subtitle: str
    x: tuple[float, ...]
    lines: tuple[Curve, ...]
    even: tuple[float, ...]


CURVE_TITLES = (
    ("all tokens", "share of all attention"),
    ("without the first {sinks}", "renormalised: share of the others'"),
    ("without the first {sinks}", "not renormalised: share of all"),
)


def curve_panels(atlas: Atlas, queries: str) -> list[CurvePanel]:
    """The cumulative curves as they are drawn, in percent: mean over layers and heads, then over prompts."""
    which, stack = atlas.meta["sets"].index(queries), np.asarray(atlas.arrays["curves"]).astype(float)
    x = tuple(np.linspace(0, 100, stack.shape[-1]).tolist())
    panels = []
    for number, (title, subtitle) in enumerate(CURVE_TITLES):
        lines, even = [], []
        for group, facts in enumerate(atlas.groups):
            every = 100 * stack[atlas.members(group), which, number].mean(1)  # [prompts, points]
            several = len(every) > 1
            low, high = (tuple(every.min(0).tolist()), tuple(every.max(0).tolist())) if several else (None, None)
            flat = [even_curves(atlas, i, queries, stack.shape[-1])[number] for i in atlas.members(group)]
            even.append(100 * np.mean(flat, 0))
            lines.append(Curve(facts["label"], tuple(every.mean(0).tolist()), low, high))
        panels.append(
            CurvePanel(
                title.format(sinks=atlas.meta["sinks"]), subtitle, x, tuple(lines), tuple(np.mean(even, 0).tolist())
            )
        )
    return panels


def draw_curves(atlas: Atlas, queries: str, look: Style) -> Figure:
    from matplotlib.lines import Line2D

    panels = curve_panels(atlas, queries)
    facts = f"attention received from {atlas.queries(queries)}, mean over layers, heads and prompts; {atlas.counted()}"
    bands = any(line.low for panel in panels for line in panel.lines)
    facts += "; bands: smallest to largest prompt" if bands else ""
    labels = [line.label for line in panels[0].lines]
    named = [*labels, EVEN]
    size, gaps = (1.95, 1.8), (0.3, 0.0)
    rows = -(-len(named) // legend_columns(named, len(panels) * (size[0] + gaps[0])))
    sheet = Sheet(
        look, f"Cumulative attention: {atlas.model}", facts, 1, len(panels), size, gaps=gaps, top=0.4,
        bottom=0.55 + 0.18 * rows,
    )  # fmt: skip
    found = looks(labels)
    lines = [{**look.line(found[label]), "marker": ""} for label in labels]
    reference: dict[str, Any] = {"color": look.theme.muted, "linestyle": "-", "linewidth": 0.9}
    for number, panel in enumerate(panels):
        ax = sheet.axes(0, number)
        ax.grid(True, color=look.theme.grid, linewidth=0.5)
        ax.plot(panel.x, panel.even, **reference)
        for line, drawn in zip(panel.lines, lines, strict=True):
            ax.plot(panel.x, line.y, **drawn)
            if line.low and line.high:
                ax.fill_between(panel.x, line.low, line.high, color=drawn["color"], alpha=0.15, linewidth=0)
        ax.set_xlim(0, 100)
        ax.set_ylim(0, 102)
        ax.set_title(panel.title, loc="left", fontweight="bold", pad=13)
        ax.text(0, 1.02, panel.subtitle, transform=ax.transAxes, fontsize=7, color=look.theme.muted, va="bottom")
        ax.set_xlabel("top tokens (%)")
        if number:
            ax.set_yticklabels([])
        else:
            ax.set_ylabel("attention (%)")
    sheet.legend([Line2D([], [], **drawn) for drawn in [*lines, reference]], named, 0.05)
    return sheet.figure
