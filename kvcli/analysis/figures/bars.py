"""Times and tokens per second as `kvcli bench` measured them; never those of a sweep, whose rows share batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcli.analysis.figures import layout
from kvcli.analysis.figures.layout import Plan, plain, shortened, text_width
from kvcli.analysis.figures.panels import heading
from kvcli.analysis.figures.style import Style, looks
from kvcli.analysis.figures.views import in_file_names
from kvcli.analysis.tables import bench
from kvcli.errors import KvcliError
from kvcli.results.store import read_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "bench.jsonl"
PHASES = tuple((name, f"{name.replace('_', ' ')} (ms)", 1000.0)
               for name in ("prefill", "compress", "first_token", "per_token"))  # fmt: skip
"""In ms, as the tables in the terminal have them."""
SAME = ("model", "revision", "prompt_tokens", "new_tokens", "dtype", "device", "device_name", "threads", "attn")
"""Only measurements that agree in these stand side by side."""


@dataclass(frozen=True)
class Measurements:
    """One batch size of one command. table: its lines, full first."""

    facts: dict[str, Any]
    table: bench.Table
    suffix: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """Median, smallest and largest of all repeats. busy: the machine had other work to do."""

    method: str
    asked: str
    value: float
    low: float
    high: float
    repeats: int
    flags: tuple[str, ...]
    busy: bool
    within_spread: bool | None


@dataclass(frozen=True)
class BarPanel:
    name: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Bars:
    figure: str
    title: str
    subtitle: str
    panels: tuple[BarPanel, ...]


def find(text: str, root: Path = Path("runs")) -> Path | None:
    """The folder of bench's measurements a user means: its path, its file or its name under runs/; None: none is."""
    path = Path(text).expanduser()
    places = (path.parent if path.name == FILE else path, root / path)
    return next((place for place in places if text and (place / FILE).is_file()), None)


def load(folder: Path) -> list[Measurements]:
    """The last command's measurements of a folder that bench wrote. Machines drift, so commands are never mixed.

    A command begins with `full`'s first round. Raises KvcliError with the line for what is not a measurement.
    """
    path, records = folder / FILE, []
    for line in read_lines(path):
        if line.torn:
            continue
        if line.value is None or line.value.get("kind") != "bench":
            fix = "move it away; kvcli bench writes a new one"
            raise KvcliError(f"{path}:{line.number} is not a measurement", given=f"RUN {folder}", fix=fix)
        records.append(line.value)
    last = _last_command(records)
    found = bench.tables(last)
    best = next((r for r in last if r["status"] == "ok"), None)
    if best is None:
        return []
    suffix = [in_file_names(f"batch-{t.batch_asked}") for t in found]
    facts = {name: best.get(name) for name in SAME}
    return [
        Measurements(facts, table, (name,) if len(found) > 1 else ())
        for table, name in zip(found, suffix, strict=True)
        if table.lines
    ]


def _last_command(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A command begins with `full` in round 0, each batch size once: from where that happened last."""
    start = 0
    seen: set[Any] = set()
    for i, record in enumerate(records):
        if record["method"] != "full" or record.get("round", 0) != 0:
            continue
        if (i and records[i - 1]["method"] != "full") or record["batch_asked"] in seen:
            start, seen = i, set()
        seen.add(record["batch_asked"])
    return list(records[start:])


def latency(found: Measurements) -> list[Bars]:
    lines = found.table.lines
    panels = [
        BarPanel(label, tuple(_bar(line, line.seconds[name], scale) for line in lines))
        for name, label, scale in PHASES
        if all(name in line.seconds for line in lines)
    ]
    return [_sheet("latency", "Times", found, panels)] if panels else []


def throughput(found: Measurements) -> list[Bars]:
    lines = found.table.lines
    panel = BarPanel("tokens per second", tuple(_bar(line, line.tokens_per_second, 1.0) for line in lines))
    return [_sheet("throughput", "Throughput", found, [panel])]


def _bar(line: bench.Line, figure: bench.Figure, scale: float) -> Bar:
    return Bar(
        line.method, line.asked, scale * figure.median,
        scale * figure.low, scale * figure.high, line.repeats, tuple(line.flags), line.busy, line.within_spread,
    )  # fmt: skip


def _sheet(figure: str, what: str, found: Measurements, panels: Iterable[BarPanel]) -> Bars:
    facts, lines = found.facts, found.table.lines
    repeats = sorted({line.repeats for line in lines})
    n = f"n = {repeats[0]} repeat{'s' * (repeats[0] != 1)}"
    if len(repeats) > 1:
        n = f"n = {repeats[0]} to {repeats[-1]} repeats"
    rows = sorted({line.batch for line in lines})
    batch = f"batch {found.table.batch_asked}" + (
        f" ({rows[0]} to {rows[-1]} rows)" if found.table.batch_asked == "max" else ""
    )
    hardware = facts.get("device_name") or facts["device"]
    said = [n, batch, f"{facts['prompt_tokens']} prompt tokens", f"{facts['new_tokens']} new tokens"]
    said += [f"{facts['dtype']} on {hardware}", "bars: median, lines: smallest to largest"]
    if any(line.busy for line in lines):
        said.append("the machine was busy in bars marked !")
    frees_nothing = list(dict.fromkeys(line.method for line in lines if line.storage == "read"))
    if frees_nothing:
        said.append(f"{', '.join(frees_nothing)}: simulated, nothing is freed")
    if any(line.storage == "stored" for line in lines):
        said.append("stored forms are read back without a fused kernel")
    return Bars(figure, f"{what}: {facts['model']}", ", ".join(said), tuple(panels))


def draw(sheet: Bars, style: Style) -> Figure:
    size = style.size - 0.5
    names = [_name(bar) for bar in sheet.panels[0].bars]
    shown = [plain(shortened(name, size, 1.9)) for name in names]
    left = max(text_width(name, size) for name in shown) + 0.12
    look = looks(bar.method for bar in sheet.panels[0].bars)
    tall = (len(names) * 0.19 + 0.1) * style.size / 8
    rows, columns = layout.grid_shape(len(sheet.panels), style.most_columns)
    page = layout.page(
        Plan(sheet.title, sheet.subtitle, rows, columns, "", "", left=left, panel=(None, max(0.5, tall)),
             above=0.24 * style.size / 8, gap=0.36),
        style, share=False,
    )  # fmt: skip
    for number, (ax, panel) in enumerate(zip(page.axes, sheet.panels, strict=False)):
        ax.grid(True, axis="x", color=style.theme.grid, linewidth=0.5)
        ax.set_axisbelow(True)
        for place, bar in enumerate(panel.bars):
            colour = style.theme.muted if bar.method == "full" else style.colour(look[bar.method])
            ax.barh([place], [bar.value], height=0.68, color=colour, alpha=0.85, linewidth=0)
            ax.plot([bar.low, bar.high], [place, place], color=style.theme.ink, linewidth=1.0, zorder=3)
        full = next((bar for bar in panel.bars if bar.method == "full"), None)
        if full:
            ax.axvline(full.value, color=style.theme.ink, linewidth=0.8, linestyle="--", zorder=2)
        ax.set_xlim(0, max([*(bar.high for bar in panel.bars), 1e-9]) * 1.06)
        ax.set_ylim(len(names) - 0.45, -0.55)
        ax.set_yticks(range(len(names)), shown if number % columns == 0 else [""] * len(names))
        ax.tick_params(axis="y", length=0)
        ax.locator_params(axis="x", nbins=4)
        heading(ax, panel.name, "", "", style, ax.get_window_extent().width / ax.figure.dpi, style.size)
    for ax in page.axes[len(sheet.panels) :]:
        ax.set_visible(False)
    return page.figure


def _name(bar: Bar) -> str:
    return f"{bar.method} {bar.asked}".strip() + (" !" if bar.busy else "")
