"""What the measurements of one `bench` command say: every method against the full cache at the same batch size."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcli.analysis.reading.names import decoding

Record = dict[str, Any]

BUSY = 0.9
"""On a CPU, a process that computes all the time and has less of a core than this shared it with others."""


@dataclass(frozen=True)
class Figure:
    """Median, smallest and largest of all repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.median(values), min(values), max(values))

    def overlaps(self, other: Figure) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Line:
    """One method at one ratio, decode setting and batch size; rounds taken together.

    batch: rows measured, the fewest of its rounds. memory: bytes above the loaded model, of the whole batch; None where
    they cannot be read. against: this line's figures over those of `full`, None without it; a speed above 1 is faster,
    bytes below 1 are fewer. within_spread: its rate and full's cannot be told apart. busy: the machine had other work
    in at least one of its rounds. storage, buffer_bytes: as in the record.
    """

    method: str
    ratio: float | None
    batch_asked: int | str
    batch: int
    repeats: int
    seconds: dict[str, Figure]
    tokens_per_second: Figure
    kv_bytes: dict[str, int | None]
    alloc_bytes: int
    memory: dict[str, int] | None
    flags: list[str]
    busy: bool
    against: dict[str, float] | None = None
    within_spread: bool | None = None
    decode: dict[str, Any] | None = None
    storage: str = "pairs"
    buffer_bytes: int = 0

    @property
    def asked(self) -> str:
        """What was asked of the method: '0.3', '0.3 (r_d 0.5)'; empty for `full` and where it takes no ratio."""
        ratio = "" if self.ratio is None or self.method == "full" else f"{self.ratio:g}"
        how = decoding(self.decode)
        return f"{ratio} ({how})".strip() if how else ratio

    @property
    def share(self) -> float:
        """Bytes kept of the prompt over those of its full cache."""
        return (self.kv_bytes["kept"] or 0) / (self.kv_bytes["full"] or 1)


@dataclass(frozen=True)
class Table:
    """Lines of one batch size, `full` first. failed: (method, ratio, message), the message naming a decode setting."""

    batch_asked: int | str
    lines: list[Line]
    failed: list[tuple[str, float | None, str]] = field(default_factory=list)


def tables(records: Iterable[Record]) -> list[Table]:
    """One table per batch size, in the order in which they were asked for.

    records: lines of bench.jsonl of one command; those of other commands are not to be mixed in.
    """
    by_batch: dict[int | str, dict[Key, list[Record]]] = {}
    for record in records:
        cells = by_batch.setdefault(record["batch_asked"], {})
        decode = json.dumps(record.get("decode"), sort_keys=True)
        cells.setdefault((record["method"], record["ratio"], decode), []).append(record)
    return [_table(batch, cells) for batch, cells in by_batch.items()]


Key = tuple[str, float | None, str]
"""Method, ratio, and how generated tokens are compressed."""


def _table(batch: int | str, cells: dict[Key, list[Record]]) -> Table:
    good = {key: [r for r in found if r["status"] == "ok"] for key, found in cells.items()}
    lines = [_line(found) for found in good.values() if found]
    full = next((line for line in lines if line.method == "full"), None)
    failed = [(r["method"], r["ratio"], _said(r)) for found in cells.values() for r in found if r["status"] != "ok"]
    return Table(batch, [_against(line, full) for line in lines], failed)


def _said(record: Record) -> str:
    return ": ".join(filter(None, (decoding(record.get("decode")), record["error"])))


def _line(records: Sequence[Record]) -> Line:
    first = records[0]
    names = first["seconds"]
    return Line(
        method=first["method"], ratio=first["ratio"], batch_asked=first["batch_asked"],
        batch=min(r["batch"] for r in records), repeats=sum(len(r["tokens_per_second"]["all"]) for r in records),
        seconds={name: Figure.of([v for r in records for v in r["seconds"][name]["all"]]) for name in names},
        tokens_per_second=Figure.of([v for r in records for v in r["tokens_per_second"]["all"]]),
        kv_bytes=first["kv_bytes"], alloc_bytes=first["alloc_bytes"], memory=_memory(records),
        flags=sorted({flag for r in records for flag in r["flags"]}),
        busy=any(r["device"] == "cpu" and r["cpu_share"] < BUSY for r in records), decode=first.get("decode"),
        storage=first.get("storage") or "pairs", buffer_bytes=first.get("buffer_bytes") or 0,
    )  # fmt: skip


def _memory(records: Sequence[Record]) -> dict[str, int] | None:
    """Peaks above the loaded model: until the cache is compressed, while decoding, and the larger of both."""
    found = [r["memory"] for r in records]
    if any(m["idle"] is None for m in found):
        return None
    prefill = int(statistics.median(max(m["prefill"], m["compress"]) - m["idle"] for m in found))
    decode = int(statistics.median(m["decode"] - m["idle"] for m in found))
    return {"prefill": prefill, "decode": decode, "peak": max(prefill, decode)}


def _against(line: Line, full: Line | None) -> Line:
    if full is None:
        return line
    found = {
        "tokens_per_second": line.tokens_per_second.median / full.tokens_per_second.median,
        "batch": line.batch / full.batch,
        "kv_bytes": line.share / full.share,
        "alloc_bytes": line.alloc_bytes / full.alloc_bytes,
        **{
            f"{name}_speed": full.seconds[name].median / line.seconds[name].median
            for name in ("prefill", "first_token", "per_token", "total")
        },
    }
    if line.memory and full.memory:
        found.update(
            (f"memory_{name}", line.memory[name] / full.memory[name]) for name in line.memory if full.memory[name] > 0
        )
    alike = None if line is full else line.tokens_per_second.overlaps(full.tokens_per_second)
    return Line(**{**vars(line), "against": found, "within_spread": alike})
