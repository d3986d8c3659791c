"""From a run to its tables: one per task, methods x requested ratios, each cell with n, interval and paired difference.

table.py says what a table is, cells.py how a cell is summed up, doubts.py what is said above it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcli.analysis.reading import names
from kvcli.analysis.reading.load import Cell, Run
from kvcli.analysis.tables import doubts, published
from kvcli.analysis.tables.cells import CellScores, against, cell_scores, rows_of_cells, summary
from kvcli.analysis.tables.established import in_family
from kvcli.analysis.tables.table import DENSE, FULL, MATCH, OWN, Column, Row, TaskTable
from kvcli.results.schema import prompts_name

_FULL = (FULL, Column("full", 1.0, FULL))


class _Key(NamedTuple):
    """What is never mixed."""

    task: str
    first_token: str
    query: str
    shots: int | None
    weights: str
    shot_seed: int
    shot_order: int


_Groups = dict[_Key, dict[tuple[str, "Column"], list[int]]]
"""Per table: (row, column) -> cells, several where they differ only by seed or draw."""


def summarise(run: Run, only: Collection[str] | None = None) -> list[TaskTable]:
    """One table per task, first-token mode, query mode, shots, their seed and order, and kind of weights.

    only: ids of the cells to show (None: all); `full` is shown beside them. Tasks and methods stand in the order of
    run.json, those it does not name in the order of the records.
    """
    rows_of = rows_of_cells(run)
    groups: _Groups = {}
    short = names.shown(cell.method for cell in run.cells)
    columns = _match_columns(run, short)
    shown = None if only is None else {_key(cell) for cell in run.cells if cell.cell_id in only}
    for code, cell in enumerate(run.cells):
        key = _key(cell)
        asked = only is None or cell.cell_id in only or cell.method == FULL
        if len(rows_of[code]) and asked and (shown is None or key in shown):
            groups.setdefault(key, {}).setdefault((row_name(run, cell), column_of(cell, columns)), []).append(code)
    tasks = _order(list(run.meta.get("tasks") or ()), (key.task for key in groups))
    modes = {"compressed": 0, "prefill": 1}
    weights = _order([DENSE, *(run.config("weights") or ())], (key.weights for key in groups))
    keys = sorted(
        groups,
        key=lambda k: (
            tasks[k.task], k.query != "aware", k.shots or 0, k.shot_seed, k.shot_order, weights[k.weights],
            modes.get(k.first_token, 2),
        ),
    )  # fmt: skip
    labels = {row_name(run, cell): short[cell.method] + _decode_text(run, cell) for cell in run.cells}
    return in_family(run.meta, [_table(run, rows_of, key, groups, labels) for key in keys])


def _key(cell: Cell) -> _Key:
    return _Key(
        cell.task, cell.first_token, cell.query, cell.shots, cell.weights, cell.shot_seed, cell.shot_order
    )  # fmt: skip


def _order(first: Iterable[str], then: Iterable[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(dict.fromkeys([*first, *then]))}


def row_name(run: Run, cell: Cell) -> str:
    return cell.method + _decode_text(run, cell)


def _decode_text(run: Run, cell: Cell) -> str:
    """' [r_d 0.5]'; empty where every generated token was kept."""
    if cell.decode is None:
        return ""
    same = cell.ratio if "same" in (run.config("decode_ratios") or ()) else None
    return f" [{names.decoding(json.loads(cell.decode), same)}]"


def _match_columns(run: Run, short: Mapping[str, str]) -> dict[str, Column]:
    """Per method that others are matched to its column, in the order of their names."""
    found = sorted({cell.match for cell in run.cells if cell.match is not None})
    anchors = {_asked(cell): short[cell.method] + _asked(cell)[len(cell.method) :] for cell in run.cells}
    return {
        anchor: Column("match", float(place), f"{MATCH}{anchors.get(anchor, anchor)}")
        for place, anchor in enumerate(found)
    }


def _asked(cell: Cell) -> str:
    """A cell as `match` of others names it."""
    if cell.ratio is not None:
        return f"{cell.method}@{cell.ratio}"
    return cell.method if cell.budget is None else f"{cell.method}@{cell.budget} KV"


def column_of(cell: Cell, matches: Mapping[str, Column] = MappingProxyType({})) -> Column:
    """matches: columns of methods that others are matched to."""
    if cell.method == FULL:
        return _FULL[1]
    own = matches.get(cell.match if cell.match is not None else _asked(cell))
    if own is not None:
        return own
    if cell.ratio is not None:
        return Column("ratio", float(cell.ratio), cell.ratio)
    if cell.budget is not None:
        return Column("budget", float(cell.budget), f"{cell.budget} KV")
    return Column("own", 0.0, OWN)


def _table(
    run: Run, rows_of: Sequence[NDArray[np.int64]], key: _Key, groups: _Groups, labels: Mapping[str, str]
) -> TaskTable:
    task, weights = key.task, key.weights
    scores = {name: cell_scores(run, rows_of, codes) for name, codes in groups[key].items()}
    full, borrowed = _full(run, rows_of, key, groups)
    dense = _full(run, rows_of, key._replace(weights=DENSE), groups)[0] if full and weights != DENSE else None
    columns = tuple(sorted({column for _, column in scores if column != _FULL[1]}, key=lambda c: c.order))
    methods = _order(run.config("methods") or (), (method for method, column in scores if column != _FULL[1]))
    cells = [
        {c.text: summary(run, m, labels.get(m, m), c, scores[m, c], full) for c in columns if (m, c) in scores}
        for m in methods
    ]
    first = run.cells[next(iter(groups[key].values()))[0]]
    facts = run.task_facts(task)
    every = np.concatenate([s.rows for s in scores.values()])
    version, chance = facts.get("version"), facts.get("chance")
    metrics = [run.metrics[code] for code in np.unique(run.metric[every]) if code >= 0]
    table = TaskTable(
        task=task, ability=facts.get("ability") or first.ability,
        metric=metrics[0] if len(metrics) == 1 else facts.get("metric") or first.metric,
        version=None if version is None else str(version), chance=None if chance is None else float(chance),
        first_token=key.first_token, query=key.query, shots=key.shots, n_prompt=_median(run.n_prompt[every]),
        clusters=_cluster_count(run, every), full=summary(run, FULL, *_FULL, full, None) if full else None,
        weights=weights, shot_seed=key.shot_seed, shot_order=key.shot_order,
        too_long=_too_long(facts, key), truncated=_truncated(run, every),
        reference=_reference(run, facts, key.shots) if weights == DENSE else None, harmful=bool(facts.get("harmful")),
        against_dense=against(full, dense)[0] if full and dense else None, columns=columns,
        rows=tuple(Row(m, labels[m], found) for m, found in zip(methods, cells, strict=True) if found),
    )  # fmt: skip
    replaced = sum(s.replaced for s in scores.values())
    return replace(
        table,
        warnings=tuple(
            doubts.sanity(table) + doubts.mixed_metrics(metrics) + [doubts.replaced_warning(replaced)] * (replaced > 0)
        ),
        notes=tuple(
            [doubts.borrowed_note(borrowed)] * bool(borrowed)
            + doubts.left_out(table)
            + doubts.beside_dense(table)
            + doubts.off_match(table)
        ),
    )


def _truncated(run: Run, rows: NDArray[np.int64]) -> int:
    """Samples whose prompt was cut."""
    return len(np.unique(run.sample[rows[run.figures["cut"][rows] > 0]]))


def _too_long(facts: Mapping[str, Any], key: Any) -> int:
    """Prompts that --max-prompt-tokens left out of this table."""
    counts = facts.get("too_long") or {}
    if isinstance(counts, int):  # folders of an earlier version have one number for the task
        return counts
    return int(counts.get(prompts_name(key.shots or 0, key.shot_seed, key.shot_order)) or 0)


def _reference(run: Run, facts: Mapping[str, Any], shots: int | None) -> float | None:
    """The published full-cache score of the run's model, named by its alias or its hub id, with so many shots."""
    stated = facts.get("reference")
    if not isinstance(stated, dict):
        return None
    found = stated.get(published.alias_of(run.model), stated.get(run.model))
    value = found.get(str(shots)) if isinstance(found, dict) else found
    return None if value is None else float(value)


def _full(run: Run, rows_of: Sequence[NDArray[np.int64]], key: _Key, groups: _Groups) -> tuple[CellScores | None, str]:
    """full's scores of this table, or those of the same prompts in another first-token mode and that mode's name."""
    same = [k for k in groups if k._replace(first_token=key.first_token) == key and _FULL in groups[k]]
    for other in sorted(same, key=lambda k: k.first_token != key.first_token):
        return cell_scores(run, rows_of, groups[other][_FULL]), "" if other == key else other.first_token
    return None, ""


def _median(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None


def _cluster_count(run: Run, rows: NDArray[np.int64]) -> int | None:
    """Number of independent units where at least two samples share a cluster, else None."""
    samples, at = np.unique(run.sample[rows], return_index=True)
    cluster = run.cluster[rows][at]
    named = cluster[cluster >= 0]
    distinct = len(np.unique(named))
    return None if distinct == len(named) else distinct + len(samples) - len(named)
