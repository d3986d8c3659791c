"""The only place that prints: results to stdout, everything else to stderr. rich is imported when it is needed."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from kvcli.errors import KvcliError

PLAIN_SECONDS = 10.0
"""Least time between two progress lines where stderr is not a terminal."""

SKIP_SECONDS = 0.5
"""What is done this soon was done before (a resumed sweep): it says nothing about the speed."""

KNOWN_SHARE, KNOWN_COUNT = 0.05, 20
"""The time left is said from this share of the job on, or from so many of its parts: what comes first pays for what
later ones share, and a batch ends all at once."""

_print_above: Callable[[str], None] | None = None
"""Prints a line above the progress bar on the screen, while there is one."""


def set_up() -> None:
    """Characters that a terminal cannot show are replaced instead of being an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Raises BrokenPipeError when stdout's reader has left."""
    sys.stdout.flush()


def drop_stdout() -> None:
    """After a broken pipe: nothing more reaches stdout, and Python's exit does not complain."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def colours(stream: IO[str] | None = None) -> bool:
    """True where colours are wanted: a terminal, and NO_COLOR not set."""
    stream = stream or sys.stdout
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A rich console that escapes nothing by itself: texts from users go through rich.text.Text."""
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    stream = sys.stderr if stderr else sys.stdout
    system: Literal["auto"] | None = "auto" if colours(stream) else None
    return Pipe(file=stream, width=width, highlight=False, markup=False, emoji=False, color_system=system)


def result(what: object) -> None:
    """Prints a text as it is, or anything rich can draw (off a terminal as wide as it needs to be)."""
    try:
        if isinstance(what, str):
            print(what, flush=True)
            return
        _fitting(what).print(what)
    except BrokenPipeError:  # the reader has what it wanted; the command still ends as it should
        drop_stdout()


def _fitting(what: object) -> Console:
    """stdout's console; off a terminal as wide as `what` needs."""
    out = console()
    if out.is_terminal or "COLUMNS" in os.environ:
        return out
    from rich.measure import Measurement

    wide = out.options.update(width=10_000, max_width=10_000)
    return console(width=max(80, Measurement.get(out, wide, what).maximum))  # type: ignore[arg-type]


def height(what: RenderableType) -> int:
    """Lines that `result` would print of it."""
    out = _fitting(what)
    return len(out.render_lines(what, out.options))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """A rich table of plain texts; columns of numbers are set right. None is drawn as '-'."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    cells = [["-" if value is None else value for value in row] for row in rows]
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(headers):
        number = bool(cells) and all(isinstance(row[i], int | float) or row[i] == "-" for row in cells)
        drawn.add_column(Text(header), justify="right" if number else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*(value if isinstance(value, Text) else Text(str(value)) for value in row))
    return drawn


def json_result(value: Any) -> None:
    """Prints one JSON document. NaN and infinities become null."""
    result(json.dumps(_finite(value), ensure_ascii=False, indent=2, default=_json))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.item() if hasattr(value, "item") else str(value)


def _line(text: str, head: str = "", style: str = "") -> None:
    """One message on stderr. A reader that has left is no reason to stop working."""
    if head and colours(sys.stderr):
        head = f"\x1b[{style}m{head}\x1b[0m"
    try:
        if _print_above:
            _print_above(head + text)
        else:
            print(head + text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        pass


def note(text: str) -> None:
    """Says something on stderr."""
    _line(text)


def warn(text: str) -> None:
    """Says on stderr what the user should know about the result."""
    _line(text, "warning: ", "33")


def error(problem: KvcliError) -> None:
    """Prints what is wrong, what was given and what to do."""
    first, *rest = problem.lines()
    _line("\n".join([first.removeprefix("error: "), *rest]), "error: ", "1;31")


def next_command(text: str) -> None:
    """Ends a command with the next one to type; not where KVCLI_NO_NEXT is set, as in scripts of several commands."""
    if not os.environ.get("KVCLI_NO_NEXT"):
        _line(text, "next: ", "1;32")


class Progress:
    """How far a long job is. `draw(done, total, fields, left)` shows it."""

    def __init__(self, draw: Callable[[int, int, str, str], None]) -> None:
        self._draw = draw
        self._began: float | None = None
        self._from = (0.0, 0)

    def update(self, done: int, total: int, **fields: object) -> None:
        """Shows `done` of `total`; fields are short facts such as task=..., method=..."""
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        if now - self._began < SKIP_SECONDS:
            self._from = (now, done)
        new, most = done - self._from[1], total - self._from[1]
        known = new > 1 and new >= min(KNOWN_COUNT, KNOWN_SHARE * most)
        speed = new / max(now - self._from[0], 1e-9)
        left = f"{duration((total - done) / speed)} left" if known and done < total else ""
        self._draw(done, total, " ".join(str(v) for v in fields.values()), left)


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A bar with the time left on a terminal; elsewhere a plain line now and then and at the end."""
    with _bar(title) if sys.stderr.isatty() else _plain(title) as shown:
        yield shown


@contextmanager
def _plain(title: str) -> Iterator[Progress]:
    last, waiting, start = -math.inf, "", time.monotonic()

    def draw(done: int, total: int, fields: str, left: str) -> None:
        nonlocal last, waiting
        share = f"{100 * done // max(total, 1)} %"
        waiting = "  ".join(part for part in (f"{title}: {done}/{total} ({share})", fields, left) if part)
        if time.monotonic() - last >= PLAIN_SECONDS:
            note(waiting)
            last, waiting = time.monotonic(), ""

    try:
        yield Progress(draw)
    finally:
        if waiting:
            note(f"{waiting}  after {duration(time.monotonic() - start)}")


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    global _print_above
    from rich import progress as rich
    from rich.text import Text

    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.TextColumn("{task.fields[count]}"),
        rich.TextColumn("{task.fields[left]}", markup=False, style="cyan"),
        rich.TextColumn("{task.fields[facts]}", markup=False, style="dim"),
    )
    with rich.Progress(*columns, console=console(stderr=True), refresh_per_second=4, redirect_stdout=False) as display:
        task = display.add_task(title, total=None, left="", facts="", count="")

        def draw(done: int, total: int, fields: str, left: str) -> None:
            display.update(task, completed=done, total=total, facts=fields, left=left, count=f"{done}/{total}")

        outer, _print_above = _print_above, lambda text: display.console.print(Text.from_ansi(text))
        try:
            yield Progress(draw)
        finally:
            _print_above = outer


def duration(seconds: float) -> str:
    """'8 s', '3m05s', '2h10m'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def count(number: int, what: str) -> str:
    """'1 cell', '7,104 records'."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def size(count: float) -> str:
    """'512 MiB', '3.5 GiB'."""
    mebibytes = count / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"
