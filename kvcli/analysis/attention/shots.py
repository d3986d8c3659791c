"""What each shot receives, as a multiple of what evenly spread attention would give it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvcli.analysis.attention.data import Atlas, Floats
from kvcli.analysis.attention.even import even_shots
from kvcli.analysis.attention.sheet import Sheet, columns_of, short, whole_ticks
from kvcli.analysis.attention.times import furthest, times_bar, times_shades
from kvcli.analysis.figures.style import Style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_HEADS = 24
"""Shots up to which each has a panel of layers by heads."""


@dataclass(frozen=True)
class ShotPanel:
    """values [L, shots]: mean over `prompts` prompts of what shots receive, over the mean of the even share."""

    label: str
    prompts: int
    values: Floats


def with_shots(atlas: Atlas) -> list[int]:
    """Groups whose first prompt has shots."""
    groups = range(len(atlas.groups))
    return [g for g in groups if atlas.of(atlas.members(g)[0], "shot_layers").shape[1]]


def shot_panels(atlas: Atlas, queries: str) -> list[ShotPanel]:
    """Of each group with shots; of prompts with another number of shots than its first none."""
    which, found = atlas.meta["sets"].index(queries), []
    for group in with_shots(atlas):
        first, *others = atlas.members(group)
        count = atlas.of(first, "shot_layers").shape[1]
        alike = [first, *(i for i in others if atlas.of(i, "shot_layers").shape[1] == count)]
        mass = np.mean([atlas.of(i, "shot_layers")[which] for i in alike], 0)  # [shots, L]
        even = np.mean([even_shots(atlas, i, queries) for i in alike], 0)
        found.append(ShotPanel(atlas.groups[group]["label"], len(alike), (mass / even[:, None]).T))
    return found


def _counted(panels: Sequence[ShotPanel]) -> str:
    low, high = (pick(panel.prompts for panel in panels) for pick in (min, max))
    return f"n = {low}{f' to {high}' * (low != high)} prompt{'s' * (high != 1)} per panel"


def draw_shots(atlas: Atlas, queries: str, look: Style) -> Figure:
    """Shots by layers, a panel per group."""
    panels = shot_panels(atlas, queries)
    columns = columns_of(len(panels))
    layers = panels[0].values.shape[0]
    top = furthest([panel.values for panel in panels])
    sheet = Sheet(
        look, f"Attention per shot and layer, times evenly spread attention: {atlas.model}",
        f"{atlas.queries(queries)}, mean over heads and prompts; log scale, 1: evenly spread; {_counted(panels)}",
        -(-len(panels) // columns),
        columns, (2.4, min(2.2, max(0.9, 0.06 * layers))), gaps=(0.5, 0.8), top=0.34, bottom=0.5, right=0.95,
    )  # fmt: skip
    room = sheet.size[0] + sheet.gaps[0] if columns > 1 else sheet.width - sheet.left - 0.1
    for at, panel in enumerate(panels):
        ax = sheet.axes(*divmod(at, columns))
        image = ax.imshow(panel.values, aspect="auto", interpolation="nearest", **times_shades(top, look))
        n = f" (n = {panel.prompts} prompt{'s' * (panel.prompts != 1)})"
        title = short(panel.label, max(8, int(room / 0.083) - len(n))) + n
        ax.set_title(title, loc="left", fontweight="bold", pad=4, fontsize=8)
        ax.set_xlabel("shot")
        ax.set_ylabel("layer")
        whole_ticks(ax.xaxis, 6)
        whole_ticks(ax.yaxis, 6)
    x, y = sheet.place(0, columns - 1)
    bar = sheet.figure.colorbar(image, cax=sheet.axes_at(x + sheet.size[0] + 0.12, y, 0.1, sheet.size[1]))
    bar.outline.set_linewidth(0.5)
    times_bar(bar, top)
    return sheet.figure


def with_heads(atlas: Atlas) -> list[int]:
    """Prompts that are drawn shot by shot."""
    return [i for i in atlas.shown if 0 < atlas.of(i, "shot_mass").shape[1] <= MOST_HEADS][:3]


def draw_shot_heads(atlas: Atlas, queries: str, look: Style) -> Figure:
    """Layers by heads of each shot; a row of panels or more per prompt."""
    which, prompts = atlas.meta["sets"].index(queries), with_heads(atlas)
    values = {
        i: atlas.of(i, "shot_mass")[which] / even_shots(atlas, i, queries)[:, None, None] for i in prompts
    }  # [shots, L, H]
    columns = min(6, max(map(len, values.values())))
    starts, rows = [], 0
    for each in values.values():
        starts.append(rows)
        rows += -(-len(each) // columns)
    top = furthest(list(values.values()))
    sheet = Sheet(
        look, f"Attention per shot, times evenly spread attention, layer by head: {atlas.model}",
        f"{atlas.queries(queries)}; log scale, 1: evenly spread; n = 1 prompt per row of panels", rows, columns,
        (1.0, min(1.6, max(0.8, 0.05 * values[prompts[0]].shape[1]))), gaps=(0.2, 0.62), top=0.5, bottom=0.5, right=0.8,
    )  # fmt: skip
    for prompt, start in zip(prompts, starts, strict=True):
        x, y = sheet.place(start, 0)
        name = short(atlas.named(prompt), int((sheet.width - sheet.left) / 0.085))
        sheet.text(x, y - 0.24, name, fontsize=8.5, fontweight="bold", va="bottom")
        for shot, panel in enumerate(values[prompt]):
            row, column = start + shot // columns, shot % columns
            ax = sheet.axes(row, column)
            image = ax.imshow(panel, aspect="auto", interpolation="nearest", **times_shades(top, look))
            ax.set_title(f"shot {shot}", loc="left", fontsize=7.5, pad=2)
            whole_ticks(ax.xaxis, 4)
            whole_ticks(ax.yaxis, 4)
            ax.tick_params(labelleft=column == 0, labelbottom=shot + columns >= len(values[prompt]))
            if column == 0:
                ax.set_ylabel("layer", fontsize=7.5)
            if row == rows - 1:
                ax.set_xlabel("head", fontsize=7.5)
    x, y = sheet.place(0, columns - 1)
    bar = sheet.figure.colorbar(image, cax=sheet.axes_at(x + sheet.size[0] + 0.12, y, 0.1, sheet.size[1]))
    bar.outline.set_linewidth(0.5)
    times_bar(bar, top)
    return sheet.figure
