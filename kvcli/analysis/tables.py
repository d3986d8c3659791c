"""From a run to one table per task: methods x requested ratios, each cell with n, interval and paired difference.

First-token modes, query modes, shots (how many, which, in what order) and weights are never mixed: each combination is
a table of its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcli.analysis import names, pass_at_k, published, stats
from kvcli.analysis.load import Cell, Run
from kvcli.analysis.stats import Difference, Interval
from kvcli.results.schema import prompts_name

FULL = "full"
DENSE = "dense"
"""The weights that others are compared with."""
OWN = "own"
"""Column of methods whose own settings decide how much they keep."""
MATCH = "= "
"""Begins the column of methods that keep the bytes of one with a size of its own, which stands in it too."""
OFF_MATCH = 0.01
"""Bytes that are further than this share from those to match are listed."""
NO_ANSWER_LIMIT = 0.2
"""More than this share without an extractable answer, and the score says little about the model."""


@dataclass(frozen=True)
class Column:
    """What was asked for. kind: 'ratio', 'budget' (KV pairs), 'match' (another method's bytes), 'own' (nothing
    was asked for) or 'full'."""

    kind: str
    value: float
    text: str

    @property
    def order(self) -> tuple[str, float]:
        return "zz" if self.kind == "own" else self.kind, self.value


_FULL = (FULL, Column("full", 1.0, FULL))


@dataclass(frozen=True)
class CellSummary:
    """One method at one requested ratio on one task. Shares are of records; n counts samples."""

    method: str
    label: str
    """The method as tables show it."""
    column: str
    cell_ids: tuple[str, ...]
    seeds: int
    """Cells that differ only by seed or draw, averaged within each sample."""
    n: int
    errors: int
    score: float
    interval: Interval | None
    difference: Difference | None
    """Compressed minus full on the samples both have; None for full itself or where full is missing."""
    relative: float | None
    """The paper's delta P = (P_C - P_full) / P_full on those samples; None where full scores 0."""
    measured_ratio: float | None
    records: int
    flags: dict[str, int]
    """Flag -> number of records that carry it; only flags that occur."""
    no_answer: float
    truncated: float
    extra: dict[str, float]
    """Further figures of the scorer: the mean over the records that have one of that name."""

    @property
    def over_budget(self) -> bool:
        """It kept more than was asked for, in some samples at least: a loss is still a loss, but the cell is not to be
        ranked against cells within budget."""
        return self.flags.get("over_budget", 0) > 0

    @property
    def noop(self) -> int:
        return self.flags.get("noop", 0)

    @property
    def verdict(self) -> str:
        """'loss', 'gain', 'open', or 'none' where there is nothing to compare with."""
        return self.difference.verdict if self.difference else "none"


@dataclass(frozen=True)
class Row:
    """One method (with its decode settings, if any), `label` as it is shown; `cells` by the text of the column."""

    method: str
    label: str
    cells: dict[str, CellSummary]


@dataclass(frozen=True)
class TaskTable:
    """One task in one first-token mode and query mode, with one set of shots in one order, and one kind of weights."""

    task: str
    ability: str | None
    metric: str | None
    version: str | None
    chance: float | None
    first_token: str
    query: str
    shots: int | None
    n_prompt: float | None
    """Median prompt tokens."""
    clusters: int | None
    """Independent clusters of samples; None where each sample is its own."""
    full: CellSummary | None
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    weights: str = DENSE
    shot_seed: int = 0
    """Which exemplars."""
    shot_order: int = 0
    """Their order, 0 as they come."""
    too_long: int = 0
    truncated: int = 0
    """Prompts that --truncate cut."""
    """Prompts of the task that were left out for their length."""
    reference: float | None = None
    """The task's published score of this model with the full cache."""
    harmful: bool = False
    """Its prompts must not be shown."""
    against_dense: Difference | None = None
    """full with these weights minus full with dense ones, on the samples both have."""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def cells(self) -> list[CellSummary]:
        """All cells but full's, row by row in the order of the columns."""
        return [row.cells[c.text] for row in self.rows for c in self.columns if c.text in row.cells]


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
    rows_of = _rows_of_cells(run)
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
    return [_table(run, rows_of, key, groups, labels) for key in keys]


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


def _rows_of_cells(run: Run) -> list[NDArray[np.int64]]:
    """For each cell the numbers of its records, by sample: sums do not depend on the order of the lines."""
    order = np.lexsort((run.sample, run.cell))
    ends = np.searchsorted(run.cell[order], np.arange(len(run.cells) + 1))
    return [order[start:end] for start, end in pairwise(ends)]


@dataclass(frozen=True)
class _Scores:
    """Mean score per sample over seeds and draws. value, cluster: [number of samples of the run], NaN = not there."""

    value: NDArray[np.float64]
    cluster: NDArray[np.int32]
    rows: NDArray[np.int64]
    cells: tuple[int, ...]
    replaced: int
    """Cells left out because a later one has the same settings and seed."""


def _table(
    run: Run, rows_of: Sequence[NDArray[np.int64]], key: _Key, groups: _Groups, labels: Mapping[str, str]
) -> TaskTable:
    task, weights = key.task, key.weights
    scores = {name: _scores(run, rows_of, codes) for name, codes in groups[key].items()}
    full, borrowed = _full(run, rows_of, key, groups)
    dense = _full(run, rows_of, key._replace(weights=DENSE), groups)[0] if full and weights != DENSE else None
    columns = tuple(sorted({column for _, column in scores if column != _FULL[1]}, key=lambda c: c.order))
    methods = _order(run.config("methods") or (), (method for method, column in scores if column != _FULL[1]))
    cells = [
        {c.text: _cell(run, m, labels.get(m, m), c, scores[m, c], full) for c in columns if (m, c) in scores}
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
        clusters=_cluster_count(run, every), full=_cell(run, FULL, *_FULL, full, None) if full else None,
        weights=weights, shot_seed=key.shot_seed, shot_order=key.shot_order,
        too_long=_too_long(facts, key), truncated=_truncated(run, every),
        reference=_reference(run, facts, key.shots), harmful=bool(facts.get("harmful")),
        against_dense=_against(full, dense)[0] if full and dense else None, columns=columns,
        rows=tuple(Row(m, labels[m], found) for m, found in zip(methods, cells, strict=True) if found),
    )  # fmt: skip
    replaced = sum(s.replaced for s in scores.values())
    return replace(
        table,
        warnings=tuple(sanity(table) + _mixed_metrics(metrics) + [_replaced_warning(replaced)] * (replaced > 0)),
        notes=tuple(
            [_borrowed_note(borrowed)] * bool(borrowed) + _left_out(table) + _beside_dense(table) + _off_match(table)
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


def _borrowed_note(mode: str) -> str:
    return f"full is taken from first-token mode '{mode}': it evicts nothing, so both give one answer"


def _beside_dense(table: TaskTable) -> list[str]:
    """How full with other weights compares with full of the dense model; the table itself is against the former."""
    if table.weights == DENSE:
        return []
    change = table.against_dense
    if change is None:
        return ["differences are to full with these weights; full with dense weights was not run on these prompts"]
    ends = change.interval
    said = f" [{100 * ends.low:+.1f}, {100 * ends.high:+.1f}]" if ends else ""
    return [
        f"differences are to full with these weights, which itself is {100 * change.value:+.1f} points{said} from full "
        f"with dense weights (n = {change.n})"
    ]


def _left_out(table: TaskTable) -> list[str]:
    if not table.too_long:
        return []
    return [
        f"{table.too_long} prompt{'s' * (table.too_long > 1)} of the task left out, longer than --max-prompt-tokens"
    ]


def _off_match(table: TaskTable) -> list[str]:
    """Which methods do not have the bytes they were to match: listed, not forced."""
    found = []
    for column in (c for c in table.columns if c.kind == "match"):
        cells = [row.cells[column.text] for row in table.rows if column.text in row.cells]
        off = [f"{c.label} ({c.flags['unreachable']} of {c.records})" for c in cells if c.flags.get("unreachable")]
        if off:
            found.append(f"not within {100 * OFF_MATCH:.0f} % of the bytes of {column.text.removeprefix(MATCH)}: "
                         f"{', '.join(off)}")  # fmt: skip
    return found


def _mixed_metrics(metrics: Sequence[str]) -> list[str]:
    if len(metrics) < 2:
        return []
    return [f"scores of {' and '.join(sorted(metrics))} stand side by side: kvcli rescore gives all of them one metric"]


def _replaced_warning(count: int) -> str:
    return (
        f"{count} older cell{'s' * (count > 1)} left out: same method, ratio and seed, but other code, template or "
        "task version; kvcli check names them"
    )


def _scores(run: Run, rows_of: Sequence[NDArray[np.int64]], codes: Sequence[int]) -> _Scores:
    """Averages seeds and draws within each sample; of two cells alike the one written last counts."""
    alike: dict[tuple[int, int], int] = {}
    for code in sorted(codes, key=lambda c: int(rows_of[c].max())):
        cell = run.cells[code]
        alike[-1 if cell.seed is None else cell.seed, cell.draw] = code
    kept = tuple(alike[key] for key in sorted(alike))
    rows = np.concatenate([rows_of[code] for code in kept])
    done = rows[~np.isnan(run.score[rows])]
    count = np.bincount(run.sample[done], minlength=len(run.samples))
    total = np.bincount(run.sample[done], weights=run.score[done], minlength=len(run.samples))
    with np.errstate(invalid="ignore"):
        value = total / count
    cluster = np.full(len(run.samples), -1, np.int32)
    cluster[run.sample[done]] = run.cluster[done]
    return _Scores(value, cluster, rows, kept, len(codes) - len(kept))


def _full(run: Run, rows_of: Sequence[NDArray[np.int64]], key: _Key, groups: _Groups) -> tuple[_Scores | None, str]:
    """full's scores of this table, or those of the same prompts in another first-token mode and that mode's name."""
    same = [k for k in groups if k._replace(first_token=key.first_token) == key and _FULL in groups[k]]
    for other in sorted(same, key=lambda k: k.first_token != key.first_token):
        return _scores(run, rows_of, groups[other][_FULL]), "" if other == key else other.first_token
    return None, ""


def _cell(run: Run, method: str, label: str, column: Column, scores: _Scores, full: _Scores | None) -> CellSummary:
    there = ~np.isnan(scores.value)
    values, clusters = scores.value[there], scores.cluster[there]
    rows = scores.rows
    failed = np.isnan(run.score[rows])
    done = rows[~failed]
    difference, relative = _against(scores, full) if full else (None, None)
    records = len(done)
    return CellSummary(
        method=method, label=label, column=column.text, cell_ids=tuple(run.cells[c].cell_id for c in scores.cells),
        seeds=len(scores.cells), n=len(values), errors=int(failed.sum()),
        score=float(values.mean()) if len(values) else float("nan"),
        interval=stats.score_interval(values, clusters) if len(values) else None,
        difference=difference, relative=relative, measured_ratio=_mean(run.measured_ratio[done]), records=records,
        flags=_flag_counts(run, done), no_answer=_share(~run.answered[done]), truncated=_share(run.truncated[done]),
        extra=_extra(run, scores, done) | _pass_at_k(run, scores),
    )  # fmt: skip


def _extra(run: Run, scores: _Scores, done: NDArray[np.int64]) -> dict[str, float]:
    """Means of the scorer's further figures, without those that only say where a sample stands."""
    standing = run.task_facts(run.cells[scores.cells[0]].task).get("conditions") or ()
    means = {name: _mean(column[done]) for name, column in run.extra.items() if name not in standing}
    return {name: mean for name, mean in means.items() if mean is not None}


def _pass_at_k(run: Run, scores: _Scores) -> dict[str, float]:
    """pass@k where several answers to each problem were drawn."""
    drawn = len({run.cells[c].draw for c in scores.cells}) > 1
    if not drawn or run.cells[scores.cells[0]].metric != pass_at_k.METRIC:
        return {}
    return pass_at_k.figures(run.score[scores.rows], run.sample[scores.rows])


def _against(scores: _Scores, full: _Scores) -> tuple[Difference | None, float | None]:
    """Paired difference and relative change on the samples that both have."""
    both = ~np.isnan(scores.value) & ~np.isnan(full.value)
    if not both.any():
        return None, None
    compressed, reference = scores.value[both], full.value[both]
    difference = stats.paired_difference(compressed, reference, scores.cluster[both])
    base = float(reference.mean())
    return difference, difference.value / base if base > 0 else None


def _flag_counts(run: Run, rows: NDArray[np.int64]) -> dict[str, int]:
    found = {name: int(((run.flags[rows] >> bit) & 1).sum()) for bit, name in enumerate(run.flag_names)}
    return {name: count for name, count in found.items() if count}


def _share(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


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


def worst_flip(run: Run, tables: Sequence[TaskTable]) -> tuple[str, str] | None:
    """(task, sample) where full is right and the cell with the largest loss is wrong: one to look at first."""
    losing = [(cell.difference.value, t, cell) for t in tables for cell in t.cells() if cell.difference]
    if not losing:
        return None
    value, table, cell = min(losing, key=lambda found: found[0])
    if value >= 0 or table.full is None:
        return None
    codes = {c.cell_id: i for i, c in enumerate(run.cells)}
    scores = []
    for summary in (table.full, cell):
        rows = np.isin(run.cell, [codes[i] for i in summary.cell_ids]) & ~np.isnan(run.score)
        scores.append(dict(zip(run.sample[rows].tolist(), run.score[rows].tolist(), strict=True)))
    gaps = {sample: scores[1][sample] - score for sample, score in scores[0].items() if sample in scores[1]}
    return table.task, run.samples[min(gaps, key=lambda sample: gaps[sample])]


def sanity(table: TaskTable) -> list[str]:
    """What makes a table meaningless, said above it."""
    full = table.full
    if full is None:
        return ["full was not run: losses cannot be measured; run it with: kvcli sweep ... (without --no-full)"]
    if not full.n:
        return ["full has no finished sample yet"]
    found = []
    chance = table.chance or 0.0
    if full.interval is not None and full.interval.low <= chance:
        found.append(
            f"full scores {full.score:.2f} [{full.interval.low:.2f}, {full.interval.high:.2f}] (n = {full.n}), not "
            f"clearly above chance ({chance:.2f}): differences here say nothing about compression"
        )
    if unlike_reference(table):
        found.append(unlike_reference(table))
    if full.no_answer > NO_ANSWER_LIMIT:
        found.append(
            f"no answer could be extracted from {100 * full.no_answer:.0f} % of full's outputs: look at them with "
            "kvcli show before reading the scores"
        )
    if full.errors:
        found.append(f"{full.errors} samples of full failed; the same command runs them again")
    return found


def unlike_reference(table: TaskTable) -> str:
    """Why methods are not ranked: full is further from the published score than its interval reaches. Else empty."""
    full, published = table.full, table.reference
    if (
        full is None
        or full.interval is None
        or published is None
        or full.interval.low <= published <= full.interval.high
    ):
        return ""
    return (
        f"full scores {full.score:.3f} [{full.interval.low:.3f}, {full.interval.high:.3f}], but {published:.3f} is "
        "published for this model: prompts or scoring differ from the published ones, so methods are not ranked here"
    )
