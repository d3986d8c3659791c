"""The words of verdict sentences: where, how much, how sure, and what a cell is to be read with."""

from __future__ import annotations

from collections.abc import Sequence

from kvcli.analysis.marked import user
from kvcli.analysis.reading.roles import names_of
from kvcli.analysis.statistics.verdicts import Kind, Verdict
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.table import MATCH, CellSummary

NOOP_SAID = 0.05
"""From this share of samples on that were too short to compress, a sentence says how many."""
_ENDLESS = 10**7


def is_control(cell: CellSummary) -> bool:
    """Also with settings, in a composition and while generating."""
    parts = cell.method.partition(" [")[0].split("+")
    return any(part.partition(":")[0] in names_of("control") for part in parts)


def margin_text(margin: float) -> str:
    return f"{100 * margin:g} point{'' if margin == 0.01 else 's'}"


def asked(cell: CellSummary) -> str:
    return f"the bytes of {user(cell.column.removeprefix(MATCH))}" if cell.column.startswith(MATCH) else cell.column


def at(cell: CellSummary, more: str = "") -> str:
    """What was asked for, and what it is to be read with: '0.1 (over budget in 2 of 40 samples, measured 0.12 on
    average)'. more: what else stands in the brackets."""
    noted = "; ".join(filter(None, [note(cell), more]))
    return asked(cell) + (f" ({noted})" if noted else "")


def note(cell: CellSummary) -> str:
    """The flags that change what a cell's difference means, with their counts; empty where there are none."""
    parts = []
    if cell.over_budget:
        measured = f"measured {wording.measured(cell.measured_ratio)}"
        always = cell.flags["over_budget"] == cell.records
        some = f" in {_counted(cell, 'over_budget', unit=True)}, {measured} on average"
        parts.append(f"over budget{f', {measured}' if always else some}")
    said = [name for name in ("fallback", "unreachable") if cell.flags.get(name)]
    said += ["noop"] * (cell.noop > NOOP_SAID * cell.records) + ["simulated"] * bool(cell.flags.get("simulated"))
    return ", ".join([*parts, *(_flagged(cell, name) for name in said)])


def _flagged(cell: CellSummary, flag: str) -> str:
    """The flag alone where every output has it."""
    return flag if cell.flags.get(flag, 0) == cell.records else f"{flag} in {_counted(cell, flag)}"


def _counted(cell: CellSummary, flag: str, *, unit: bool = False) -> str:
    """'2 of 40 samples'; with several seeds or draws what is counted are outputs."""
    what = " samples" if cell.records == cell.n else " outputs"
    return f"{cell.flags.get(flag, 0)} of {cell.records}{what * unit}"


def not_comparable(cell: CellSummary) -> str:
    """Why a cell is not held against other methods at what was asked: it kept more, or in most samples it was not the
    method. Empty where it may be."""
    mostly = max(cell.flags.get("fallback", 0), cell.noop) > cell.records / 2
    return note(cell) if cell.over_budget or mostly else ""


def magnitude(verdict: Verdict) -> str:
    """'12.3 points [8.1, 16.4]' of a loss, without signs; of a gain too."""
    sign = -1 if verdict.kind is Kind.LOSS or (verdict.kind is not Kind.GAIN and verdict.value < 0) else 1
    interval = verdict.interval
    ends = "no interval" if interval is None else ", ".join(
        f"{100 * end + 0.0:.1f}" for end in sorted((sign * interval.low, sign * interval.high))
    )  # fmt: skip
    value = f"{100 * sign * verdict.value + 0.0:.1f}"
    return f"{value} point{'' if value == '1.0' else 's'} [{ends}]".replace("-0.0", "0.0")


def signed(verdict: Verdict) -> str:
    """'-3.3 points [-11.8, +5.2]', as it is."""
    ends = wording.points_interval(verdict.interval) if verdict.interval else ""
    return f"{wording.points(verdict.value)} points {ends}".rstrip()


def p_words(verdict: Verdict) -> str:
    """'adjusted p < 0.001'; empty where there is no p."""
    if verdict.p is None:
        return ""
    value = wording.p_value(verdict.p)
    return f"{'adjusted ' * (verdict.family > 1)}p {value if value.startswith('<') else f'= {value}'}"


def p_text(verdict: Verdict) -> str:
    """' (adjusted p < 0.001)', to stand behind an amount."""
    words = p_words(verdict)
    return f" ({words})" if words else ""


def amount(verdict: Verdict) -> str:
    """'12.3 points [8.1, 16.4] (adjusted p < 0.001)'."""
    return magnitude(verdict) + p_text(verdict)


def simultaneous(verdict: Verdict) -> str:
    """', simultaneous' of an interval that holds with those of the others, as a table's does not."""
    return ", simultaneous" if verdict.family > 1 else ""


def sure(verdict: Verdict) -> str:
    """' (simultaneous, adjusted p < 0.001)', to stand behind an amount with its interval."""
    said = ", ".join(filter(None, [simultaneous(verdict).removeprefix(", "), p_words(verdict)]))
    return f" ({said})" if said else ""


def needs(verdicts: Sequence[Verdict]) -> str:
    """' (n too small: at least about 190 samples)' of what is not established: what the nearest of them would take."""
    asked = [v.needed.samples for v in verdicts if v.needed and v.needed.samples < _ENDLESS]
    if not asked:
        return " (n too small)"
    least = "at least " if len(verdicts) > 1 else ""
    return f" (n too small: need {least}about {min(asked):,} samples)"


def lone(verdicts: Sequence[Verdict]) -> str:
    """Why there is no interval: with one unit no number of samples of it would do."""
    return "only one sample" if all(v.n == 1 for v in verdicts) else "all samples are one cluster"


def where(cells: Sequence[CellSummary], order: Sequence[str]) -> str:
    """'0.1, 0.4 to 0.9': neighbouring columns that are to be read alike as a range."""
    runs: list[list[CellSummary]] = []
    for cell in sorted(cells, key=lambda c: order.index(c.column)):
        last = runs[-1][-1] if runs else None
        near = last is not None and order.index(cell.column) == order.index(last.column) + 1
        if last is not None and near and note(cell) == note(last):
            runs[-1].append(cell)
        else:
            runs.append([cell])
    return ", ".join(map(_range, runs))


def _range(run: Sequence[CellSummary]) -> str:
    """Neighbouring cells with the same note."""
    if len(run) == 1:
        return at(run[0])
    noted = f" (each {note(run[0])})" if note(run[0]) else ""
    return f"{asked(run[0])}{' to ' if len(run) > 2 else ', '}{asked(run[-1])}{noted}"
