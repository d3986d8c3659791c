"""Figures of attention: maps with their regions; which others there are, and how they become files.

Laid out in inches from the top, so that nothing can overlap; drawn with matplotlib's Figure directly (no pyplot).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcli.analysis.attention.curves import draw_curves
from kvcli.analysis.attention.data import Atlas, Floats
from kvcli.analysis.attention.grids import draw_grids, measures, regions, regions_against_even
from kvcli.analysis.attention.kept import draw_kept, pages
from kvcli.analysis.attention.sheet import REGION_COLOURS, SHADES, Sheet, columns_of, region_legend, short, strip
from kvcli.analysis.attention.shots import draw_shot_heads, draw_shots, with_heads, with_shots
from kvcli.analysis.attention.tokens import fitting, labels_of, room, token_axes
from kvcli.analysis.figures.style import Style, style
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
SCREEN = style()
DECADES = 4
"""Of the logarithmic colour scale, below the largest value."""


def draw(
    atlas: Atlas, folder: Path, formats: Sequence[str] = ("png", "pdf"), queries: str = "all", look: Style = SCREEN
) -> list[Path]:
    """Writes every figure the data have something for, and returns the files. queries: whose attention is measured."""
    check_formats(formats)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in figures(atlas, queries, look):
        written += _saved(make, folder / name, formats, look)
    return written


def check_formats(formats: Sequence[str]) -> None:
    """Raises KvcliError for one that cannot be written."""
    for name in formats:
        if name not in FORMATS:
            raise KvcliError(f"unknown format '{name}'", given=f"--format {name}", fix=",".join(FORMATS))


def figures(atlas: Atlas, queries: str, look: Style = SCREEN) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """(file name without ending, what makes it)."""
    yield "map", partial(_maps, atlas, "map_mean", look)
    if any(atlas.prompts[i]["block"] > 1 for i in atlas.shown):
        yield "map-max", partial(_maps, atlas, "map_max", look)
    spread, parts = measures(atlas, queries), regions(atlas, queries)
    yield "measures", partial(draw_grids, atlas, atlas.measured(queries), spread, "Spread of attention", look)
    whose = atlas.queries(queries)
    yield "regions", partial(draw_grids, atlas, whose, parts, "Attention per region", look)
    against, title = regions_against_even(atlas, queries), "Attention per region, times evenly spread attention"
    yield "regions-even", partial(draw_grids, atlas, whose, against, title, look)
    if with_shots(atlas):
        yield "shots", partial(draw_shots, atlas, queries, look)
    if with_heads(atlas):
        yield "shots-heads", partial(draw_shot_heads, atlas, queries, look)
    yield "curves", partial(draw_curves, atlas, queries, look)
    for prompt in atlas.shown:
        every = pages(atlas, prompt)
        for number, page in enumerate(every, 1):
            label = re.sub(r"[^\w.-]+", "-", atlas.named(prompt).replace(", sample ", "-"))
            name = f"kept-{label}" + (f"-{number}" if len(every) > 1 else "")
            yield name, partial(draw_kept, atlas, prompt, page, look)


def _saved(make: Callable[[], Figure], path: Path, formats: Sequence[str], look: Style) -> list[Path]:
    import matplotlib as mpl

    with mpl.rc_context(look.rc()):
        figure = make()
        dpi = max(look.dpi, figure.dpi)
        written = []
        for name in formats:
            # Dates and versions out of the files: the same data give the same bytes.
            stamp = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[name]
            written.append(path.with_name(f"{path.name}.{name}"))
            figure.savefig(written[-1], dpi=dpi, metadata=stamp)
    return written


def _maps(atlas: Atlas, name: str, look: Style) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    shown = atlas.shown
    columns = columns_of(len(shown))
    side = {1: 4.6, 2: 3.1}.get(columns, 2.7)
    labels = labels_of(atlas, shown[0]) if len(shown) == 1 else None
    blocks = any(atlas.prompts[i]["block"] > 1 for i in shown)
    value = "largest probability in a block" if name == "map_max" else "probability"
    value = "mean probability in a block" if blocks and name == "map_mean" else value
    title = f"Attention of {atlas.whose()}: {atlas.model}"
    facts = f"{value}, log scale; rows: queries, columns: keys; boxes: regions; n = 1 prompt per panel"
    if labels is not None:
        facts += f", {atlas.prompts[shown[0]]['n']} tokens"
    sheet = Sheet(
        look, title, facts, -(-len(shown) // columns), columns, (side, side), gaps=(0.66, 1.15), top=0.5,
        bottom=0.5 + room(labels) if labels else 0.78, left=0.45 + room(labels) if labels else 0.7, right=0.85,
        square=True,
    )  # fmt: skip
    side = sheet.size[0]
    top = max(float(np.nanmax(atlas.of(i, name))) for i in shown)
    scale = LogNorm(top / 10**DECADES, top)
    for at, prompt in enumerate(shown):
        ax, image = sheet.axes(*divmod(at, columns)), atlas.of(prompt, name)
        sheet.sharp(len(image))
        _draw_map(ax, atlas, prompt, image, scale, sheet)
    x, y = sheet.place(0, columns - 1)
    bar = sheet.figure.colorbar(
        ScalarMappable(scale, SHADES[look.theme.name]), cax=sheet.axes_at(x + side + 0.15, y, 0.12, min(side, 2.6)),
        extend="min",
    )  # fmt: skip
    bar.outline.set_linewidth(0.5)
    region_legend(sheet, [r[0] for i in shown for r in atlas.prompts[i]["regions"]], 0.08)
    return sheet.figure


def _draw_map(ax: Axes, atlas: Atlas, prompt: int, image: Floats, scale: Any, sheet: Sheet) -> None:
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    facts, side = atlas.prompts[prompt], sheet.size[0]
    n, block = facts["n"], facts["block"]
    edge, theme = len(image) * block - 0.5, sheet.look.theme
    shades = mpl.colormaps[SHADES[theme.name]].with_extremes(bad=theme.page)
    drawn = np.where(np.isnan(image), np.nan, np.maximum(image, scale.vmin))
    ax.imshow(drawn, cmap=shades, norm=scale, extent=(-0.5, edge, edge, -0.5), interpolation="nearest", aspect="auto")
    ax.set_xlim(-0.5, n - 0.5)
    ax.set_ylim(n - 0.5, -0.5)
    strip(ax, facts["regions"], left=True, inches=(side, side))
    for label, start, end in facts["regions"]:
        box = Rectangle((start - 0.5, start - 0.5), end - start, end - start, fill=False, linewidth=0.9)
        box.set_edgecolor(REGION_COLOURS[label.partition(" ")[0]])
        ax.add_patch(box)
    _name_regions(ax, facts["regions"], n, side)
    each = f" in blocks of {block}" if block > 1 else ""
    ax.text(
        0, 1 + 0.3 / side, short(atlas.named(prompt), int(side * 13)), transform=ax.transAxes, fontweight="bold",
        fontsize=8.5, va="bottom",
    )  # fmt: skip
    labels = fitting(labels_of(atlas, prompt), side)
    token_axes(ax, labels, n, both=True)
    if labels is None:
        ax.set_xlabel(f"{n:,} tokens{each}", fontsize=7.5)


def _name_regions(ax: Axes, regions: Sequence[Any], n: int, side: float) -> None:
    """Names above the band, where there is room for them; all shots in a row together."""
    runs: list[list[Any]] = []
    for label, start, end in regions:
        kind = label.partition(" ")[0]
        if runs and runs[-1][0] == kind:
            runs[-1][2] = end
        else:
            runs.append([kind, start, end])
    for kind, start, end in runs:
        name = "shots" if kind == "shot" else kind
        if (end - start) / n * side > 0.075 * len(name):
            middle, above = (start + end - 1) / 2, 1 + 0.125 / side
            ax.text(middle, above, name, transform=ax.get_xaxis_transform(), fontsize=6.5, ha="center", va="bottom")
