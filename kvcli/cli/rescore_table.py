"""The table of `kvcli rescore`: one line per task and method, as wide as the screen allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvcli.cli import output

if TYPE_CHECKING:
    from rich.table import Table

    from kvcli.engine.rescoring import Tally

Line = tuple[object, ...]
NUMBERS = ("records", "changed", "old score", "new score", "left out")
DISPENSABLE = ("left out", "old score", "records")
"""Left away in this order where the screen is narrow; what was left out is said below the table too."""


class Layout(NamedTuple):
    """grouped: a task stands above its methods instead of beside them. numbers: which of them are shown."""

    grouped: bool
    numbers: tuple[str, ...]


def table(tallies: Sequence[Tally], width: int | None) -> Table:
    """The first layout that fits the width without cutting a name; names of the narrowest go on in the next line.

    width: of the screen; None where there is no end to it.
    """
    drawn = None
    for layout in _layouts():
        drawn = _drawn(tallies, layout)
        if width is None or _width(drawn) <= width:
            break
    assert drawn is not None
    return drawn


def _layouts() -> list[Layout]:
    """From the widest to the narrowest."""
    kept = [tuple(n for n in NUMBERS if n not in DISPENSABLE[:gone]) for gone in range(len(DISPENSABLE) + 1)]
    return [Layout(False, kept[0]), Layout(False, kept[1]), *(Layout(True, numbers) for numbers in kept)]


def _drawn(tallies: Sequence[Tally], layout: Layout) -> Table:
    from rich.text import Text

    from kvcli.analysis.reading.names import shown

    names = shown(tally.method for tally in tallies)
    lines: list[Line] = []
    blank = ("",) * len(layout.numbers)
    for i, tally in enumerate(tallies):
        if layout.grouped and (i == 0 or tally.task != tallies[i - 1].task):
            lines.append((Text(f"{tally.task}:", style="bold"), *blank))
        name = (f"  {names[tally.method]}",) if layout.grouped else (tally.task, names[tally.method])
        lines.append((*name, *(_text(tally, number) for number in layout.numbers)))
    found = output.table((*(("method",) if layout.grouped else ("task", "method")), *layout.numbers), lines)
    for column in found.columns[-len(layout.numbers) :]:
        column.justify, column.no_wrap = "right", True
    return found


def _text(tally: Tally, number: str) -> str:
    values = {
        "records": tally.records, "changed": tally.changed, "old score": mean(tally.before, tally),
        "new score": mean(tally.after, tally), "left out": tally.left_out.total(),
    }  # fmt: skip
    value = values[number]
    return "-" if value is None else str(value)


def mean(total: float, tally: Tally) -> float | None:
    """To three digits; None where nothing was scored."""
    return round(total / tally.records, 3) if tally.records else None


def _width(drawn: Table) -> int:
    from rich.measure import Measurement

    room = output.console(width=10_000)
    return Measurement.get(room, room.options, drawn).maximum
