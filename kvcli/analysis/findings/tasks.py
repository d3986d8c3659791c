"""Finding 1: how much is lost depends on the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from kvcli.analysis.findings.data import Data, deep_columns, most_shots, named_tasks
from kvcli.analysis.findings.outcome import LARGE, LEVEL, Finding, Outcome, mean_over, percent, shared, untested
from kvcli.analysis.findings.part import Part, kept_apart, part_of, widest_common
from kvcli.analysis.marked import code
from kvcli.analysis.statistics.retention import Relative
from kvcli.analysis.statistics.stats import Interval

TITLE = "Loss depends on the task"


def task_dependent(data: Data, level: float = LEVEL) -> Finding:
    """Tasks keep different shares of their score at the smallest ratio that they have in common."""
    deep = most_shots([table for table in data.usual() if deep_columns([table])])
    tables = [table for table in deep if data.above_chance(table, level)]
    found = widest_common(tables)
    parts = [part for table in found[1] if (part := part_of(data, table, found[0]))] if found else []
    known = [part for part in parts if part.kept(level).interval is not None]
    if found is None or len(known) < 2:
        return untested(
            1, TITLE, "it takes two tasks with full clearly above chance, and a method that both have at one ratio "
            "of 0.3 or less",
        )  # fmt: skip
    pairs = list(combinations(known, 2))
    narrow = {part.name: part.kept(shared(level, len(pairs))) for part in known}
    apart = [kept_apart(narrow[a.name], narrow[b.name]) for a, b in pairs]
    differ = sum(interval is not None and not interval.low <= 0 <= interval.high for interval in apart)
    kept = sorted(((part.kept(level), part) for part in known), key=lambda k: k[0].value or 0.0)
    said = (
        f"At {found[0].column}, {mean_over(len(found[0].labels))}, kept of what full has above chance, each at "
        f"{100 * level:.4g} %: "
        + ", ".join(f"{code(part.name)} {percent(one)} (n = {len(part.full)})" for one, part in kept)
        + f"; {differ} of {len(pairs)} pairs of tasks differ{_largest(pairs, apart, narrow, level)}."
    )
    others = [table for table in tables if table.task not in narrow]
    said += f" Not compared, without these methods there: {named_tasks(others)}." if others else ""
    if differ:
        return Finding(1, TITLE, Outcome.HOLDS, said)
    if all(interval and interval.low > -LARGE and interval.high < LARGE for interval in apart):
        return Finding(1, TITLE, Outcome.NOT, said + f" No pair can differ by more than {100 * LARGE:.0f} %.")
    return Finding(1, TITLE, Outcome.OPEN, said, "more samples per task")


def _largest(
    pairs: Sequence[tuple[Part, Part]], apart: Sequence[Interval | None], narrow: Mapping[str, Relative], level: float
) -> str:
    """The pair that lies furthest apart, the task that keeps more first, with the interval that decides."""
    known = [(pair, ends) for pair, ends in zip(pairs, apart, strict=True) if ends is not None]
    if not known:
        return ""
    (a, b), ends = max(known, key=lambda two: abs(_gap(two[0][0], two[0][1], narrow)))
    gap, low, high = _gap(a, b, narrow), ends.low, ends.high
    if gap < 0:
        a, b, gap, low, high = b, a, -gap, -high, -low
    of = f"each pair at {100 * shared(level, len(pairs)):.4g} %"
    more = f"{100 * gap:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    return f" ({of}); furthest apart: {code(a.name)} keeps {more} more than {code(b.name)}"


def _gap(a: Part, b: Part, narrow: Mapping[str, Relative]) -> float:
    return (narrow[a.name].value or 0.0) - (narrow[b.name].value or 0.0)
