"""The measurements of `bench` as tables for the terminal: times and memory of each batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.measure import Measurement
    from rich.table import Table as RichTable
    from rich.text import Text

    from kvcli.analysis.bench import Figure, Line, Table

WIDEST = 120
_WIDE = 104
"""Narrower than this, tables go without the spread of the times."""
_NAME_WIDTH, _NAME_LEAST = 24, 14


class BenchView:
    """Times and memory of each batch size, drawn for the width they are printed at."""

    def __init__(self, header: dict[str, Any], found: Sequence[Table]) -> None:
        self.header, self.tables = header, found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        wide = min(options.max_width, WIDEST) >= _WIDE
        yield _title(self.header)
        for table in self.tables:
            yield Text(f"\n{_batch_title(table)}", style="bold")
            if table.lines:
                yield _times(table, wide)
                yield Text("")
                yield _bytes(table)
            for method, ratio, error in table.failed:
                yield Text(f"failed: {_label(method, ratio)}: {error}", style="bold yellow")
        yield Text("")
        yield from _legend(self.header, self.tables, wide)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(min(60, options.max_width), min(WIDEST, options.max_width))


def _title(header: dict[str, Any]) -> Text:
    from rich.text import Text

    text = Text(str(header["model"]), style="bold")
    sizes = f"  {header['prompt_tokens']:,} prompt + {header['new_tokens']:,} new tokens"
    text.append(sizes, style="not bold")
    threads = f", {header['threads']} thread{'s' * (header['threads'] != 1)}" if header["device"] == "cpu" else ""
    where = f"\n{header['dtype']} on {header['device']}: {header['device_name']}{threads}"
    return text.append(where if header["device_name"] else "", style="not bold dim")


def _batch_title(table: Table) -> str:
    return "largest batch that fits" if table.batch_asked == "max" else f"batch {table.batch_asked}"


def _label(method: str, ratio: float | None) -> str:
    return method if method == "full" or ratio is None else f"{method} {ratio:g}"


def _times(table: Table, wide: bool) -> RichTable:
    """Milliseconds; prefill, compression and first token of all rows of the batch."""
    heads = ["prefill", "compress", "first\ntoken", "per\ntoken"]
    heads += ["min..max"] * wide + ["p90"] * (wide or table.batch_asked != "max") + ["tokens\nper s", "vs\nfull"]
    grid = _grid(table, heads)
    for line in table.lines:
        cells = {
            **dict(zip(heads, (_ms(line.seconds[name]) for name in TIMES), strict=False)),
            "min..max": _spread(line.seconds["per_token"]),
            "p90": _ms(line.seconds["per_token_p90"]),
            "tokens\nper s": _number(line.tokens_per_second.median),
            "vs\nfull": _rate(line),
        }
        _add(grid, table, line, [cells[head] for head in heads])
    return grid


TIMES = ("prefill", "compress", "first_token", "per_token")


def _bytes(table: Table) -> RichTable:
    """MiB: kept pairs, what the decode cache holds, peaks above the loaded model; for the largest batch its rows."""
    largest = table.batch_asked == "max"  # there, batches are compared: peaks are all near the limit
    grid = _grid(table, ["KV\nkept", "of\nfull", "held", "peak\nprefill", "peak\ndecode"])
    grid.add_column("rows vs\nfull" if largest else "vs\nfull", justify="right", no_wrap=True)
    for line in table.lines:
        kept, full = line.kv_bytes["kept"], line.kv_bytes["full"]
        peaks = [mib(line.memory[name]) if line.memory else "-" for name in ("prefill", "decode")]
        share = (line.against or {}).get("batch" if largest else "memory_decode")
        last = "-" if share is None or line.method == "full" else f"{share:.2f}x"
        _add(grid, table, line, [mib(kept), f"{kept / full:.1%}", mib(line.alloc_bytes), *peaks, last])
    return grid


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
    return line.method + ("!" if line.flags else "")


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


def _legend(header: dict[str, Any], found: Sequence[Table], wide: bool) -> Iterator[RenderableType]:
    from rich.text import Text

    lines = [line for table in found for line in table.lines]
    if not lines:
        return
    repeats = max(line.repeats for line in lines)
    texts = [
        f"times in ms, median of {repeats} repeats" + ("; min..max of them" if wide else ""),
        "first token: prefill, compression and first decode step",
        "vs full: tokens per second, then peak while decoding",
        f"memory in MiB; kept (16-bit), held: per row; peaks: whole batch, above the model ({header['memory_source']})",
    ]
    if any(line.within_spread for line in lines):
        texts.append("~  its repeats and those of full overlap: no difference was measured")
    flagged = dict.fromkeys(f"{_label(x.method, x.ratio)} {' '.join(x.flags)}" for x in lines if x.flags)
    if flagged:
        texts.append(f"!  {', '.join(flagged)}")
    for text in texts:
        yield Text(text, style="dim")
    busy = dict.fromkeys(_label(x.method, x.ratio) for x in lines if x.busy)
    if busy:
        what = f"busy machine: other work took CPU time from {', '.join(busy)}; these times say little"
        yield Text(f"{what} (again when it is idle, or --rounds 5)", style="bold yellow")
