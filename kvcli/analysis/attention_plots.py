"""Figures of attention: maps with their regions, grids of measures, cumulative curves, what methods keep.

Laid out in inches from the top, so that nothing can overlap; drawn with matplotlib's Figure directly (no pyplot).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcli.analysis.attention import Atlas, Floats, cell_label
from kvcli.analysis.attention_grids import draw_curves, draw_grids, draw_shots, measures, regions
from kvcli.analysis.attention_sheet import REGION_COLOURS, SHADES, Sheet, columns_of, region_legend, short, strip
from kvcli.analysis.figures.style import style
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
STYLE = style().rc()
LABELLED = 40
"""Tokens up to which they are written at the axes."""
DECADES = 4
"""Of the logarithmic colour scale, below the largest value."""
ROWS_PER_PAGE = 6
WIDEST = 1600
"""Columns of an image; longer prompts are averaged."""


def draw(atlas: Atlas, folder: Path, formats: Sequence[str] = ("png", "pdf"), queries: str = "all") -> list[Path]:
    """Writes every figure the data have something for, and returns the files. queries: whose attention is measured."""
    check_formats(formats)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in figures(atlas, queries):
        written += _saved(make, folder / name, formats)
    return written


def check_formats(formats: Sequence[str]) -> None:
    """Raises KvcliError for one that cannot be written."""
    for name in formats:
        if name not in FORMATS:
            raise KvcliError(f"unknown format '{name}'", given=f"--format {name}", fix=",".join(FORMATS))


def figures(atlas: Atlas, queries: str) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """(file name without ending, what makes it)."""
    yield "map", lambda: _maps(atlas, "map_mean")
    if any(atlas.prompts[i]["block"] > 1 for i in atlas.shown):
        yield "map-max", lambda: _maps(atlas, "map_max")
    yield "measures", lambda: draw_grids(atlas, queries, measures(atlas, queries), "Spread of attention")
    yield "regions", lambda: draw_grids(atlas, queries, regions(atlas, queries), "Attention per region")
    with_shots = [i for i in atlas.shown if atlas.of(i, "shot_mass").shape[1]]
    if with_shots:
        yield "shots", lambda: draw_shots(atlas, queries, with_shots)
    yield "curves", lambda: draw_curves(atlas, queries)
    for prompt in atlas.shown:
        entries = list(atlas.entries(prompt))
        pages = [entries[i : i + ROWS_PER_PAGE] for i in range(0, len(entries), ROWS_PER_PAGE)]
        for number, page in enumerate(pages, 1):
            label = re.sub(r"[^\w.-]+", "-", atlas.named(prompt).replace(", sample ", "-"))
            name = f"kept-{label}" + (f"-{number}" if len(pages) > 1 else "")
            yield name, lambda prompt=prompt, page=page: _kept(atlas, prompt, page)  # type: ignore[misc]


def _saved(make: Callable[[], Figure], path: Path, formats: Sequence[str]) -> list[Path]:
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = make()
        written = []
        for name in formats:
            # Dates and versions out of the files: the same data give the same bytes.
            stamp = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[name]
            written.append(path.with_name(f"{path.name}.{name}"))
            figure.savefig(written[-1], dpi=200, metadata=stamp)
    return written


def _maps(atlas: Atlas, name: str) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    shown = atlas.shown
    columns = columns_of(len(shown))
    side = {1: 4.6, 2: 3.1}.get(columns, 2.45)
    labelled = len(shown) == 1 and _labels(atlas, shown[0]) is not None
    blocks = any(atlas.prompts[i]["block"] > 1 for i in shown)
    value = "largest probability in a block" if name == "map_max" else "probability"
    value = "mean probability in a block" if blocks and name == "map_mean" else value
    title = f"Attention of {atlas.whose()}: {atlas.model}"
    facts = f"{value}, log scale; rows: queries, columns: keys; boxes: regions; n = 1 prompt per panel"
    if labelled:
        facts += f", {atlas.prompts[shown[0]]['n']} tokens"
    longest = max((len(label) for label in _labels(atlas, shown[0]) or ()), default=0) if labelled else 0
    sheet = Sheet(
        title, facts, -(-len(shown) // columns), columns, (side, side), gaps=(0.66, 1.15), top=0.5,
        bottom=0.5 + 0.062 * longest if labelled else 0.78, left=0.45 + 0.062 * longest if labelled else 0.7,
        right=0.85,
    )  # fmt: skip
    top = max(float(np.nanmax(atlas.of(i, name))) for i in shown)
    scale = LogNorm(top / 10**DECADES, top)
    for at, prompt in enumerate(shown):
        ax = sheet.axes(*divmod(at, columns))
        _draw_map(ax, atlas, prompt, atlas.of(prompt, name), scale, side)
    x, y = sheet.place(0, columns - 1)
    bar = sheet.figure.colorbar(
        ScalarMappable(scale, SHADES), cax=sheet.axes_at(x + side + 0.15, y, 0.12, min(side, 2.6)), extend="min"
    )
    bar.outline.set_linewidth(0.5)
    region_legend(sheet, [r[0] for i in shown for r in atlas.prompts[i]["regions"]], 0.08)
    return sheet.figure


def _draw_map(ax: Axes, atlas: Atlas, prompt: int, image: Floats, scale: Any, side: float) -> None:
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    facts = atlas.prompts[prompt]
    n, block = facts["n"], facts["block"]
    edge = len(image) * block - 0.5
    shades = mpl.colormaps[SHADES].with_extremes(bad="white")
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
    _token_axes(ax, _labels(atlas, prompt), n, both=True)
    if _labels(atlas, prompt) is None:
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


def _labels(atlas: Atlas, prompt: int) -> list[str] | None:
    """The tokens as they are written at an axis; None where they are too many or must not be shown."""
    tokens = atlas.prompts[prompt]["tokens"]
    if tokens is None or len(tokens) > LABELLED:
        return None
    return [short(visible(token), 14) for token in tokens]


def visible(token: str) -> str:
    """A token with its white space seen, and a mark for one that stands for no text."""
    return token.replace("\n", "↵").replace("\t", "→").removeprefix(" ") or ("␣" if token else "∅")


def _token_axes(ax: Axes, labels: Sequence[str] | None, n: int, *, both: bool) -> None:
    if both:
        ax.tick_params(axis="y", pad=9)  # beside the band
    if labels is None:
        ax.locator_params(axis="both" if both else "x", nbins=5, integer=True)
        return
    ax.set_xticks(range(n), labels, rotation=90, fontsize=5.5)
    if both:
        ax.set_yticks(range(n), labels, fontsize=5.5)
    ax.tick_params(length=1.5)


def _kept(atlas: Atlas, prompt: int, entries: Sequence[dict[str, Any]]) -> Figure:
    """A row per method: share of KV heads that hold each token, layer by layer; the attention that is thrown away."""
    from matplotlib.patches import Patch

    facts, labels = atlas.prompts[prompt], _labels(atlas, prompt)
    layers = atlas.meta["model"]["layers"]
    size = (4.6, min(1.5, max(0.62, 0.07 * layers)))
    title = f"What is kept: {atlas.named(prompt)}, {atlas.model}"
    note = f"n = {facts['n']:,} tokens; dark: held by all KV heads of a layer, white: by none"
    sheet = Sheet(
        title, note, len(entries), 1, size, gaps=(0, 0.52), top=0.42, bottom=1.1 if labels else 0.72, right=2.0,
    )  # fmt: skip
    for row, entry in enumerate(entries):
        ax = sheet.axes(row, 0)
        _draw_kept(ax, atlas, prompt, entry, size)
        last = row == len(entries) - 1
        if labels is not None and last:
            _token_axes(ax, labels, facts["n"], both=False)
        else:
            ax.locator_params(axis="x", nbins=6, integer=True)
            ax.tick_params(labelbottom=last)
        x, y = sheet.place(row, 0)
        _draw_thrown(sheet.axes_at(x + size[0] + 0.3, y, 1.5, size[1]), entry, layers, last=last, first=row == 0)
    region_legend(sheet, [r[0] for r in facts["regions"]], 0.24)
    sheet.legend([Patch(color=c) for c in THROWN.values()], [f"from {atlas.queries(name)}" for name in THROWN], 0.04)
    return sheet.figure


THROWN = {"all": "#56B4E9", "question": "#332288"}


def _draw_kept(ax: Axes, atlas: Atlas, prompt: int, entry: dict[str, Any], size: tuple[float, float]) -> None:
    facts = atlas.prompts[prompt]
    n, share = facts["n"], atlas.kept(prompt, entry).mean(1)  # [L, n]
    unit = -(-n // WIDEST)
    padded = np.pad(share, ((0, 0), (0, -n % unit)), constant_values=np.nan)
    image = np.nanmean(padded.reshape(len(share), -1, unit), -1)
    edge = image.shape[1] * unit - 0.5
    extent = (-0.5, edge, len(share) - 0.5, -0.5)
    ax.imshow(image, cmap="Greys", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    ax.set_xlim(-0.5, n - 0.5)
    ax.set_ylabel("layer", fontsize=7.5)
    ax.locator_params(axis="y", nbins=4, integer=True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(True)
    strip(ax, facts["regions"], left=False, inches=size)
    flags = f" ({', '.join(entry['flags'])})" if entry["flags"] else ""
    title = f"{short(cell_label(entry), 44)}: {100 * entry['kept']:.1f} % kept{flags}"
    ax.text(0, 1 + 0.14 / size[1], title, transform=ax.transAxes, fontsize=8, fontweight="bold", va="bottom")


def _draw_thrown(ax: Axes, entry: dict[str, Any], layers: int, *, last: bool, first: bool) -> None:
    for number, (name, colour) in enumerate(THROWN.items()):
        shares = [100 * x for x in entry["thrown_by_layer"][name]]
        ax.barh([i - 0.2 + 0.4 * number for i in range(layers)], shares, height=0.4, color=colour)
    ax.set_xlim(0, 100)
    ax.set_ylim(layers - 0.5, -0.5)
    ax.set_yticks([])
    ax.set_xticks([0, 50, 100])
    ax.tick_params(labelbottom=last)
    ax.grid(True, axis="x", color="#E4E4E4", linewidth=0.5)
    ax.set_axisbelow(True)
    if first:
        ax.set_title("attention thrown away (%)", loc="left", fontsize=8, pad=9)
