"""What is kept: per method and ratio a row of the tokens that stay, layer by layer, and the attention thrown away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcli.analysis.attention.data import Atlas, cell_label
from kvcli.analysis.attention.sheet import THROWN, Sheet, region_legend, short, strip, whole_ticks
from kvcli.analysis.attention.tokens import labels_of, room, token_axes
from kvcli.analysis.figures.style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS_PER_PAGE = 6


def pages(atlas: Atlas, prompt: int) -> list[list[dict[str, Any]]]:
    entries = list(atlas.entries(prompt))
    return [entries[i : i + ROWS_PER_PAGE] for i in range(0, len(entries), ROWS_PER_PAGE)]


def draw_kept(atlas: Atlas, prompt: int, entries: Sequence[dict[str, Any]], look: Style) -> Figure:
    from matplotlib.patches import Patch

    facts, labels = atlas.prompts[prompt], labels_of(atlas, prompt)
    layers = atlas.meta["model"]["layers"]
    title = f"What is kept: {atlas.named(prompt)}, {atlas.model}"
    sheet = Sheet(
        look, title, _note(atlas, prompt, entries, look), len(entries), 1,
        (4.6, min(1.5, max(0.62, 0.07 * layers))), gaps=(0, 0.52), top=0.42,
        bottom=max(0.72, 0.6 + room(labels)), right=2.05,
    )  # fmt: skip
    size, thrown = sheet.size, THROWN[look.theme.name]
    for row, entry in enumerate(entries):
        ax, last = sheet.axes(row, 0), row == len(entries) - 1
        _draw_row(ax, atlas, prompt, entry, sheet)
        if labels is not None and last:
            token_axes(ax, labels, facts["n"], both=False)
        else:
            whole_ticks(ax.xaxis, 6)
            ax.tick_params(labelbottom=last)
        x, y = sheet.place(row, 0)
        beside = sheet.axes_at(x + size[0] + 0.3, y, 1.5, size[1])
        _draw_thrown(beside, entry, layers, look, last=last, first=row == 0)
    region_legend(sheet, [r[0] for r in facts["regions"]], 0.24)
    sheet.legend([Patch(color=c) for c in thrown.values()], [f"from {atlas.queries(name)}" for name in thrown], 0.04)
    return sheet.figure


def _note(atlas: Atlas, prompt: int, entries: Sequence[dict[str, Any]], look: Style) -> str:
    dark = look.theme.name == "dark"
    all_of, none = ("white", "black") if dark else ("black", "white")
    note = f"n = {atlas.prompts[prompt]['n']:,} tokens; {all_of}: held by all KV heads of a layer, {none}: by none, "
    note += "grey: by part of the heads, or part of the tokens under one column"
    if any(entry.get("query") == "agnostic" for entry in entries):
        note += "; agnostic: chosen before the question was known, which is kept whole"
    return note


def columns(share: Any, most: int) -> tuple[Any, int]:
    """([L, at most `most`] means over units of tokens, tokens per unit): nothing kept is lost between two pixels."""
    unit = -(-share.shape[1] // most)
    padded = np.pad(share, ((0, 0), (0, -share.shape[1] % unit)), constant_values=np.nan)
    return np.nanmean(padded.reshape(len(share), -1, unit), -1), unit


def _draw_row(ax: Axes, atlas: Atlas, prompt: int, entry: dict[str, Any], sheet: Sheet) -> None:
    facts, size = atlas.prompts[prompt], sheet.size
    image, unit = columns(atlas.kept(prompt, entry).mean(1), sheet.columns)
    layers = len(image)
    extent = (-0.5, image.shape[1] * unit - 0.5, layers - 0.5, -0.5)
    shades = "Greys_r" if sheet.look.theme.name == "dark" else "Greys"
    ax.imshow(image, cmap=shades, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    ax.set_xlim(-0.5, facts["n"] - 0.5)
    ax.set_ylabel("layer", fontsize=7.5)
    whole_ticks(ax.yaxis, 4)
    for side in ("top", "right"):
        ax.spines[side].set_visible(True)
    strip(ax, facts["regions"], left=False, inches=size)
    flags = f" ({', '.join(entry['flags'])})" if entry["flags"] else ""
    of = " of the context" if entry.get("query") == "agnostic" else ""
    title = f"{short(cell_label(entry), 44)}: {100 * entry['kept']:.1f} %{of} kept{flags}"
    ax.text(0, 1 + 0.14 / size[1], title, transform=ax.transAxes, fontsize=8, fontweight="bold", va="bottom")


def _draw_thrown(ax: Axes, entry: dict[str, Any], layers: int, look: Style, *, last: bool, first: bool) -> None:
    for number, (name, colour) in enumerate(THROWN[look.theme.name].items()):
        shares = [100 * x for x in entry["thrown_by_layer"][name]]
        ax.barh([i - 0.2 + 0.4 * number for i in range(layers)], shares, height=0.4, color=colour)
    ax.set_xlim(0, 100)
    ax.set_ylim(layers - 0.5, -0.5)
    ax.set_yticks([])
    ax.set_xticks([0, 50, 100])
    ax.tick_params(labelbottom=last)
    ax.grid(True, axis="x", color=look.theme.grid, linewidth=0.5)
    ax.set_axisbelow(True)
    if first:
        ax.set_title("attention thrown away (%)", loc="left", fontsize=8, pad=9)
