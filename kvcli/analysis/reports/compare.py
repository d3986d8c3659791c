"""Two runs beside each other: paired where model and prompts are the same, else side by side, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcli.analysis.findings import Data
from kvcli.analysis.marked import Bullets, Grid, Paragraph, Section, code, section, user
from kvcli.analysis.reports import phrases
from kvcli.analysis.reports.naming import named
from kvcli.analysis.statistics import stats
from kvcli.analysis.statistics.family import Family
from kvcli.analysis.statistics.stats import Difference
from kvcli.analysis.statistics.verdicts import MARGIN, Kind, Verdict, judge_all
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.table import FULL, CellSummary, TaskTable
from kvcli.results.schema import prompts_name

MOST_NAMED = 3
"""So many things in which two runs differ are named; the others are counted."""
MOST_LOST = 8
"""So many cells of one verdict are named with their numbers; the others are in the table."""
SAME_MODEL = ("model", "revision")
SAME_PROMPTS = ("tokenizer", "template", "system", "thinking", "truncate")
SAME_ANSWERS = ("temperature", "top_p", "max_new_tokens", "ignore_eos")


@dataclass(frozen=True)
class Both:
    """One cell that both runs have. why: what keeps it from being paired; empty where it was."""

    table: TaskTable
    first: CellSummary
    second: CellSummary
    difference: Difference | None
    why: str


def compare_section(first: Data, second: Data, margin: float = MARGIN) -> Section:
    """Every cell of the same task, prompts, method and size that both have; first - second where it may be paired."""
    title = f"Compared with {second.run.name}"
    reasons = unlike_models(first, second)
    found = [both for table in first.tables for both in _cells(first, second, table, reasons)]
    if not found:
        return section(
            "compared",
            title,
            Paragraph("The runs have no task with the same mode and shots in common."),
        )
    paired = [both for both in found if both.difference is not None]
    refused: dict[str, list[str]] = {}
    for both in found:
        if both.why:
            refused.setdefault(both.why, []).append(named(both.table, first.tables))
    notes = [f"Not paired, because {why}: {', '.join(dict.fromkeys(tasks))}." for why, tasks in refused.items()]
    notes += _other_profiles(first, second, found)
    verdicts = judge_all([both.difference for both in paired], Family(max(len(paired), 1), planned=False), margin)
    said = dict(zip(map(id, paired), verdicts, strict=True))
    rows = [_row(both, said.get(id(both)), first) for both in found]
    mine, theirs = user(first.run.name), user(second.run.name)
    head = (
        "task", "method", "asked", f"{mine} [95 %]", f"{theirs} [95 %]", f"to its full, {mine}",
        f"to its full, {theirs}", "first - second, points [simultaneous]", "verdict",
    )  # fmt: skip
    explained = (
        f"First is {code(first.run.name)} (model {code(first.run.model)}), second {code(second.run.name)} (model "
        f"{code(second.run.model)}). "
        f"{_paired(len(paired))} Differences to full are each run's own, unadjusted."
    )
    grid = Grid(head, rows, frozenset({3, 4, 5, 6, 7}))
    lines = [*_nothing_shared(first, second, found), *_verdicts(paired, said, first), *notes]
    return section("compared", title, Bullets.of(lines) if lines else None, Paragraph(explained), grid)


def _nothing_shared(first: Data, second: Data, found: Sequence[Both]) -> list[str]:
    """Why there is nothing but `full` to compare: other methods, or the same ones at other sizes."""
    if any(both.first.column != FULL for both in found):
        return []
    tasks = {both.table.task for both in found}
    here, there = ([c for t in d.tables if t.task in tasks for c in t.cells()] for d in (first, second))
    mine, theirs = (dict.fromkeys(cell.label for cell in cells) for cells in (here, there))
    shared = mine.keys() & theirs.keys()
    if not shared:
        return [f"No method in common: {_names(mine)} / {_names(theirs)}."]
    sizes = (dict.fromkeys(c.column for c in cells if c.label in shared) for cells in (here, there))
    both = [label for label in mine if label in shared]
    return [f"No size in common of {_names(both)}: {' / '.join(map(_names, sizes))}."]


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(code, names)) or "none"


def _verdicts(paired: Sequence[Both], said: Mapping[int, Verdict | None], first: Data) -> list[str]:
    """One line for each kind of verdict: what is established by name, the others as a number."""
    lines = []
    judged = [(both, verdict) for both in paired if (verdict := said.get(id(both))) is not None]
    for kind in Kind:
        those = [(both, verdict) for both, verdict in judged if verdict.kind is kind]
        if not those:
            continue
        head = f"{_outcome(kind, first, those[0][1].margin)} in {len(those)} of {len(judged)} pairs"
        if kind in (Kind.LOSS, Kind.GAIN):
            those.sort(key=lambda pair: -abs(pair[1].value))
            named_ = [_amount(both, verdict, first) for both, verdict in those[:MOST_LOST]]
            more = len(those) - len(named_)
            head += f": {'; '.join(named_)}{f'; and {more} more' if more else ''}"
        lines.append(f"{head}.")
    return lines


def _outcome(kind: Kind, first: Data, margin: float) -> str:
    name, within = user(first.run.name), phrases.margin_text(margin)
    return {
        Kind.LOSS: f"{name} is behind", Kind.GAIN: f"{name} is ahead", Kind.UNCHANGED: f"Unchanged within {within}",
        Kind.NO_LOSS: f"{name} is no more than {within} behind", Kind.OPEN: "Not established",
    }[kind]  # fmt: skip


def _amount(both: Both, verdict: Verdict, first: Data) -> str:
    method = "" if both.first.column == FULL else f" at {phrases.asked(both.first)}"
    return f"{named(both.table, first.tables)} {code(both.first.label)}{method} {phrases.magnitude(verdict)}"


def _paired(count: int) -> str:
    """What was paired, and what its intervals hold for."""
    if not count:
        return "Nothing is paired: that takes the same model, prompts and samples."
    family = (
        f"the {count} paired differences are a family of their own (intervals hold together, p is Holm-adjusted)"
        if count > 1
        else "the one paired difference has a 95 % interval"
    )
    return f"Paired: same model, same prompts, same samples; {family}."


def _other_profiles(first: Data, second: Data, found: list[Both]) -> list[str]:
    """Methods that read how much heads retrieve from other numbers in the second run."""
    lines: dict[str, None] = {}
    for both in found:
        here, there = _profiles(first, both.first), _profiles(second, both.second)
        if here != there:
            method = code(both.first.label)
            lines[f"{method} read head profile {', '.join(here)} here and {', '.join(there)} there."] = None
    return list(lines)


def _profiles(data: Data, cell: CellSummary) -> list[str]:
    cells = _mapping(data.run.meta.get("cells"))
    return sorted({str(p) for name in cell.cell_ids if (p := _mapping(cells.get(name)).get("head_profile"))})


def _row(both: Both, verdict: Verdict | None, first: Data) -> list[str]:
    change, kind, name = "", "side by side", first.run.name
    if verdict is not None:
        change = f"{wording.points(verdict.value)} {wording.points_interval(verdict.interval)}"
        kind = {Kind.LOSS: f"{name} is behind", Kind.GAIN: f"{name} is ahead"}.get(verdict.kind, str(verdict.kind))
    return [
        named(both.table, first.tables), code(both.first.label), both.first.column, _score(both.first),
        _score(both.second), _loss(both.first), _loss(both.second), change, user(kind),
    ]  # fmt: skip


def unlike_models(first: Data, second: Data) -> list[str]:
    """All that keeps cells of the two runs from being paired, whatever the task."""
    a, b = (_mapping(data.run.meta.get("identity")) for data in (first, second))
    if not a or not b:
        return ["run.json of one of them does not say which model and template were used"]
    return [
        f"{name.replace('_', ' ')} is {user(a.get(name))} here and {user(b.get(name))} there"
        for name in (*SAME_MODEL, *SAME_PROMPTS, *SAME_ANSWERS)
        if a.get(name) != b.get(name)
    ]


def _listed(reasons: Sequence[str]) -> str:
    """The first few, and how many more; empty for none."""
    named, more = reasons[:MOST_NAMED], len(reasons) - MOST_NAMED
    return "; ".join([*named, *([f"and {more} more difference{'s' * (more > 1)}"] if more > 0 else [])])


def _cells(first: Data, second: Data, table: TaskTable, reasons: Sequence[str]) -> list[Both]:
    other = next((t for t in second.tables if _key(t) == _key(table)), None)
    if other is None:
        return []
    why = _listed([*reasons, *_unlike_tasks(first, second, table, other)])
    theirs = {(c.method, c.column): c for c in ([other.full] if other.full else []) + other.cells()}
    mine = ([table.full] if table.full else []) + table.cells()
    pairs = [(cell, theirs[cell.method, cell.column]) for cell in mine if (cell.method, cell.column) in theirs]
    return [_both(first, second, table, a, b, why) for a, b in pairs]


def _both(first: Data, second: Data, table: TaskTable, a: CellSummary, b: CellSummary, why: str) -> Both:
    if why:
        return Both(table, a, b, None, why)
    x, clusters = first.scores.of(a.cell_ids)
    y, _ = second.scores.of(b.cell_ids)
    place = {name: i for i, name in enumerate(second.run.samples)}
    at = np.array([place.get(name, -1) for name in first.run.samples])
    other = np.where(at >= 0, y[at], np.nan)
    both = ~np.isnan(x) & ~np.isnan(other)
    if not both.any():
        return Both(table, a, b, None, "they have no sample in common")
    return Both(table, a, b, stats.paired_difference(x[both], other[both], clusters[both]), "")


def _unlike_tasks(first: Data, second: Data, table: TaskTable, other: TaskTable) -> list[str]:
    found = []
    if table.version != other.version:
        found.append(f"the task's version is {user(table.version)} here and {user(other.version)} there")
    if table.metric != other.metric:
        found.append(f"the score is {user(table.metric)} here and {user(other.metric)} there")
    a, b = (_mapping(_mapping(d.run.task_facts(table.task)).get("data")) for d in (first, second))
    which = prompts_name(table.shots or 0, table.shot_seed, table.shot_order)
    if a.get(which) != b.get(which):
        found.append("the first prompt is another one (other data, shots or template)")
    return found


def _key(table: TaskTable) -> tuple[Any, ...]:
    return (table.task, table.first_token, table.query, table.shots, table.shot_seed, table.shot_order, table.weights)


def _score(cell: CellSummary) -> str:
    """With the shares of outputs that say nothing, and the flags it is to be read with."""
    facts = "; ".join(filter(None, [f"n = {cell.n}", wording.outputs(cell), phrases.note(cell)]))
    return f"{wording.score(cell.score)} {wording.score_interval(cell.interval)} ({facts})"


def _loss(cell: CellSummary) -> str:
    change = cell.difference
    return "" if change is None else f"{wording.points(change.value)} {wording.points_interval(change.interval)}"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
