"""The measurements of `bench` as tables for the terminal: times and memory of each batch size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.measure import Measurement
    from rich.table import Table as RichTable
    from rich.text import Text

    from kvcli.analysis.tables.bench import Figure, Line, Table

from kvcli.analysis.reading.names import decoding
from kvcli.cli.output import count

WIDEST = 120
_WIDE = 104
"""Narrower than this, tables go without the spread of the times."""
_NAME_WIDTH, _NAME_LEAST = 24, 10


class BenchView:
    """Times and memory of each batch size, drawn for the width they are printed at."""

    def __init__(self, header: dict[str, Any], found: Sequence[Table]) -> None:
        self.header, self.tables = header, found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        width = min(options.max_width, WIDEST)
        wide = width >= _WIDE
        steps: set[str] = set()
        yield _title(self.header)
        for table in self.tables:
            yield Text(f"\n{_batch_title(table)}", style="bold")
            if table.lines:
                times = _fitting(_times, table, width, [[], ["p90"], ["p90", "compress"]], [SPREAD] * (not wide))
                steps.update(str(column.header) for column in times.columns)
                yield times
                yield Text("")
                yield _fitting(_bytes, table, width, [[], [PEAK_PREFILL]])
            for method, ratio, error in table.failed:
                yield Text(f"failed: {_label(method, ratio)}: {error}", style="bold yellow")
        yield Text("")
        yield from _legend(self.header, self.tables, steps)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(min(60, options.max_width), min(WIDEST, options.max_width))


def _fitting(
    draw: Callable[[Table, Collection[str]], RichTable], table: Table, width: int, drops: Sequence[Sequence[str]],
    always: Sequence[str] = (),
) -> RichTable:  # fmt: skip
    """The first of the tables without the columns of `drops` that fits the width, with method names folded; else the
    last. always: columns that none has."""
    names = max(len(_name(line)) for line in table.lines)
    foldable = min(names, _NAME_WIDTH) - min(names, _NAME_LEAST)
    for drop in drops:
        grid = draw(table, [*always, *drop])
        if _natural_width(grid) - foldable <= width:
            break
    return grid


def _natural_width(grid: RichTable) -> int:
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=1000)
    return Measurement.get(console, console.options, grid).maximum


def _title(header: dict[str, Any]) -> Text:
    from rich.text import Text

    text = Text(str(header["model"]), style="bold")
    sizes = f"  {header['prompt_tokens']:,} prompt + {header['new_tokens']:,} new tokens"
    text.append(sizes, style="not bold")
    threads = f", {count(header['threads'], 'thread')}" if header["device"] == "cpu" else ""
    where = f"\n{header['dtype']} on {header['device']}: {header['device_name']}{threads}"
    return text.append(where if header["device_name"] else "", style="not bold dim")


def _batch_title(table: Table) -> str:
    return "largest batch that fits" if table.batch_asked == "max" else f"batch {table.batch_asked}"


def _label(method: str, ratio: float | None) -> str:
    return method if method == "full" or ratio is None else f"{method} {ratio:g}"


def _described(line: Line) -> str:
    return f"{line.method} {line.asked}".strip()


def _times(table: Table, drop: Collection[str]) -> RichTable:
    """Milliseconds; prefill, compression and first token of all rows of the batch. drop: columns to leave out."""
    known = ["prefill", "compress", "first\ntoken", "per\ntoken", SPREAD, "p90", "tokens\nper s", "vs\nfull"]
    heads = [head for head in known if head not in drop]
    grid = _grid(table, heads)
    for line in table.lines:
        cells = {
            **dict(zip(known, (_ms(line.seconds[name]) for name in TIMES), strict=False)),
            SPREAD: _spread(line.seconds["per_token"]),
            "p90": _ms(line.seconds["per_token_p90"]),
            "tokens\nper s": _number(line.tokens_per_second.median),
            "vs\nfull": _rate(line),
        }
        _add(grid, table, line, [cells[head] for head in heads])
    return grid


TIMES = ("prefill", "compress", "first_token", "per_token")
SPREAD, PEAK_PREFILL = "min..max", "peak\nprefill"


def _bytes(table: Table, drop: Collection[str]) -> RichTable:
    """MiB: kept pairs, what the decode cache holds, peaks above the loaded model; for the largest batch its rows.

    Where a method chooses what to read, what a new token reads; where generated tokens leave too, what is held at last.
    """
    from kvcli.analysis.tables.wording import percent

    largest = table.batch_asked == "max"  # there, batches are compared: peaks are all near the limit
    more = [name for name in ("end", "read") if _matters(table, name)]
    peaks = [(head, name) for head, name in ((PEAK_PREFILL, "prefill"), ("peak\ndecode", "decode")) if head not in drop]
    heads = ["KV\nkept", "of\nfull", *(f"KV\n{name}" for name in more), "held", *(head for head, _ in peaks)]
    grid = _grid(table, heads)
    grid.add_column("rows vs\nfull" if largest else "vs\nfull", justify="right", no_wrap=True)
    for line in table.lines:
        sizes = [line.kv_bytes.get(name) for name in more]
        tops = [mib(line.memory[name]) if line.memory else "-" for _, name in peaks]
        share = (line.against or {}).get("batch" if largest else "memory_decode")
        last = "-" if share is None or line.method == "full" else f"{share:.2f}x"
        cells = [mib(line.kv_bytes["kept"] or 0), percent(line.share), *("-" if s is None else mib(s) for s in sizes)]
        _add(grid, table, line, [*cells, mib(line.alloc_bytes), *tops, last])
    return grid


def _matters(table: Table, name: str) -> bool:
    """Whether a column of kv_bytes says something that the others do not."""
    if name == "end":
        return any(line.decode for line in table.lines)
    return any(line.kv_bytes.get(name) is not None for line in table.lines)


def _grid(table: Table, heads: Sequence[str]) -> RichTable:
    from rich import box
    from rich.table import Table as Rich

    longest = max(len(_name(line)) for line in table.lines)
    grid = Rich(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
    grid.add_column("method", min_width=min(longest, _NAME_LEAST), max_width=_NAME_WIDTH, overflow="fold")
    for head in ("ratio", *["batch"] * (table.batch_asked == "max"), *heads):
        grid.add_column(head, justify="right", no_wrap=True)
    return grid


def _name(line: Line) -> str:
    name = line.method + "*" * (line.storage == "stored") + "!" * bool(line.flags)
    return " ".join(filter(None, (name, decoding(line.decode))))


def _add(grid: RichTable, table: Table, line: Line, cells: Sequence[str]) -> None:
    from rich.text import Text

    name = [_name(line), "" if line.ratio is None else f"{line.ratio:g}"]
    batch = [str(line.batch)] if table.batch_asked == "max" else []
    grid.add_row(*(Text(text) for text in (*name, *batch, *cells)))


def _rate(line: Line) -> str:
    """'1.31x', with ~ where the repeats cannot tell the two apart."""
    if line.method == "full" or line.against is None:
        return "-"
    return ("~" if line.within_spread else "") + f"{line.against['tokens_per_second']:.2f}x"


def _ms(figure: Figure) -> str:
    return _number(1000 * figure.median)


def _spread(figure: Figure) -> str:
    return f"{_number(1000 * figure.low)}..{_number(1000 * figure.high)}"


def mib(size: int) -> str:
    return _number(size / 2**20)


def _number(value: float) -> str:
    """Three digits, and whole numbers from 100 on: 0.0123, 1.23, 12.3, 1,234."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:.{2 if abs(value) < 9.995 else 1}f}"


STEPS = {SPREAD: "min..max of the repeats", "p90": "p90: 90 % of a repeat's steps take no longer"}
"""Columns of the times of a token -> what of."""


def _legend(header: dict[str, Any], found: Sequence[Table], columns: Collection[str]) -> Iterator[RenderableType]:
    """columns: those that the tables of times have."""
    from rich.text import Text

    lines = [line for table in found for line in table.lines]
    if not lines:
        return
    how = {line.storage for line in lines}
    repeats = max(line.repeats for line in lines)
    texts = [
        f"times in ms, median of {count(repeats, 'repeat')}",
        "first token: prefill, compression and first decode step",
        "; ".join(["per token: median step of a repeat", *(text for name, text in STEPS.items() if name in columns)]),
        "vs full: tokens per second, then peak while decoding",
        f"memory in MiB; kept (16-bit), held: per row; peaks: whole batch, above the model ({header['memory_source']})",
    ]
    if any(line.within_spread for line in lines):
        texts.append("~  its repeats and those of full overlap: no difference was measured")
    if "stored" in how:
        buffers = [line.buffer_bytes for line in lines if line.storage == "stored"]
        least, most = mib(min(buffers)), mib(max(buffers))
        sizes = least if least == most else f"{least} to {most}"
        texts.append(
            f"*  stored in another form; held counts one layer written out for attention ({sizes} MiB per row); no "
            "fused kernel reads the form, so times are kvcli's"
        )
    flagged = dict.fromkeys(f"{_described(x)} {' '.join(x.flags)}" for x in lines if x.flags)
    if flagged:
        texts.append(f"!  {', '.join(flagged)}")
    if "read" in how:
        texts.append(
            "simulated: all pairs stay in memory; KV read is what a new token would read, its time says nothing"
        )
    if any(line.decode for line in lines):
        texts.append("KV end: prompt and answer at the last token, where generated tokens leave too")
    for text in texts:
        yield Text(text, style="dim")
    busy = dict.fromkeys(_described(x) for x in lines if x.busy)
    if busy:
        what = f"busy machine: other work took CPU time from {', '.join(busy)}; these times say little"
        yield Text(f"{what} (again when it is idle, or --rounds 5)", style="bold yellow")
