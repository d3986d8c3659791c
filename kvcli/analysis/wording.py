"""How numbers and marks are written, the same in the terminal, in figures and in reports."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kvcli.analysis import stats
from kvcli.analysis.stats import Interval
from kvcli.analysis.tables import DENSE, MATCH, OWN, CellSummary, TaskTable

MARKS = {"noop": "n", "over_budget": "o", "fallback": "f", "unreachable": "u", "simulated": "s"}
ESTABLISHED, INCOMPLETE = "*", "i"
MEANING = {
    ESTABLISHED: f"established: {stats.ESTABLISHED}; not adjusted for the number of comparisons",
    "n": "noop: some prompts were too short to compress; nothing was evicted from them",
    "o": "over_budget: in some samples protected tokens exceed the budget; compare at the measured ratio only",
    "f": "fallback: the method could not do what its name says at this size",
    "u": "unreachable: this ratio, or the bytes to match, are outside the method's range",
    "s": "simulated: the memory was not really freed",
    INCOMPLETE: "fewer finished samples than full: failed or not run yet",
}
"""Mark after a difference -> what it means, in the order of the legend."""
SHARES = {"?": "no_answer", ">": "truncated"}
"""Mark before a share of outputs in per cent -> the field of a cell it is of."""
SHARE_MEANING = {
    "?": "so many per cent of the outputs hold no answer (to requests: are incoherent or empty)",
    ">": "so many per cent of the outputs were cut at the token limit",
}


def score(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def points(value: float) -> str:
    """A difference of scores in percentage points with its sign: '-12.3', '+0.0'."""
    return f"{100 * value + 0.0:+.1f}".replace("-0.0", "+0.0")


def relative(value: float | None) -> str:
    return "-" if value is None else f"{100 * value + 0.0:+.1f} %".replace("-0.0 ", "+0.0 ")


def p_value(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def score_interval(interval: Interval | None) -> str:
    return "[no interval]" if interval is None else f"[{interval.low:.2f}, {interval.high:.2f}]"


def points_interval(interval: Interval | None) -> str:
    return "[no interval]" if interval is None else f"[{points(interval.low)}, {points(interval.high)}]"


def measured(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def exact(value: float | None) -> str:
    """As a ratio to type: '0.271'."""
    return "-" if value is None else f"{value:.3f}".rstrip("0")


def off_target(cell: CellSummary) -> bool:
    """True when the measured ratio should be read: nothing was asked for, a budget was, or it came out otherwise."""
    if cell.measured_ratio is None:
        return False
    if cell.column == OWN or cell.column.startswith(MATCH) or cell.column.endswith(" KV"):
        return True
    return abs(cell.measured_ratio - float(cell.column)) > 0.01


def marks(cell: CellSummary, full: CellSummary | None) -> str:
    """All marks of one cell, e.g. '*o'."""
    found = ESTABLISHED if cell.verdict in ("loss", "gain") else ""
    found += "".join(mark for flag, mark in MARKS.items() if cell.flags.get(flag))
    return found + (INCOMPLETE if full and cell.n < full.n else "")


ALIKE = 0.02
"""A share this near to that of full is not repeated beside every score."""


def shares(cell: CellSummary, full: CellSummary | None = None) -> dict[str, str]:
    """Shares above zero that a score is to be read with, by their mark: {'?': '?12'}. full: only those unlike its."""
    known = full if full is not None and full.n else None
    found = {}
    for mark, name in SHARES.items():
        share = getattr(cell, name)
        shown = share > 0 if known is None else abs(share - getattr(known, name)) > ALIKE
        if shown:
            found[mark] = f"{mark}{round(100 * share) or int(share > 0)}"
    return found


def figures(cell: CellSummary) -> str:
    """'over_refusal 0.12, unsafe_answered 0.03': what the scorer gave beside the score."""
    return ", ".join(f"{name} {score(value)}" for name, value in cell.extra.items())


def legend(found: Iterable[str]) -> list[tuple[str, str]]:
    """(mark, meaning) of the marks that occur in the given texts."""
    used = set("".join(found))
    return [(mark, meaning) for mark, meaning in MEANING.items() if mark in used]


def flag_counts(cell: CellSummary) -> str:
    """'noop 12/200': every flag with its number of records."""
    return ", ".join(f"{name} {count}/{cell.records}" for name, count in cell.flags.items())


def mode(table: TaskTable) -> str:
    """'first token compressed, 8 shots'; query mode and weights only where they are not the usual ones."""
    parts = [f"first token {table.first_token}"]
    if table.query != "aware":
        parts.append(f"query {table.query}")
    if table.shots is not None:
        parts.append(f"{table.shots} shot{'' if table.shots == 1 else 's'}")
    if table.weights != DENSE:
        parts.append(f"weights {table.weights}")
    return ", ".join(parts)


def sample_range(table: TaskTable) -> str:
    """'200', or '196-200' where cells differ."""
    counts = [c.n for c in table.cells()] + ([table.full.n] if table.full else [])
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def clusters(table: TaskTable) -> str:
    """'20 clusters'; of one it says what follows from that."""
    if not table.clusters:
        return ""
    if table.clusters > 1:
        return f"{table.clusters} clusters"
    why = ", one context for all questions" if table.query == "agnostic" else ""
    return f"1 cluster{why}: no interval, no test"
