"""How numbers and marks are written, the same in the terminal, in figures and in reports."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kvcli.analysis.statistics.retention import Relative
from kvcli.analysis.statistics.stats import Interval
from kvcli.analysis.tables.table import DENSE, MATCH, OWN, CellSummary, TaskTable

MARKS = {"noop": "n", "over_budget": "o", "fallback": "f", "unreachable": "u", "simulated": "s"}
ESTABLISHED, INCOMPLETE = "*", "i"
MEANING = {
    ESTABLISHED: "established: a loss or gain with all comparisons of the sweep considered",
    "n": "noop: some prompts were too short to compress; nothing was evicted from them",
    "o": "over_budget: in some samples protected tokens exceed the budget; compare at the measured ratio only",
    "f": "fallback: the method could not do what its name says at this size",
    "u": "unreachable: this ratio, or the bytes to match, are outside the method's range",
    "s": "simulated: the memory was not really freed",
    INCOMPLETE: "fewer finished samples than were asked for: failed or not run yet",
}
"""Mark after a difference -> what it means, in the order of the legend."""
SHARES = {"?": "no_answer", "~": "incoherent", ">": "truncated"}
"""Mark before a share of outputs in per cent -> the field of a cell it is of."""
SHARE_WORDS = {"?": "without an answer", "~": "incoherent", ">": "cut at the token limit"}
SHARE_MEANING = {
    "?": "so many per cent of the outputs hold no answer (to requests: are incoherent or empty)",
    "~": "so many per cent of the outputs are no text: empty, in circles, signs or words at random",
    ">": "so many per cent of the outputs were cut at the token limit",
}


BOUND = "b"
BOUND_MEANING = (
    "b: nearly all samples (or clusters) differ by the same amount, so the interval is a worst-case bound, "
    "wider than others; where it ends at 0, the sign-flip test excludes 0"
)


def bounded(cell: CellSummary) -> bool:
    """Whether the interval of its difference is the share bound (docs/statistics.md)."""
    found = cell.difference
    return found is not None and found.interval is not None and found.interval.bound


def score(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def points(value: float) -> str:
    """A difference of scores in percentage points with its sign: '-12.3', '+0.0'."""
    return f"{100 * value + 0.0:+.1f}".replace("-0.0", "+0.0")


def relative(value: float | None) -> str:
    return "-" if value is None else f"{100 * value + 0.0:+.1f} %".replace("-0.0 ", "+0.0 ")


def kept(found: Relative) -> str:
    """Chance-adjusted retention: '85 % [78, 91]'; without ends where full is not clearly above chance."""
    if found.value is None:
        return "-"
    ends = found.interval
    shown = f" [{_percent(ends.low)}, {_percent(ends.high)}]" if ends else ""
    return f"{_percent(found.value)} %{shown}"


def _percent(value: float) -> str:
    return "?" if math.isinf(value) else f"{round(100 * value)}"


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


def established(cell: CellSummary) -> bool:
    """What every output sets in bold or marks with *: a loss or gain with all comparisons of the sweep considered."""
    return cell.in_family in ("loss", "gain")


def marks(cell: CellSummary, full: CellSummary | None) -> str:
    """All marks of one cell, e.g. '*o'."""
    found = ESTABLISHED if established(cell) else ""
    return found + flag_marks(cell) + (INCOMPLETE if _incomplete(cell, full) else "")


def _incomplete(cell: CellSummary, full: CellSummary | None) -> bool:
    """Whether records are missing that a command asked for; where run.json does not say, those that full has."""
    if cell.asked is not None:
        return cell.records < cell.asked
    return full is not None and cell.n < full.n


ALIKE = 0.02
"""A share this near to that of full is not repeated beside every score."""


def shares(cell: CellSummary, full: CellSummary | None = None) -> dict[str, str]:
    """Shares of outputs that a score is to be read with, by their mark: {'?': '?12'}. full: only those unlike its."""
    known = full if full is not None and full.n else None
    found = {}
    for mark, name in SHARES.items():
        share, usual = getattr(cell, name), getattr(known, name, None)
        if share is not None and (usual is None or abs(share - usual) > ALIKE):
            found[mark] = f"{mark}{_whole(share)}"
    return found


def _whole(share: float) -> int:
    """In per cent; what is above zero is not shown as zero."""
    return round(100 * share) or int(share > 0)


def percent(value: float) -> str:
    """'100 %', '30.1 %'."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def outputs(cell: CellSummary) -> str:
    """'no answer 2 %, incoherent 0 %, cut 12 %': all shares, for text around a score."""
    named = {"no answer": cell.no_answer, "incoherent": cell.incoherent, "cut": cell.truncated}
    return ", ".join(f"{name} {_whole(value)} %" for name, value in named.items() if value is not None)


def repeats(cell: CellSummary) -> str:
    """'3 seeds x 2 draws'; empty for one of each."""
    seeds, draws = cell.repeats
    if cell.seeds == 1:
        return ""
    if cell.seeds != seeds * draws:
        return f"{cell.seeds} seeds and draws"
    parts = [f"{seeds} seeds"] * (seeds > 1) + [f"{draws} draws"] * (draws > 1)
    return " x ".join(parts)


def shots(count: int) -> str:
    return f"{count} shot{'' if count == 1 else 's'}"


def figures(cell: CellSummary) -> str:
    """'over_refusal 0.12, unsafe_answered 0.03': what the scorer gave beside the score."""
    return ", ".join(f"{name} {score(value)}" for name, value in cell.extra.items())


def legend(found: Iterable[str]) -> list[tuple[str, str]]:
    """(mark, meaning) of the marks that occur in the given texts."""
    used = set("".join(found))
    return [(mark, meaning) for mark, meaning in MEANING.items() if mark in used]


def flag_marks(cell: CellSummary) -> str:
    """'of': the marks of the flags that some records carry."""
    return "".join(mark for flag, mark in MARKS.items() if cell.flags.get(flag))


def flag_counts(cell: CellSummary) -> str:
    """'noop 12/200': every flag with its number of records."""
    return ", ".join(f"{name} {count}/{cell.records}" for name, count in cell.flags.items())


def mode(table: TaskTable, *, with_shots: bool = True) -> str:
    """'first token compressed, 8 shots'; query mode and weights only where they are not the usual ones. with_shots:
    False where they are said beside it."""
    parts = [f"first token {table.first_token}"]
    if table.query != "aware":
        parts.append(f"query {table.query}")
    if with_shots and table.shots is not None:
        parts.append(shots(table.shots))
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
