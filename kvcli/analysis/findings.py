"""The six findings of KVFundaBench (arXiv:2502.01941v4), tested on a user's own runs. docs/findings.md defines each.

Every test is fixed before the data are seen: which cells, which figure, which limit. An outcome that the data cannot
give is said as such.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from functools import cache
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from kvcli.analysis import averages, matched, names, power, retention, stats, wording
from kvcli.analysis.load import Run
from kvcli.analysis.marked import code
from kvcli.analysis.retention import Relative
from kvcli.analysis.scores import SampleScores
from kvcli.analysis.stats import Codes, Difference, Floats, Interval
from kvcli.analysis.tables import DENSE, CellSummary, TaskTable

NAMES = Path(__file__).parents[1] / "presets" / "kvfundabench_findings.json"
LEVEL = 1 - stats.ALPHA / 6
"""Six findings share the 5 % risk of one false statement."""
DEEP = 0.3
"""The paper speaks of what happens at and below 30 % kept."""
LARGE = 0.1
"""A difference of retention that counts: 10 % of what full has above chance."""
MANY_SHOTS = 50
STEEP = 0.2
"""Finding 6: a loss of more than 20 points."""
FEWEST_TASKS = 5
"""With fewer tasks no order of them has p < 0.05."""


class Outcome(StrEnum):
    HOLDS = "holds"
    NOT = "does not hold"
    OPEN = "not established"
    UNTESTED = "cannot be tested here"


@dataclass(frozen=True)
class Finding:
    """One finding on these data. said: what was seen; needs: what a test, or a clear answer, would take."""

    number: int
    title: str
    outcome: Outcome
    said: str
    needs: str = ""


@dataclass(frozen=True)
class Data:
    """One run as the findings read it."""

    run: Run
    tables: Sequence[TaskTable]
    scores: SampleScores

    def usual(self) -> list[TaskTable]:
        """Dense weights, the question visible, first exemplars in their order, the first token compressed where both
        ways were run: what the paper's tables are about."""
        plain = [
            t
            for t in self.tables
            if t.weights == DENSE and t.query == "aware" and t.shot_seed == 0 and t.shot_order == 0 and t.full
        ]
        modes = {t.first_token for t in plain}
        return [t for t in plain if t.first_token == "compressed" or "compressed" not in modes]


@dataclass(frozen=True)
class Part:
    """The mean over methods of one table at one size, beside full, on the samples that all have."""

    table: TaskTable
    column: str
    methods: tuple[str, ...]
    mean: Floats
    full: Floats
    clusters: Codes

    @property
    def name(self) -> str:
        return self.table.task

    def difference(self) -> Difference:
        return stats.paired_difference(self.mean, self.full, self.clusters)

    def kept(self, level: float) -> Relative:
        return retention.retention(self.mean, self.full, self.table.chance or 0.0, self.clusters, level=level)


def findings(runs: Sequence[Data]) -> list[Finding]:
    """All six. runs: the run the report is about first; finding 2 compares it with the others."""
    data = runs[0]
    return [
        task_dependent(data), model_type(runs), short_prompts(data), chunks_on_many_shots(data), gain_and_loss(data),
        long_generation(data),
    ]  # fmt: skip


def task_dependent(data: Data, level: float = LEVEL) -> Finding:
    """1: tasks keep different shares of their score at the smallest ratio that they have in common."""
    title = "Loss depends on the task"
    tables = _most_shots(data.usual())
    column = _smallest_common(tables)
    parts = _parts(data, tables, column)
    known = {part.name: part for part in parts if part.kept(level).interval is not None}
    if column is None or len(known) < 2:
        return _untested(1, title, "it takes two tasks with full clearly above chance at one ratio of 0.3 or less")
    pairs = list(combinations(known.values(), 2))
    each = 1 - (1 - level) / len(pairs)
    apart = [(a, b, _kept_apart(a, b, each)) for a, b in pairs]
    kept = sorted(((part.kept(level), part) for part in known.values()), key=lambda k: k[0].value or 0.0)
    said = (
        f"At {column}, mean over {len(parts[0].methods)} methods, kept of what full has above chance: "
        + ", ".join(f"{code(part.name)} {_percent(found)}" for found, part in kept)
        + f"; {sum(_excludes(i, 0.0) for *_, i in apart)} of {len(pairs)} pairs of tasks differ."
    )
    if any(_excludes(interval, 0.0) for *_, interval in apart):
        return Finding(1, title, Outcome.HOLDS, said)
    if all(interval and interval.low > -LARGE and interval.high < LARGE for *_, interval in apart):
        return Finding(1, title, Outcome.NOT, said + f" No pair can differ by more than {100 * LARGE:.0f} %.")
    return Finding(1, title, Outcome.OPEN, said, "more samples per task")


def model_type(runs: Sequence[Data], level: float = LEVEL) -> Finding:
    """2: models trained otherwise (instruct, reasoning, base) lose different shares on the same task."""
    title = "Loss depends on how the model was trained"
    asked = "it takes runs of two models with the same task, shots, methods and ratio: kvcli report RUN OTHER-RUN"
    if len({data.run.model for data in runs}) < 2:
        return _untested(2, title, asked)
    compared: list[tuple[Part, Part, Data]] = []
    for other in (data for data in runs[1:] if data.run.model != runs[0].run.model):
        theirs = {_prompts(t): t for t in _most_shots(other.usual())}
        for table in _most_shots(runs[0].usual()):
            twin = theirs.get(_prompts(table))
            column = _smallest_common([table, twin] if twin else [])
            if twin is None or column is None:
                continue
            same = {c.label for c in _cells(table, column)} & {c.label for c in _cells(twin, column)}
            mine, yours = _part(runs[0], table, column, same), _part(other, twin, column, same)
            if mine and yours and mine.kept(level).interval and yours.kept(level).interval:
                compared.append((mine, yours, other))
    if not compared:
        return _untested(2, title, asked)
    each = 1 - (1 - level) / len(compared)
    apart = [_kept_apart(mine, yours, each) for mine, yours, _ in compared]
    said = "; ".join(
        f"{code(mine.name)} at {mine.column}: {code(runs[0].run.model)} keeps {_percent(mine.kept(level))}, "
        f"{code(other.run.model)} {_percent(yours.kept(level))}"
        for mine, yours, other in compared
    )
    return Finding(2, title, *_verdict_of(apart, said))


def short_prompts(data: Data, level: float = LEVEL) -> Finding:
    """3: with fewer exemplars the loss at and below 0.3 is larger."""
    title = "Fewer shots, larger loss"
    compared: list[tuple[Part, Part]] = []
    for tables in _by_task(data.usual()).values():
        shot = sorted((t for t in tables if t.shots), key=lambda t: t.shots or 0)
        column = _smallest_common([shot[0], shot[-1]] if len(shot) > 1 else [])
        if column is None:
            continue
        few, many = _parts(data, [shot[0], shot[-1]], column) or (None, None)
        if few and many and few.kept(level).interval and many.kept(level).interval:
            compared.append((few, many))
    if not compared:
        return _untested(3, title, "it takes one task with two numbers of shots at a ratio of 0.3 or less: "
                         "kvcli sweep --shots 1,8 --ratio 0.1")  # fmt: skip
    each = 1 - (1 - level) / len(compared)
    apart = [_kept_apart(many, few, each) for few, many in compared]
    said = "; ".join(
        f"{code(few.name)} at {few.column}, mean over {len(few.methods)} methods: {few.table.shots} "
        f"shot{'s' * ((few.table.shots or 0) > 1)} keep {_percent(few.kept(level))}, {many.table.shots} keep "
        f"{_percent(many.kept(level))}"
        for few, many in compared
    )
    return Finding(3, title, *_verdict_of(apart, said, claimed=True))


def chunks_on_many_shots(data: Data, level: float = LEVEL) -> Finding:
    """4: with many exemplars, methods that keep chunks lose less than those that keep tokens."""
    title = "Chunks do better with many shots"
    tables = [t for t in data.usual() if (t.shots or 0) >= MANY_SHOTS]
    return _kinds(4, title, data, tables, "chunk", level,
                  f"it takes a task with at least {MANY_SHOTS} shots, {_named('chunk')} and one of {_named('token')} "
                  "at the same measured bytes, at 0.3 or less")  # fmt: skip


def gain_and_loss(data: Data, level: float = LEVEL) -> Finding:
    """5: tasks that gain most from exemplars lose most under compression."""
    title = "What gains most from the prompt loses most"
    gains: dict[str, tuple[float, float]] = {}
    for task, tables in _by_task(data.usual()).items():
        shots = sorted(tables, key=lambda t: t.shots or 0)
        column = _smallest_common(shots[-1:])
        part = _part(data, shots[-1], column) if column and (shots[-1].shots or 0) > 0 else None
        bare = shots[0].full
        if part is None or shots[0].shots != 0 or bare is None or not bare.n or part.kept(level).interval is None:
            continue
        gains[task] = (float(part.full.mean()) - bare.score, 1 - (part.kept(level).value or 0.0))
    listed = "; ".join(
        f"{code(task)} gains {100 * gain:+.1f} points from its shots and loses {100 * loss:.0f} % of its score"
        for task, (gain, loss) in gains.items()
    )
    needs = f"{FEWEST_TASKS} tasks, each with 0 shots and with more, at a ratio of 0.3 or less: --shots 0,8"
    if len(gains) < FEWEST_TASKS:
        here = f" Here there {'is' if len(gains) == 1 else 'are'} {len(gains) or 'none'}: {listed}." if gains else ""
        return _untested(5, title, f"it takes {needs}", here)
    gain, loss = (np.array(values) for values in zip(*gains.values(), strict=True))
    tau, p = _tau(gain, loss)
    said = f"{listed}. Kendall's tau over {len(gains)} tasks is {tau:+.2f}, exact p = {p:.3f}."
    if p >= 1 - level:
        return Finding(5, title, Outcome.OPEN, said, "more tasks: here the tasks are the sample")
    return Finding(5, title, Outcome.HOLDS if tau > 0 else Outcome.NOT, said)


def long_generation(data: Data, level: float = LEVEL) -> Finding:
    """6: long answers lose more than 20 points at and below 0.3, and keeping whole shots loses less than tokens."""
    title = "Long answers are sensitive, and whole shots help"
    tables = [t for t in data.usual() if any(fnmatch(t.task, form) for form in _document()["long_generation"])]
    column = _smallest_common(tables)
    half = 1 - (1 - level) / 2
    parts = [
        p for t in tables if column and (p := _part(data, t, column, {c.label for c in _kind(t, column, "token")}))
    ]
    if not parts:
        return _untested(6, title, "it takes a task of long generation (LongGenBench, tb_longgen) with one of "
                         f"{_named('token')} at a ratio of 0.3 or less")  # fmt: skip
    part = parts[0]
    interval = part.difference().at(half)
    change = _points(part.difference().value, interval)
    steep = f"{code(part.name)} at {part.column}, mean over {_listed(part.methods)}: {change}"
    if interval is None or interval.low <= -STEEP <= interval.high:
        first, need = Outcome.OPEN, f"an interval that lies on one side of -{100 * STEEP:.0f} points: more samples"
    else:
        first, need = (Outcome.HOLDS if interval.high < -STEEP else Outcome.NOT), ""
    loss = f"Loss beyond {100 * STEEP:.0f} points with methods that keep tokens: {first}. {steep}."
    second = _kinds(
        6,
        title,
        data,
        tables,
        "shot",
        half,
        f"whole shots against tokens takes {_named('shot')} and these methods at the same measured bytes",
    )
    both = f"{loss} Whole shots against tokens: {second.outcome}. {second.said}".rstrip()
    outcomes = {first, second.outcome}
    if Outcome.NOT in outcomes:
        outcome = Outcome.NOT
    else:
        outcome = Outcome.HOLDS if outcomes == {Outcome.HOLDS} else Outcome.OPEN
    return Finding(6, title, outcome, both, "; ".join(filter(None, [need, second.needs])))


def _kinds(
    number: int, title: str, data: Data, tables: Sequence[TaskTable], kind: str, level: float, asked: str
) -> Finding:
    """Methods of one kind against those that keep tokens: the mean of each, on the same samples at the same bytes."""
    compared: list[tuple[TaskTable, str, tuple[str, ...], Difference]] = []
    for table in tables:
        pair = _at_same_bytes(table, kind)
        if pair is not None:
            column, mine, others = pair
            values, clusters = data.scores.of(mine.cell_ids)
            mean = averages.over_methods([data.scores.of(c.cell_ids)[0] for c in others])
            both = ~np.isnan(values) & ~np.isnan(mean)
            found = stats.paired_difference(values[both], mean[both], clusters[both])
            compared.append((table, column, tuple(c.label for c in (mine, *others)), found))
    if not compared:
        there = {wording.exact(c.measured_ratio) for table in tables for c in _deep(table, kind)[:3]}
        held = (
            f"; here {_named(kind)} holds {', '.join(sorted(there))}: run the others at that --ratio" if there else ""
        )
        return _untested(number, title, asked + held)
    each = 1 - (1 - level) / len(compared)
    ends = [found.at(each) for *_, found in compared]
    said = "; ".join(
        f"{code(table.task)} at {column}: {code(labels[0])} against {_listed(labels[1:])} {_points(found.value, end)}"
        for (table, column, labels, found), end in zip(compared, ends, strict=True)
    )
    outcome, text, needs = _verdict_of(ends, said, claimed=True, large=0.0)
    needed = power.needed(compared[0][3], 0.0, each)
    if outcome is Outcome.OPEN and needed and needed.samples < 10**7:
        needs = f"about {needed.samples:,} samples"
    return Finding(number, title, outcome, text, needs)


def _verdict_of(
    apart: Sequence[Interval | None], said: str, *, claimed: bool = False, large: float = LARGE
) -> tuple[Outcome, str, str]:
    """claimed: the claim is that the difference is above 0. It does not hold where none can be above `large`."""
    holds = [i for i in apart if i and (i.low > 0 or (not claimed and i.high < 0))]
    if holds:
        return Outcome.HOLDS, f"{said} ({len(holds)} of {len(apart)} shown).", ""
    small = [i for i in apart if i and i.high < large and (claimed or i.low > -large)]
    if small and len(small) == len(apart):
        return Outcome.NOT, f"{said}.", ""
    return Outcome.OPEN, f"{said}.", "more samples"


def _kept_apart(first: Part, second: Part, level: float) -> Interval | None:
    """Difference of two retentions, first - second, taken as independent: where they share samples it is too wide.

    Source: MOVER, Zou, Donner 2008, Stat Med 27:1693.
    """
    a, b = first.kept(level), second.kept(level)
    if a.value is None or b.value is None or a.interval is None or b.interval is None:
        return None
    value = a.value - b.value
    low = value - float(np.hypot(a.value - a.interval.low, b.interval.high - b.value))
    high = value + float(np.hypot(a.interval.high - a.value, b.value - b.interval.low))
    return Interval(low, high, "MOVER")


def _tau(first: Floats, second: Floats) -> tuple[float, float]:
    """Kendall's tau and its exact two-sided p over all orders of the tasks (over 100,000 drawn ones beyond 8)."""
    tau = float(scipy_stats.kendalltau(first, second).statistic)
    if len(first) > 8:
        return tau, float(scipy_stats.kendalltau(first, second).pvalue)
    orders = [float(scipy_stats.kendalltau(first, order).statistic) for order in permutations(second)]
    return tau, float(np.mean(np.abs(orders) >= abs(tau) - 1e-12))


def _parts(data: Data, tables: Sequence[TaskTable], column: str | None) -> list[Part]:
    """At one column with the methods that all these tables have there; none where they share none."""
    if column is None or not tables:
        return []
    shared = set.intersection(*({c.label for c in _cells(t, column)} for t in tables))
    found = [_part(data, table, column, shared) for table in tables]
    return [part for part in found if part] if all(found) else []


def _part(data: Data, table: TaskTable, column: str, labels: set[str] | None = None) -> Part | None:
    cells = [c for c in _cells(table, column) if labels is None or c.label in labels]
    if not cells or table.full is None:
        return None
    full, clusters = data.scores.of(table.full.cell_ids)
    mean = averages.over_methods([data.scores.of(cell.cell_ids)[0] for cell in cells])
    both = ~np.isnan(mean) & ~np.isnan(full)
    if both.sum() < 2:
        return None
    return Part(table, column, tuple(c.label for c in cells), mean[both], full[both], clusters[both])


def _cells(table: TaskTable, column: str) -> list[CellSummary]:
    """Within budget: the others kept more than was asked for."""
    return [c for c in table.cells() if c.column == column and c.difference and not c.over_budget]


def _kind(table: TaskTable, column: str, kind: str) -> list[CellSummary]:
    return _of_kind(_cells(table, column), kind)


def _of_kind(cells: Sequence[CellSummary], kind: str) -> list[CellSummary]:
    wanted = set(_document()[kind])
    return [c for c in cells if not names.spellings(c.method.partition(" [")[0]).isdisjoint(wanted)]


def _at_same_bytes(table: TaskTable, kind: str) -> tuple[str, CellSummary, list[CellSummary]] | None:
    """The smallest cell of the kind, and those that keep tokens with its bytes whatever was asked of them, one for each
    method; all at 0.3 or less. Over budget is no reason here: bytes are what is compared."""
    for mine in _deep(table, kind):
        others: dict[str, CellSummary] = {}
        for cell in _deep(table, "token"):
            if matched.same_bytes(cell.measured_ratio, mine.measured_ratio):
                others.setdefault(cell.label, cell)
        if others:
            return f"{wording.measured(mine.measured_ratio)} measured", mine, list(others.values())
    return None


def _deep(table: TaskTable, kind: str) -> list[CellSummary]:
    """Compared cells of a kind that hold 0.3 or less, the smallest first."""
    limit = DEEP * (1 + matched.TOLERANCE)
    cells = [c for c in _of_kind(table.cells(), kind) if c.difference and (c.measured_ratio or 1.0) <= limit]
    return sorted(cells, key=lambda c: c.measured_ratio or 0.0)


def _smallest_common(tables: Sequence[TaskTable]) -> str | None:
    """The smallest asked ratio, of 0.3 or less, at which every table has a method within budget."""
    if not tables:
        return None
    columns = [
        {c.text: c.value for c in t.columns if c.kind == "ratio" and c.value <= DEEP and _cells(t, c.text)}
        for t in tables
    ]
    shared = set.intersection(*(set(c) for c in columns))
    return min(shared, key=lambda text: columns[0][text], default=None)


def _by_task(tables: Sequence[TaskTable]) -> dict[str, list[TaskTable]]:
    found: dict[str, list[TaskTable]] = {}
    for table in tables:
        found.setdefault(table.task, []).append(table)
    return found


def _most_shots(tables: Sequence[TaskTable]) -> list[TaskTable]:
    """One table of each task."""
    return [max(group, key=lambda t: t.shots or 0) for group in _by_task(tables).values()]


def _prompts(table: TaskTable) -> tuple[Any, ...]:
    return table.task, table.shots, table.first_token, table.version


def _excludes(interval: Interval | None, value: float) -> bool:
    return interval is not None and not interval.low <= value <= interval.high


def _untested(number: int, title: str, needs: str, here: str = "") -> Finding:
    return Finding(number, title, Outcome.UNTESTED, here.strip(), needs)


def _percent(found: Relative) -> str:
    ends = f" [{100 * found.interval.low:.0f}, {100 * found.interval.high:.0f}]" if found.interval else ""
    return "-" if found.value is None else f"{100 * found.value:.0f} %{ends}"


def _points(value: float, interval: Interval | None) -> str:
    ends = f" [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]" if interval else ""
    return f"{100 * value:+.1f} points{ends}"


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(map(code, labels))


def _named(kind: str) -> str:
    return ", ".join(map(code, _document()[kind]))


@cache
def _document() -> dict[str, Any]:
    return dict(json.loads(NAMES.read_text(encoding="utf-8")))
