"""What a table of a report is: one task, its columns and rows, and what is known of each cell.

First-token modes, query modes, shots (how many, which, in what order) and weights are never mixed: each combination is
a table of its own. build.py makes them from a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvcli.analysis.statistics.stats import Difference, Interval

FULL = "full"
DENSE = "dense"
"""The weights that others are compared with."""
OWN = "own"
"""Column of methods whose own settings decide how much they keep."""
MATCH = "= "
"""Begins the column of methods that keep the bytes of one with a size of its own, which stands in it too."""


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
    incoherent: float | None = None
    """Share of outputs that are no text; None where nothing was generated."""
    repeats: tuple[int, int] = (1, 1)
    """How many seeds and how many draws `seeds` counts."""
    asked: int | None = None
    """Records that the folder's commands asked for; None where run.json does not say."""
    kl: float | None = None
    """Mean KL divergence from full's predictions; None where no record has one."""
    top1: float | None = None
    """Mean share of predictions that name the token that full's name."""
    in_family: str = "none"
    """'loss' or 'gain' where established with all comparisons of the sweep considered (judged.py), 'open' where not,
    'none' where there is nothing to compare with or full says nothing (doubts.py). The margin plays no part in it."""

    @property
    def over_budget(self) -> bool:
        """It kept more than was asked for, in some samples at least: a loss is still a loss, but the cell is not to be
        ranked against cells within budget."""
        return self.flags.get("over_budget", 0) > 0

    @property
    def all_fallback(self) -> bool:
        """No output is of the method its name says."""
        return 0 < self.records == self.flags.get("fallback", 0)

    @property
    def noop(self) -> int:
        return self.flags.get("noop", 0)

    @property
    def verdict(self) -> str:
        """'loss', 'gain', 'open', or 'none' where there is nothing to compare with. Of this cell alone: what outputs
        call established is `in_family`."""
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
    """Prompts of the task that were left out for their length."""
    truncated: int = 0
    """Prompts that --truncate cut."""
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

    def prompts(self) -> tuple[object, ...]:
        """All but how the first token is computed; the weights last."""
        return (self.task, self.query, self.shots, self.shot_seed, self.shot_order, self.weights)


NO_MODE = "n/a"
"""First-token mode of methods that know no two: they drop tokens while they read the prompt."""


def joined(tables: Sequence[TaskTable]) -> list[TaskTable]:
    """Rows of methods without first-token modes stand with the others of the same prompts, compressed first."""
    kept = [t for t in tables if t.first_token != NO_MODE]
    extra: dict[tuple[object, ...], list[TaskTable]] = {}
    alone = []
    for table in tables:
        if table.first_token == NO_MODE and twin(table, kept) is not None:
            extra.setdefault(table.prompts(), []).append(table)
        elif table.first_token == NO_MODE:
            alone.append(table)
    home = {id(twin(t, kept)) for more in extra.values() for t in more}
    found = [_with_rows(t, extra[t.prompts()]) if id(t) in home else t for t in kept]
    return [*found, *alone]


def _with_rows(table: TaskTable, more: Sequence[TaskTable]) -> TaskTable:
    columns = dict.fromkeys([*table.columns, *(c for t in more for c in t.columns)])
    rows = (*table.rows, *(row for t in more for row in t.rows))
    return replace(table, columns=tuple(sorted(columns, key=lambda c: c.order)), rows=rows)


def twin(table: TaskTable, tables: Sequence[TaskTable]) -> TaskTable | None:
    """The same prompts with the first token through the compressed cache."""
    return next((t for t in tables if t.first_token == "compressed" and t.prompts() == table.prompts()), None)


def dense_twin(table: TaskTable, tables: Sequence[TaskTable]) -> TaskTable | None:
    """The same prompts with dense weights, the same first-token mode first; None for a table of dense weights."""
    if table.weights == DENSE:
        return None
    same = [t for t in tables if t.prompts() == (*table.prompts()[:-1], DENSE)]
    return min(same, key=lambda t: t.first_token != table.first_token, default=None)
