"""What figures may show together: one first-token mode, query mode, kind of weights, seed and order of shots.

The tables of a run are sorted into such views before anything is drawn; filters of the command line narrow the run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np

from kvcli.analysis.figures.measured import Measured
from kvcli.analysis.reading import names
from kvcli.analysis.reading.load import Cell, Run
from kvcli.analysis.tables.build import summarise
from kvcli.analysis.tables.judged import Judged, judge_tables
from kvcli.analysis.tables.scores import SampleScores
from kvcli.analysis.tables.table import DENSE, FULL, CellSummary, TaskTable
from kvcli.errors import KvcliError
from kvcli.grammar import ratio_text, task_base


@dataclass(frozen=True)
class Mode:
    """What a figure never mixes."""

    first_token: str
    query: str
    weights: str
    shot_seed: int
    shot_order: int

    @property
    def words(self) -> list[str]:
        """As subtitles say it."""
        found = [f"first token {self.first_token}", f"query {self.query}"]
        found += [f"weights {self.weights}"] if self.weights != DENSE else []
        found += [f"shots' seed {self.shot_seed}"] if self.shot_seed else []
        return found + ([f"shots' order {self.shot_order}"] if self.shot_order else [])


@dataclass(frozen=True)
class Whole:
    """The run that verdicts are about: all of it, also where a figure shows only some. tables: None: not made yet."""

    run: Run
    tables: Sequence[TaskTable] | None = None

    @cached_property
    def judged(self) -> Judged:
        """Verdicts as the report of the run says them."""
        return judge_tables(self.run, summarise(self.run) if self.tables is None else self.tables)


@dataclass(frozen=True)
class View:
    """The tables of one mode. suffix: what tells it from the run's other modes in a file
    name."""

    run: Run
    mode: Mode
    suffix: tuple[str, ...]
    tables: tuple[TaskTable, ...]
    whole: Whole

    @cached_property
    def scores(self) -> SampleScores:
        return SampleScores(self.run)

    @cached_property
    def measured(self) -> Measured:
        return Measured(self.run)

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """As rows of tables name them, in their order."""
        return tuple(dict.fromkeys(row.method for table in self.tables for row in table.rows))

    @cached_property
    def labels(self) -> dict[str, str]:
        return {row.method: row.label for table in self.tables for row in table.rows}

    def task(self, table: TaskTable) -> str:
        """The task's name, with its shots where it was run with several numbers of them."""
        if sum(t.task == table.task for t in self.tables) == 1:
            return table.task
        return f"{table.task}, {table.shots} shot{'s' * (table.shots != 1)}"

    def title(self, what: str) -> str:
        return f"{what}: {self.run.model}"

    def subtitle(self, cells: Iterable[CellSummary], *more: str, of: str = "point") -> str:
        return ", ".join([f"{counted(c.n for c in cells)} per {of}", *self.mode.words, *more])


def counted(counts: Iterable[int]) -> str:
    """'n = 24', 'n = 20 to 24'."""
    found = sorted(set(counts)) or [0]
    return f"n = {found[0]:,}" if len(found) == 1 else f"n = {found[0]:,} to {found[-1]:,}"


def views(run: Run, tables: Sequence[TaskTable] | None = None, whole: Run | None = None) -> list[View]:
    """tables: those of the run where they are known already. whole: the run of which `run` is a part."""
    modes: dict[Mode, list[TaskTable]] = {}
    tables = summarise(run) if tables is None else tables
    judging = Whole(run, tables) if whole is None or whole is run else Whole(whole)
    for table in tables:
        mode = Mode(table.first_token, table.query, table.weights, table.shot_seed, table.shot_order)
        modes.setdefault(mode, []).append(table)
    drawn = {mode: tuple(mine) for mode, mine in modes.items() if any(table.rows for table in mine)}
    return [View(run, mode, _suffix(mode, list(drawn)), mine, judging) for mode, mine in drawn.items()]


def _suffix(mode: Mode, modes: Sequence[Mode]) -> tuple[str, ...]:
    words = {"shot_seed": "shots", "shot_order": "order"}
    found = []
    for field in fields(Mode):
        values = {getattr(other, field.name) for other in modes}
        if len(values) > 1:
            found.append(in_file_names(f"{words.get(field.name, '')}{getattr(mode, field.name)}"))
    return tuple(found)


def in_file_names(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text.replace("n/a", "na").replace("/", "")).strip("-")


def subset(run: Run, codes: Collection[int]) -> Run:
    """The run with these cells only; samples, clusters and metrics keep their numbers."""
    kept = sorted(codes)
    place = np.full(len(run.cells), -1, np.int32)
    place[kept] = np.arange(len(kept), dtype=np.int32)
    rows = place[run.cell] >= 0
    change: dict[str, Any] = {}
    for field in fields(run):
        value = getattr(run, field.name)
        if isinstance(value, np.ndarray) and len(value) == len(run):
            change[field.name] = value[rows]
        elif isinstance(value, dict) and value and all(isinstance(v, np.ndarray) for v in value.values()):
            change[field.name] = {name: column[rows] for name, column in value.items()}
    change["cell"] = place[run.cell][rows]
    return replace(run, cells=tuple(run.cells[code] for code in kept), **change)


def filtered(run: Run, methods: Collection[str], tasks: Collection[str], ratios: Collection[Decimal]) -> Run:
    """The cells that the filters name, and `full` of their tasks beside them. Empty filters take all.

    methods: as recorded or as shown, with or without settings. tasks: names, with or without settings, and globs.
    Raises KvcliError for a filter that nothing matches.
    """
    if not (methods or tasks or ratios):
        return run
    tests: list[tuple[str, Collection[Any], dict[Any, set[str]]]] = [
        ("--method", methods, {c.method: names.spellings(c.method) for c in run.cells if c.method != FULL}),
        ("--task", tasks, {c.task: {c.task, task_base(c.task)} for c in run.cells}),
        ("--ratio", [ratio_text(r) for r in ratios], {c.ratio: {c.ratio} for c in run.cells if c.ratio is not None}),
    ]
    wanted: list[set[Any] | None] = []
    for option, asked, there in tests:
        for one in asked:
            if not any(_matches(one, spelled) for spelled in there.values()):
                fix = ", ".join(sorted(map(str, there))) or "a folder that has some"
                raise KvcliError(f"nothing in {run.folder} matches '{one}'", given=f"{option} {one}", fix=fix)
        named = {value for value, spelled in there.items() if any(_matches(one, spelled) for one in asked)}
        wanted.append(named if asked else None)
    kept = {code for code, cell in enumerate(run.cells) if _wanted(cell, *wanted)}
    if not any(run.cells[code].method != FULL for code in kept):
        given = " ".join(f"{option} {','.join(map(str, asked))}" for option, asked, _ in tests if asked)
        raise KvcliError(f"no cell of {run.folder} matches all filters", given=given, fix="fewer of them")
    return subset(run, kept)


def _matches(asked: str, spelled: Collection[str]) -> bool:
    return any(asked == name or fnmatchcase(name, asked) for name in spelled)


def _wanted(cell: Cell, methods: set[Any] | None, tasks: set[Any] | None, ratios: set[Any] | None) -> bool:
    if tasks is not None and cell.task not in tasks:
        return False
    if cell.method == FULL:
        return True
    return (methods is None or cell.method in methods) and (ratios is None or cell.ratio in ratios)
