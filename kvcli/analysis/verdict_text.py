"""The verdict section: what each task loses, at which ratio, with which method, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcli.analysis import wording
from kvcli.analysis.judged import Judged
from kvcli.analysis.marked import Block, Bullets, Paragraph, Section, code, section, strong, user
from kvcli.analysis.tables import DENSE, MATCH, CellSummary, TaskTable, unlike_reference
from kvcli.analysis.verdicts import Kind, Verdict

OVER_BUDGET = (
    "Over budget = the method kept more than was asked for, in some samples at least. A loss is a loss all the same, "
    "but such a cell is not ranked: compare it with other methods at its measured ratio only."
)
MOST_NAMED = 8
"""So many methods of a task are named with their numbers in one point; the others by name alone."""


@dataclass(frozen=True)
class Found:
    """One cell with its verdict."""

    cell: CellSummary
    verdict: Verdict


def verdict_section(tables: Sequence[TaskTable], judged: Judged) -> Section:
    """One point for each task, its worst loss first; what was shown, and what was not, under it."""
    spoken = [t for t in tables if not (t.first_token == "prefill" and twin(t, tables))]
    per_table = [(table, _found(table, judged)) for table in spoken]
    per_table = [(table, found) for table, found in per_table if found]
    if not per_table:
        compared = any(table.rows for table in tables)
        reason = "there is no finished sample of both `full` and a method" if compared else "only `full` was run"
        return section("verdict", "Verdict", Paragraph(f"Nothing can be said: {reason.replace('`', '')}."))
    items = [
        (_lead(table, tables, found, judged.margin), _points(table, found, judged.margin)) for table, found in per_table
    ]
    blocks: list[Block] = [Bullets(items), Paragraph(how_judged(judged))]
    if len(spoken) < len(tables):
        blocks.append(Paragraph("First token compressed only; prefill stands beside it in a section of its own."))
    if any(f.cell.over_budget for _, found in per_table for f in found):
        blocks.append(Paragraph(OVER_BUDGET))
    return section("verdict", "Verdict", *blocks)


def how_judged(judged: Judged) -> str:
    """What stands behind the sentences: the family, the level, the margin."""
    family = judged.family
    if not family.planned:
        fixed = "run.json holds no plan, so they are those found"
    elif family.commands > 1:
        fixed = f"the plan grew by {family.commands} commands; all they planned count"
    else:
        fixed = "fixed when the sweep was planned"
    many = (
        f"The intervals of all {family.size} comparisons hold together with 95 % (each is made at "
        f"{100 * family.level:.4g} %; {fixed}), and p-values are Holm-adjusted"
        if family.size > 1
        else "One comparison, 95 % interval"
    )
    return (
        f"Paired differences to full on the same samples, in percentage points. {many}. No loss beyond "
        f"{margin_text(judged.margin)} = the interval excludes a larger one; unchanged = it excludes a larger change "
        f"either way; the margin is {code('--margin')}, to be stated beforehand. Not established is not no loss."
    )


def margin_text(margin: float) -> str:
    return f"{100 * margin:g} point{'' if margin == 0.01 else 's'}"


def twin(table: TaskTable, tables: Sequence[TaskTable]) -> TaskTable | None:
    """The same prompts with the first token through the compressed cache."""
    key = prompts_of(table)
    return next((t for t in tables if t.first_token == "compressed" and prompts_of(t) == key), None)


def prompts_of(table: TaskTable) -> tuple[object, ...]:
    return (table.task, table.query, table.shots, table.shot_seed, table.shot_order, table.weights)


def label(table: TaskTable, tables: Sequence[TaskTable]) -> str:
    """The task, with what tells its tables apart where it has several."""
    return f"{table.task}{f' ({apart})' if (apart := told_apart(table, tables)) else ''}"


def named(table: TaskTable, tables: Sequence[TaskTable]) -> str:
    """The same, marked as a name."""
    apart = told_apart(table, tables)
    return f"{code(table.task)}{f' ({user(apart)})' if apart else ''}"


def told_apart(table: TaskTable, tables: Sequence[TaskTable]) -> str:
    same = [t for t in tables if t.task == table.task]

    def differ(name: str) -> bool:
        return len({getattr(t, name) for t in same}) > 1

    parts = [
        f"first token {table.first_token}" if differ("first_token") else "",
        f"query {table.query}" if differ("query") else "",
        f"{table.shots} shots" if differ("shots") else "",
        f"shot seed {table.shot_seed}" if differ("shot_seed") else "",
        f"shot order {table.shot_order}" if differ("shot_order") else "",
        table.weights if table.weights != DENSE else "",
    ]
    return ", ".join(filter(None, parts))


def at(cell: CellSummary) -> str:
    """What was asked for, and beside it what was kept where that is more."""
    asked = f"the bytes of {user(cell.column.removeprefix(MATCH))}" if cell.column.startswith(MATCH) else cell.column
    over = f" (over budget, measured {wording.measured(cell.measured_ratio)})" if cell.over_budget else ""
    return f"{asked}{over}"


def amount(verdict: Verdict) -> str:
    """'12.3 points [8.1, 16.4]' of a loss, without signs; of a gain too."""
    sign = -1 if verdict.kind is Kind.LOSS or (verdict.kind is not Kind.GAIN and verdict.value < 0) else 1
    interval = verdict.interval
    ends = "no interval" if interval is None else ", ".join(
        f"{100 * end + 0.0:.1f}" for end in sorted((sign * interval.low, sign * interval.high))
    )  # fmt: skip
    value = f"{100 * sign * verdict.value + 0.0:.1f}"
    return f"{value} point{'' if value == '1.0' else 's'} [{ends}]".replace("-0.0", "0.0")


def needs(verdict: Verdict) -> str:
    if verdict.interval is None:
        return "cannot be judged, all samples are one cluster"
    if verdict.needed is None:
        return f"n = {verdict.n} is too small"
    count = verdict.needed.samples
    return f"need about {count:,}" if count < 10**7 else "no number of samples would do"


def _found(table: TaskTable, judged: Judged) -> list[Found]:
    pairs = ((cell, judged.of(cell)) for cell in table.cells())
    return [Found(cell, verdict) for cell, verdict in pairs if verdict is not None]


def _lead(table: TaskTable, tables: Sequence[TaskTable], found: Sequence[Found], margin: float) -> str:
    apart = told_apart(table, tables)
    counts = sorted({f.verdict.n for f in found})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    facts = ", ".join(filter(None, [code(table.task), user(apart), f"n = {n}"]))
    return f"{strong(table.ability or table.task)} ({facts}): {_headline(table, found, margin)}."


def _headline(table: TaskTable, found: Sequence[Found], margin: float) -> str:
    lost = _of(found, Kind.LOSS)
    if lost and unlike_reference(table):
        return (
            f"a loss is established in {len(lost)} of {len(found)} cells; methods are not ranked, because full is not "
            "where it was published"
        )
    if lost:
        worst = min(lost, key=lambda f: f.verdict.value)
        return f"loses {strong(amount(worst.verdict))} at {at(worst.cell)} with {code(worst.cell.label)}"
    kinds = {f.verdict.kind for f in found}
    within = margin_text(margin)
    if kinds == {Kind.UNCHANGED}:
        return f"unchanged within {within}, wherever it was measured"
    if kinds <= {Kind.UNCHANGED, Kind.NO_LOSS, Kind.GAIN}:
        return f"no loss beyond {within}, wherever it was measured"
    if kinds == {Kind.OPEN}:
        samples = [f.verdict.needed.samples for f in found if f.verdict.needed]
        more = f": need about {min(samples):,} samples or more" if samples and min(samples) < 10**7 else ""
        return f"not established (n too small{more})"
    return f"no loss established; no loss beyond {within} in some cells, not established in others"


def _points(table: TaskTable, found: Sequence[Found], margin: float) -> list[str]:
    within, ranked = margin_text(margin), not unlike_reference(table)
    if len({f.verdict.kind for f in found}) == 1 and len(found) == 1:
        return []
    order = [column.text for column in table.columns]
    heads = {
        Kind.LOSS: "loses", Kind.GAIN: "gains", Kind.NO_LOSS: f"no loss beyond {within}",
        Kind.UNCHANGED: f"unchanged within {within}", Kind.OPEN: "not established",
    }  # fmt: skip
    points = []
    for kind, head in heads.items():
        cells = _of(found, kind)
        if not cells:
            continue
        text = _amounts(cells, ranked, order) if kind in (Kind.LOSS, Kind.GAIN) else _places(cells, order)
        points.append(f"{head}{_more_samples(cells) if kind is Kind.OPEN else ''}: {text}.")
    return points


def _more_samples(found: Sequence[Found]) -> str:
    """How many samples the nearest of open cells would need."""
    asked = [f.verdict for f in found if f.verdict.needed and f.verdict.needed.samples < 10**7]
    if not asked:
        return " (n too small)"
    least = min(asked, key=lambda v: v.needed.samples if v.needed else 0)
    return f" (n too small: {needs(least)}{' or more' if len(found) > 1 else ''})"


def _amounts(found: Sequence[Found], ranked: bool, order: Sequence[str]) -> str:
    """Each method once, the worst first: its largest change in full, then where else."""
    groups = list(_by_method(found).items())
    if ranked:
        groups.sort(key=lambda g: -max(abs(f.verdict.value) for f in g[1]))
    named = []
    for name, cells in groups[:MOST_NAMED]:
        worst = max(cells, key=lambda f: abs(f.verdict.value))
        also = [f.cell for f in cells if f is not worst]
        text = f"{code(name)} {amount(worst.verdict)} at {at(worst.cell)}"
        text += ", less than the margin" if worst.verdict.small else ""
        named.append(text + (f" (also at {where(also, order)})" if also else ""))
    more = [code(name) for name, _ in groups[MOST_NAMED:]]
    return "; ".join(named) + (f"; and {', '.join(more)} (tables below)" if more else "")


def _places(found: Sequence[Found], order: Sequence[str]) -> str:
    """Methods by the sizes they share."""
    shared: dict[str, list[str]] = {}
    for name, cells in _by_method(found).items():
        shared.setdefault(where([f.cell for f in cells], order), []).append(code(name))
    return "; ".join(f"{', '.join(methods)} at {places}" for places, methods in shared.items())


def _by_method(found: Sequence[Found]) -> dict[str, list[Found]]:
    groups: dict[str, list[Found]] = {}
    for f in found:
        groups.setdefault(f.cell.label, []).append(f)
    return groups


def where(cells: Sequence[CellSummary], order: Sequence[str]) -> str:
    """'0.1, 0.4 to 0.9': neighbouring columns as a range; cells over budget by themselves."""
    runs: list[list[CellSummary]] = []
    for cell in sorted(cells, key=lambda c: order.index(c.column)):
        last = runs[-1][-1] if runs else None
        near = last is not None and order.index(cell.column) == order.index(last.column) + 1
        if last is not None and near and not (cell.over_budget or last.over_budget):
            runs[-1].append(cell)
        else:
            runs.append([cell])
    return ", ".join(
        f"{at(run[0])} to {at(run[-1])}" if len(run) > 2 else ", ".join(map(at, run)) for run in runs
    )  # fmt: skip


def _of(found: Sequence[Found], kind: Kind) -> list[Found]:
    return [f for f in found if f.verdict.kind is kind]
