"""What a report holds, in every format: the verdict first, then what stands behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kvcli.analysis import findings
from kvcli.analysis.findings import Data, Finding, Outcome
from kvcli.analysis.marked import Bullets, Paragraph, Section, code, section, strong, user
from kvcli.analysis.reading.load import Run
from kvcli.analysis.reports import against, compare
from kvcli.analysis.reports.averages import means_section
from kvcli.analysis.reports.first_token import first_token_section
from kvcli.analysis.reports.naming import named
from kvcli.analysis.reports.ranking import Ranking, rank, ranking_section
from kvcli.analysis.reports.verdict_text import verdict_section
from kvcli.analysis.statistics import power, retention
from kvcli.analysis.statistics.retention import Relative
from kvcli.analysis.statistics.stats import Difference
from kvcli.analysis.statistics.verdicts import MARGIN, Verdict
from kvcli.analysis.tables.build import summarise
from kvcli.analysis.tables.judged import Judged, judge_tables
from kvcli.analysis.tables.means import TasksMean, over_tasks
from kvcli.analysis.tables.scores import SampleScores
from kvcli.analysis.tables.table import CellSummary, TaskTable


@dataclass(frozen=True)
class Contents:
    """One run, all its numbers, and the runs it is compared with. Computed once, drawn in any format."""

    data: Data
    margin: float = MARGIN
    others: tuple[Data, ...] = ()
    paper: str | None = None
    """Whose printed numbers stand beside."""

    @property
    def run(self) -> Run:
        return self.data.run

    @property
    def tables(self) -> Sequence[TaskTable]:
        return self.data.tables

    @cached_property
    def judged(self) -> Judged:
        return judge_tables(self.run, self.tables, self.margin)

    @cached_property
    def ranking(self) -> Ranking:
        return rank(self.run, self.data.scores, self.tables, self.margin)

    @cached_property
    def findings(self) -> list[Finding]:
        return findings.findings([self.data, *self.others])

    @cached_property
    def means(self) -> list[TasksMean]:
        return over_tasks(self.data.scores, self.tables)

    @cached_property
    def comparisons(self) -> list[Section]:
        """With each of the other runs."""
        return [compare.compare_section(self.data, other, self.margin) for other in self.others]

    def verdict(self, cell: CellSummary) -> Verdict | None:
        return self.judged.of(cell)

    def kept(self, table: TaskTable, cell: CellSummary) -> Relative | None:
        """Chance-adjusted retention of one cell."""
        if cell.difference is None or table.full is None:
            return None
        (values, clusters), (full, _) = (self.data.scores.of(c.cell_ids) for c in (cell, table.full))
        both = ~np.isnan(values) & ~np.isnan(full)
        return retention.retention(
            values[both], full[both], table.chance or 0.0, clusters[both], difference=cell.difference
        )  # fmt: skip

    def detectable(self, change: Difference | None) -> float | None:
        """Smallest true loss or gain with an 80 % chance of being established, all comparisons considered. None where
        none has, or nothing is compared."""
        return None if change is None else power.detectable(change, self.judged.family.level)

    def sections(self) -> list[Section]:
        """All but the tables and figures, in order."""
        found = [
            verdict_section(self.tables, self.judged),
            warnings_section(self.tables, self.run),
            ranking_section(self.ranking, self.tables),
            means_section(self.means),
            findings_section(self.findings),
            first_token_section(self.data.scores, self.tables, self.margin),
            against.against_section(self.run, self.tables) if self.paper else None,
            *self.comparisons,
        ]
        return [part for part in found if part is not None]


def contents(
    run: Run,
    tables: Sequence[TaskTable] | None = None,
    *,
    margin: float = MARGIN,
    others: Sequence[Run] = (),
    paper: str | None = None,
) -> Contents:
    """tables: the run's summary where it is known already."""
    beside = tuple(Data(other, summarise(other), SampleScores(other)) for other in others)
    return Contents(
        Data(run, summarise(run) if tables is None else tables, SampleScores(run)), margin, beside, paper
    )  # fmt: skip


def warnings_section(tables: Sequence[TaskTable], run: Run) -> Section:
    found = [f"{named(t, tables)}: {user(text)}." for t in tables for text in t.warnings]
    found += [
        f"{named(t, tables)}: {t.too_long} prompt{'s were' if t.too_long > 1 else ' was'} left out, longer than "
        f"{code('--max-prompt-tokens')}: what stands here is of the shorter ones."
        for t in tables
        if t.too_long
    ]
    found += [
        f"{named(t, tables)}: {code('--truncate')} cut {t.truncated} prompt{'s' * (t.truncated > 1)}."
        for t in tables
        if t.truncated
    ]
    shown = {t.task for t in tables}
    found += [
        f"{code(task)}: nothing was measured, all its prompts are longer than {code('--max-prompt-tokens')}."
        for task, facts in (run.meta.get("tasks") or {}).items()
        if task not in shown and _sum(facts.get("too_long"))
    ]
    none = Paragraph(
        "None: full is above chance, agrees with its published score where there is one, and its answers can be read."
    )
    return section("warnings", "Sanity warnings", Bullets.of(found) if found else none)


def _sum(counts: Any) -> int:
    return sum(counts.values()) if isinstance(counts, dict) else 0


def findings_section(found: Sequence[Finding]) -> Section:
    explained = (
        "What KVFundaBench found, tested on this run; docs/findings.md defines each test. Six tests share the 5 % "
        "risk. Cannot be tested here: the run lacks what the test needs."
    )
    items = []
    for one in found:
        needs = (
            f"Needs: {one.needs.removeprefix('it takes ')}." if one.needs and one.outcome is not Outcome.HOLDS else ""
        )
        items.append((f"{one.number}. {one.title}: {strong(one.outcome)}.", [t for t in (one.said, needs) if t]))
    return section("findings", "The paper's six findings, on this run", Paragraph(explained), Bullets(items))
