"""The verdict section: what each task loses, at which ratio, with which method, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from kvcli.analysis.marked import Block, Bullets, Paragraph, Section, code, section, strong, user
from kvcli.analysis.reports import phrases
from kvcli.analysis.reports.found import MOST_NAMED, Found, by_method, of_kind, open_points, places
from kvcli.analysis.reports.naming import told_apart
from kvcli.analysis.statistics.family import Family
from kvcli.analysis.statistics.verdicts import Kind, Verdict
from kvcli.analysis.tables.doubts import NOTHING, nothing_to_say, unlike_reference
from kvcli.analysis.tables.judged import Judged
from kvcli.analysis.tables.table import TaskTable, dense_twin, joined, twin

OVER_BUDGET = (
    "Over budget = the method kept more than was asked for. A loss is a loss all the same, but such a cell is not "
    "ranked: compare it with other methods at its measured ratio only."
)
Item = tuple[str, Sequence[str]]


def verdict_section(tables: Sequence[TaskTable], judged: Judged) -> Section:
    """One point for each task, its worst loss first; what was shown, and what was not, under it."""
    every = joined(tables)
    spoken = [t for t in every if not (t.first_token == "prefill" and twin(t, every))]
    per_table = [(table, _found(table, judged)) for table in spoken]
    items: list[Item] = []
    for table, found in per_table:
        items += [_item(table, every, found, judged.margin)] if found else []
        items += _weights_item(table, every, judged)
    if not items:
        compared = any(table.rows for table in tables)
        reason = "there is no finished sample of both full and a method" if compared else "only full was run"
        return section("verdict", "Verdict", Paragraph(f"Nothing can be said: {reason}."))
    blocks: list[Block] = [Bullets(items), Paragraph(how_judged(judged))]
    if len(spoken) < len(every):
        blocks.append(Paragraph("First token compressed only; prefill stands beside it in a section of its own."))
    if any(f.cell.over_budget for table, found in per_table if not nothing_to_say(table) for f in found):
        blocks.append(Paragraph(OVER_BUDGET))
    return section("verdict", "Verdict", *blocks)


def how_judged(judged: Judged) -> str:
    """What stands behind the sentences: the family, the level, the margin."""
    family = judged.family
    many = (
        f"The intervals of all {family.size:,} comparisons hold together with 95 % (each is made at "
        f"{100 * family.level:.4g} %; {_fixed(family)}), and p-values are Holm-adjusted"
        if family.size > 1
        else "One comparison, 95 % interval"
    )
    within = phrases.margin_text(judged.margin)
    return (
        f"Paired differences to full on the same samples, in percentage points. {many}. {_looked(family)}No loss "
        f"beyond {within} = the interval excludes a larger one; unchanged = it excludes a larger change either way; "
        f"the margin is {code('--margin')}, to be stated beforehand. Not established is not no loss."
    )


def _fixed(family: Family) -> str:
    """When it was known what would be compared."""
    if not family.planned:
        return "run.json holds no plan, so they are those found"
    if family.grown:
        later = "a later command" if family.grown == 1 else f"{family.grown} later commands"
        return f"the plan grew by {later}; all that was planned counts"
    return "fixed when the sweep was planned"


def _looked(family: Family) -> str:
    """Samples added after a look: each further look is one more chance of an error."""
    if not family.looks:
        return ""
    sizes = ", then ".join("all" if size is None else f"{size:,}" for size in family.looks)
    command = "a later command" if len(family.looks) == 2 else "later commands"
    return f"Samples were added by {command} ({sizes}): the 95 % hold for one look. "


def _found(table: TaskTable, judged: Judged) -> list[Found]:
    pairs = ((cell, judged.of(cell)) for cell in table.cells())
    return [Found(cell, verdict) for cell, verdict in pairs if verdict is not None]


def _item(table: TaskTable, tables: Sequence[TaskTable], found: Sequence[Found], margin: float) -> Item:
    """What a task's methods lose. Controls lead only where nothing else was run."""
    nothing = nothing_to_say(table)
    if nothing:
        return _lead(table, tables, found, f"{NOTHING}: {nothing}"), []
    methods = [f for f in found if not phrases.is_control(f.cell)] or list(found)
    controls = [f for f in found if f not in methods]
    points = _points(table, methods, margin) if len(methods) > 1 else []
    if controls:
        points.append(f"controls: {' '.join(_points(table, controls, margin))}")
    return _lead(table, tables, found, _headline(table, methods, margin)), points


def _lead(table: TaskTable, tables: Sequence[TaskTable], found: Sequence[Found], said: str) -> str:
    counts = sorted({f.verdict.n for f in found})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    facts = ", ".join(filter(None, [code(table.task), user(told_apart(table, tables)), f"n = {n}"]))
    return f"{strong(table.ability or table.task)} ({facts}): {said}."


def _weights_item(table: TaskTable, tables: Sequence[TaskTable], judged: Judged) -> list[Item]:
    """What other weights cost before anything is compressed: their full against full of the dense model."""
    verdict = judged.of(table.full) if table.full is not None else None
    if table.full is None or verdict is None:
        return []
    dense = dense_twin(table, tables)
    nothing = nothing_to_say(dense) if dense else ""
    said = f"{NOTHING}, with dense weights {nothing}" if nothing else _cost(verdict, judged.margin)
    said = f"full with these weights against full with dense weights: {said}"
    return [(_lead(table, tables, [Found(table.full, verdict)], said), [])]


def _cost(verdict: Verdict, margin: float) -> str:
    if verdict.interval is None:
        return f"cannot be judged, {phrases.lone([verdict])}"
    if verdict.kind in (Kind.LOSS, Kind.GAIN):
        small = ", less than the margin" if verdict.small else ""
        return f"{_heads(margin)[verdict.kind]} {strong(phrases.magnitude(verdict))}{phrases.sure(verdict)}{small}"
    return _heads(margin)[verdict.kind] + (phrases.needs([verdict]) if verdict.kind is Kind.OPEN else "")


def _headline(table: TaskTable, found: Sequence[Found], margin: float) -> str:
    lost = of_kind(found, Kind.LOSS)
    if lost and unlike_reference(table):
        return (
            f"a loss is established in {_of_cells(len(lost), len(found))}; methods are not ranked, because full is not "
            "where it was published"
        )
    if lost:
        own = [f for f in lost if not f.cell.all_fallback]
        if not own:
            return f"a loss is established only where methods fell back: {_beyond(lost)}"
        worst = min(own, key=lambda f: f.verdict.value)
        size = strong(phrases.magnitude(worst.verdict)) + phrases.sure(worst.verdict)
        said = f"loses {size} at {phrases.at(worst.cell)} with {code(worst.cell.label)}{_spread(table, found)}"
        more = _beyond([f for f in lost if f not in own and f.verdict.value <= worst.verdict.value])
        return said + (f"; as much or more only where methods fell back: {more}" if more else "")
    known = [f for f in found if f.verdict.interval is not None]
    if not known:
        return f"cannot be judged, {phrases.lone([f.verdict for f in found])}"
    kinds = {f.verdict.kind for f in known}
    within = phrases.margin_text(margin)
    everywhere = "wherever it was measured" if len(known) == len(found) else "wherever it can be judged"
    if kinds == {Kind.UNCHANGED}:
        return f"unchanged within {within}, {everywhere}"
    if kinds <= {Kind.UNCHANGED, Kind.NO_LOSS, Kind.GAIN}:
        return f"no loss beyond {within}, {everywhere}"
    if kinds == {Kind.OPEN}:
        own = [f for f in known if not f.cell.all_fallback] or known
        largest = max(own, key=lambda f: abs(f.verdict.value))
        kind = " (simultaneous)" * (largest.verdict.family > 1)
        seen = f"{phrases.signed(largest.verdict)}{kind} at {phrases.at(largest.cell)} with {code(largest.cell.label)}"
        what = "" if len(known) == 1 else "; the largest difference seen"
        return f"not established{phrases.needs([f.verdict for f in known])}{what}: {seen}"
    return f"no loss established; no loss beyond {within} in some cells, not established in others"


def _beyond(found: Sequence[Found]) -> str:
    """Losses in cells in which no output is of the method named, the largest of each method."""
    worst = (min(cells, key=lambda f: f.verdict.value) for cells in by_method(found).values())
    return "; ".join(f"{code(f.cell.label)} {-100 * f.verdict.value:.1f} points at {phrases.at(f.cell)}" for f in worst)


def _of_cells(count: int, whole: int) -> str:
    return "its one cell" if whole == 1 else f"{count} of its {whole} cells"


def _spread(table: TaskTable, found: Sequence[Found]) -> str:
    """'; established at 0.1 with 6 of 8 methods, at 0.3 with 2, at 0.5 with none': where else, at one glance."""
    places: list[str] = []
    last = 0
    for column in table.columns:
        here = [f for f in found if f.cell.column == column.text]
        if here:
            of = f" of {len(here)} method{'s' * (len(here) != 1)}" * (len(here) != last)
            places.append(f"at {phrases.asked(here[0].cell)} with {len(of_kind(here, Kind.LOSS)) or 'none'}{of}")
            last = len(here)
    return f"; established {', '.join(places)}" if len(places) > 1 and len(found) > len(places) else ""


def _points(table: TaskTable, found: Sequence[Found], margin: float) -> list[str]:
    """One sentence for each kind of verdict, and one for what cannot have any."""
    order = [column.text for column in table.columns]
    points = []
    for kind, head in _heads(margin).items():
        cells = [f for f in of_kind(found, kind) if f.verdict.interval is not None]
        if not cells:
            continue
        if kind is Kind.OPEN:
            points += open_points(cells, order)
        elif kind in (Kind.LOSS, Kind.GAIN):
            points.append(f"{head}: {_amounts(cells, not unlike_reference(table), order)}.")
        else:
            points.append(f"{head}: {places(cells, order)}.")
    alone = [f for f in found if f.verdict.interval is None]
    if alone:
        points.append(f"cannot be judged ({phrases.lone([f.verdict for f in alone])}): {places(alone, order)}.")
    return points


def _heads(margin: float) -> dict[Kind, str]:
    within = phrases.margin_text(margin)
    return {
        Kind.LOSS: "loses", Kind.GAIN: "gains", Kind.NO_LOSS: f"no loss beyond {within}",
        Kind.UNCHANGED: f"unchanged within {within}", Kind.OPEN: "not established",
    }  # fmt: skip


def _amounts(found: Sequence[Found], ranked: bool, order: Sequence[str]) -> str:
    """Each method once, the worst first: its largest change in full, then where else."""
    groups = list(by_method(found).items())
    if ranked:
        groups.sort(key=lambda g: -max(abs(f.verdict.value) for f in g[1]))
    named, alike = [], _same_p([f for _, cells in groups for f in cells])
    for name, cells in groups[:MOST_NAMED]:
        worst = max(cells, key=lambda f: abs(f.verdict.value))
        also = [f.cell for f in cells if f is not worst]
        place = phrases.at(worst.cell, f"also at {phrases.where(also, order)}" if also else "")
        size = phrases.magnitude(worst.verdict) if alike else phrases.amount(worst.verdict)
        named.append(f"{code(name)} {size} at {place}{', less than the margin' if worst.verdict.small else ''}")
    more = [code(name) for name, _ in groups[MOST_NAMED:]]
    left = f"; and {', '.join(more)} (tables below)" if more else ""
    return "; ".join(named) + left + (f"; all {alike}" if alike else "")


def _same_p(found: Sequence[Found]) -> str:
    """'adjusted p < 0.001' where it is so of several cells, of all of them: it is said once then. Else empty."""
    texts = {phrases.p_words(f.verdict) for f in found}
    return texts.pop() if len(found) > 1 and len(texts) == 1 else ""
