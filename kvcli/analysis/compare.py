"""Two runs beside each other: paired where model and prompts are the same, else side by side, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcli.analysis import stats, wording
from kvcli.analysis.family import Family
from kvcli.analysis.findings import Data
from kvcli.analysis.marked import Bullets, Grid, Paragraph, Section, code, section, user
from kvcli.analysis.stats import Difference
from kvcli.analysis.tables import CellSummary, TaskTable
from kvcli.analysis.verdict_text import named
from kvcli.analysis.verdicts import MARGIN, Kind, Verdict, judge_all
from kvcli.results.schema import prompts_name

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
    reason = unlike_models(first, second)
    found = [both for table in first.tables for both in _cells(first, second, table, reason)]
    if not found:
        return section(
            "compared",
            title,
            Paragraph("The runs have no task with the same mode and shots, method and size in common."),
        )
    paired = [both for both in found if both.difference is not None]
    refused: dict[str, list[str]] = {}
    for both in found:
        if both.why:
            refused.setdefault(both.why, []).append(named(both.table, first.tables))
    notes = [f"Not paired, because {why}: {', '.join(dict.fromkeys(tasks))}." for why, tasks in refused.items()]
    verdicts = judge_all([both.difference for both in paired], Family(max(len(paired), 1), planned=False), margin)
    said = dict(zip(map(id, paired), verdicts, strict=True))
    rows = [_row(both, said.get(id(both)), first) for both in found]
    mine, theirs = user(first.run.name), user(second.run.name)
    head = (
        "task", "method", "asked", f"{mine} [95 %]", f"{theirs} [95 %]", f"to its full, {mine}",
        f"to its full, {theirs}", "first - second, points [simultaneous]", "verdict",
    )  # fmt: skip
    explained = (
        f"First is {mine} ({code(first.run.model)}), second {theirs} ({code(second.run.model)}). Paired: same model, "
        f"same prompts, same samples; the {len(paired)} paired differences are a family of their own (intervals hold "
        "together, p is Holm-adjusted). Differences to full are each run's own, unadjusted."
    )
    grid = Grid(head, rows, frozenset({3, 4, 5, 6, 7}))
    return section("compared", title, Bullets.of(notes) if notes else None, Paragraph(explained), grid)


def _row(both: Both, verdict: Verdict | None, first: Data) -> list[str]:
    change, kind, name = "", "side by side", first.run.name
    if verdict is not None:
        change = f"{wording.points(verdict.value)} {wording.points_interval(verdict.interval)}"
        kind = {Kind.LOSS: f"{name} is behind", Kind.GAIN: f"{name} is ahead"}.get(verdict.kind, str(verdict.kind))
    return [
        named(both.table, first.tables), code(both.first.label), both.first.column, _score(both.first),
        _score(both.second), _loss(both.first), _loss(both.second), change, user(kind),
    ]  # fmt: skip


def unlike_models(first: Data, second: Data) -> str:
    """Why no cell of the two runs may be paired; empty where they may."""
    a, b = (_mapping(data.run.meta.get("identity")) for data in (first, second))
    if not a or not b:
        return "run.json of one of them does not say which model and template were used"
    for name in (*SAME_MODEL, *SAME_PROMPTS, *SAME_ANSWERS):
        if a.get(name) != b.get(name):
            return f"{name.replace('_', ' ')} is {user(a.get(name))} here and {user(b.get(name))} there"
    return ""


def _cells(first: Data, second: Data, table: TaskTable, reason: str) -> list[Both]:
    other = next((t for t in second.tables if _key(t) == _key(table)), None)
    if other is None:
        return []
    why = reason or _unlike_tasks(first, second, table, other)
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


def _unlike_tasks(first: Data, second: Data, table: TaskTable, other: TaskTable) -> str:
    if table.version != other.version:
        return f"the task's version is {user(table.version)} here and {user(other.version)} there"
    if table.metric != other.metric:
        return f"the score is {user(table.metric)} here and {user(other.metric)} there"
    a, b = (_mapping(_mapping(d.run.task_facts(table.task)).get("data")) for d in (first, second))
    which = prompts_name(table.shots or 0, table.shot_seed, table.shot_order)
    if a.get(which) != b.get(which):
        return "the first prompt is another one: other data, shots or template"
    return ""


def _key(table: TaskTable) -> tuple[Any, ...]:
    return (table.task, table.first_token, table.query, table.shots, table.shot_seed, table.shot_order, table.weights)


def _score(cell: CellSummary) -> str:
    return f"{wording.score(cell.score)} {wording.score_interval(cell.interval)} (n = {cell.n})"


def _loss(cell: CellSummary) -> str:
    change = cell.difference
    return "" if change is None else f"{wording.points(change.value)} {wording.points_interval(change.interval)}"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
