"""Both ways of --first-token side by side, and the paired difference between them, where both were run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvcli.analysis.marked import Grid, Paragraph, Section, code, section, strong
from kvcli.analysis.reading.load import Run
from kvcli.analysis.reports.naming import named
from kvcli.analysis.statistics.family import Family
from kvcli.analysis.statistics.stats import Difference
from kvcli.analysis.statistics.verdicts import MARGIN, Kind, Verdict, judge_all
from kvcli.analysis.tables import matched, wording
from kvcli.analysis.tables.scores import SampleScores
from kvcli.analysis.tables.table import CellSummary, TaskTable, twin

ONE_TOKEN = 2
"""Generated tokens of an answer of one token: the end of the text is one too."""


@dataclass(frozen=True)
class Ways:
    """One cell in both ways; the verdict is on compressed - prefill, on the samples both have."""

    task: str
    compressed: CellSummary
    prefill: CellSummary
    verdict: Verdict


def first_token_section(
    scores: SampleScores, tables: Sequence[TaskTable], margin: float = MARGIN
) -> Section | None:  # fmt: skip
    """None where only one way was run."""
    pairs = both_ways(scores, tables, margin)
    if not pairs:
        return None
    shown = [p for p in pairs if p.verdict.kind in (Kind.LOSS, Kind.GAIN)]
    behind = sum(p.verdict.kind is Kind.LOSS for p in pairs)
    ahead = len(shown) - behind
    many = len(pairs) > 1
    said = (
        f"Compressed is established behind prefill in {behind} of {len(pairs)} pair{'s' * many}"
        f"{f', ahead of it in {ahead}' if ahead else ''}: paired differences on the same samples, a family of their own"
        f"{' (intervals hold together, p is Holm-adjusted)' if many else ''}. With prefill the first answer token is "
        "read from the prefill's own logits, before anything is evicted: a task that is answered by one token cannot "
        "lose that token, whatever was evicted (only what is written behind it can still spoil the answer), so its "
        "flat line there says nothing about the method. Its loss shows with compressed only. "
        f"{_short(scores.run, tables)}Kept tokens and bytes are the same in both, so what lies between the two is the "
        "first token alone. Differences to full are of each cell alone, unadjusted."
    )
    head = (
        "task", "method", "asked", "n", "compressed - prefill: points [simultaneous]", "p (Holm)",
        "compressed to full [95 %]", "prefill to full [95 %]",
    )  # fmt: skip
    grid = Grid(head, [_row(p) for p in shown], frozenset(range(3, 8))) if shown else None
    left = len(pairs) - len(shown)
    rest = f"Left out: {left} pair{'s' * (left > 1)} in which neither way is established behind the other."
    title = "First token: compressed against prefill"
    return section("first-token", title, Paragraph(said), grid, Paragraph(rest) if left else None)


def _short(run: Run, tables: Sequence[TaskTable]) -> str:
    """The tasks that full answers by one token."""
    named_: list[str] = []
    for table in tables:
        rows = np.isin(
            run.cell, [i for i, c in enumerate(run.cells) if table.full and c.cell_id in table.full.cell_ids]
        )
        tokens = run.figures["n_new"][rows & ~np.isnan(run.score)]
        tokens = tokens[tokens > 0]
        if len(tokens) and np.median(tokens) <= ONE_TOKEN:
            named_.append(code(table.task))
    if not named_:
        return ""
    return f"Here full answers by one token, and what ends it, in {', '.join(dict.fromkeys(named_))}. "


def _row(pair: Ways) -> list[str]:
    verdict, cell = pair.verdict, pair.compressed
    between = f"{strong(wording.points(verdict.value))} {wording.points_interval(verdict.interval)}"
    return [
        pair.task, code(cell.label), cell.column, str(verdict.n), between, wording.p_value(verdict.p), _to_full(cell),
        _to_full(pair.prefill),
    ]  # fmt: skip


def _to_full(cell: CellSummary) -> str:
    change = cell.difference
    return "" if change is None else f"{wording.points(change.value)} {wording.points_interval(change.interval)}"


def both_ways(scores: SampleScores, tables: Sequence[TaskTable], margin: float = MARGIN) -> list[Ways]:
    """All pairs with a sample in common; they are the family."""
    found: list[tuple[str, CellSummary, CellSummary, Difference]] = []
    for task, compressed, prefill in mode_pairs(tables):
        (first, clusters), (second, _) = scores.of(compressed.cell_ids), scores.of(prefill.cell_ids)
        if (~np.isnan(first) & ~np.isnan(second)).any():
            found.append((task, compressed, prefill, matched.difference(first, second, clusters)))
    verdicts = judge_all([entry[3] for entry in found], Family(max(len(found), 1), planned=False), margin)
    return [Ways(*entry[:3], verdict) for entry, verdict in zip(found, verdicts, strict=True) if verdict is not None]


def mode_pairs(tables: Sequence[TaskTable]) -> Iterator[tuple[str, CellSummary, CellSummary]]:
    """(task, compressed, prefill) for cells that differ by the first-token mode alone."""
    for other in tables:
        table = twin(other, tables) if other.first_token == "prefill" else None
        if table is None:
            continue
        name = named(table, [t for t in tables if t.first_token == "compressed"])
        theirs = {(cell.method, cell.column): cell for cell in other.cells()}
        for cell in table.cells():
            if (cell.method, cell.column) in theirs:
                yield name, cell, theirs[cell.method, cell.column]
