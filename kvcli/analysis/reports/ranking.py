"""Which methods are ahead of which at the same bytes, and where that must not be asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcli.analysis.marked import Bullets, Grid, Paragraph, Section, code, raised, section, user
from kvcli.analysis.reading.load import Run
from kvcli.analysis.reports import phrases
from kvcli.analysis.reports.naming import named
from kvcli.analysis.statistics.stats import Difference
from kvcli.analysis.statistics.verdicts import MARGIN, Kind, judge_all
from kvcli.analysis.tables import matched, wording
from kvcli.analysis.tables.doubts import nothing_to_say, unlike_reference
from kvcli.analysis.tables.matched import Pair
from kvcli.analysis.tables.scores import SampleScores
from kvcli.analysis.tables.table import CellSummary, TaskTable, twin

NOTHING = "none"


@dataclass(frozen=True)
class Ranking:
    """The best method of each size against the others of one run."""

    pairs: tuple[Pair, ...]
    refused: tuple[tuple[TaskTable, str], ...]
    """Tables whose methods are not ranked, and why."""
    margin: float = MARGIN


def rank(run: Run, scores: SampleScores, tables: Sequence[TaskTable], margin: float = MARGIN) -> Ranking:
    """The method with the highest score of each size against those with its bytes; none over budget, none that in most
    samples fell back or did nothing. A table is refused whose full is not where it was published or says nothing.

    The family is all pairs that the plan asks for the same size. Looking for the best one first costs nothing, because
    intervals hold for all of them; pairs that are not looked at count as p = 1.
    """
    refused = tuple((table, reason) for table in tables if (reason := _refused(table)))
    asked = [t for t in tables if not _refused(t) and not (t.first_token == "prefill" and twin(t, tables))]
    found = [pair for table in asked for column in table.columns for pair in _with_best(scores, table, column.text)]
    verdicts = judge_all([entry[-1] for entry in found], matched.family_of(run, tables), margin)
    return Ranking(tuple(Pair(*e, v) for e, v in zip(found, verdicts, strict=True) if v is not None), refused, margin)


def _refused(table: TaskTable) -> str:
    """Why a table's methods are not ranked; empty where they are, or where there is but one."""
    several = max(Counter(cell.column for cell in table.cells()).values(), default=0) > 1
    return (nothing_to_say(table) or unlike_reference(table)) if several else ""


def _with_best(
    scores: SampleScores, table: TaskTable, column: str
) -> list[tuple[TaskTable, str, CellSummary, CellSummary, Difference]]:
    """The highest score of a column first, in each of its pairs."""
    cells = {c.label: c for c in table.cells() if c.column == column and c.n and not phrases.not_comparable(c)}
    pairs = matched.pairs({label: cell.measured_ratio for label, cell in cells.items()})
    best = max((cells[label] for pair in pairs for label in pair), key=lambda c: c.score, default=None)
    found = []
    for other in [label for pair in pairs if best and best.label in pair for label in pair]:
        if best is None or other == best.label:
            continue
        (first, clusters), (second, _) = scores.of(best.cell_ids), scores.of(cells[other].cell_ids)
        if (~np.isnan(first) & ~np.isnan(second)).any():
            found.append((table, column, best, cells[other], matched.difference(first, second, clusters)))
    return found


def ranking_section(ranking: Ranking, tables: Sequence[TaskTable]) -> Section | None:
    """Per task and size: the highest score, what is established behind it, what cannot be told apart from it."""
    said = [f"{named(table, tables)}: {user(reason)}." for table, reason in ranking.refused]
    every = [(table, column, _row(table, column, pairs, tables)) for (table, column), pairs in _grouped(ranking.pairs)]
    rows = [row for _, _, row in every if row[3] != NOTHING]
    flat: dict[str, list[str]] = {}
    for table, column, row in every:
        if row[3] == NOTHING:
            flat.setdefault(named(table, tables), []).append(column)
    if not every and not said:
        return None
    explained = (
        f"Paired differences between methods whose measured bytes differ by at most {100 * matched.TOLERANCE:.0f} %, "
        f"on the same samples. {_family(ranking)} Methods over budget, and those that fell back or did nothing in most "
        "samples, are not compared. The highest score is no winner: methods of the last column may be as good; those "
        "seen behind it are not told apart from it by so few samples."
    )
    if any(pair.verdict.interval and pair.verdict.interval.bound for pair in ranking.pairs):
        explained += f" Raised {wording.BOUND_MEANING}."
    head = (
        "task",
        "asked",
        "highest score",
        "established behind it, by points [simultaneous]",
        "seen behind it, not established",
        f"at most {phrases.margin_text(ranking.margin)} behind it, not established",
    )
    grid = Grid(head, rows) if rows else None
    alike = "; ".join(f"{task} at {', '.join(columns)}" for task, columns in flat.items())
    none = Paragraph(f"No method is established behind another that has the highest score: {alike}.") if flat else None
    refused = Bullets.of([f"Not ranked: {text}" for text in said]) if said else None
    return section(
        "ranking",
        "Method against method, at the same bytes",
        refused,
        Paragraph(explained) if every else None,
        grid,
        none,
    )


def _family(ranking: Ranking) -> str:
    size = ranking.pairs[0].verdict.family if ranking.pairs else 0
    if size < 2:
        return "The plan asks one pair for the same size: its interval is a 95 % interval, its p is not adjusted."
    return (
        f"The family is all {size:,} pairs that the plan asks for the same size: intervals hold together, p is "
        "Holm-adjusted."
    )


def _grouped(pairs: Sequence[Pair]) -> list[tuple[tuple[TaskTable, str], list[Pair]]]:
    found: dict[tuple[int, str], list[Pair]] = {}
    for pair in pairs:
        found.setdefault((id(pair.table), pair.column), []).append(pair)
    return [((group[0].table, group[0].column), group) for group in found.values()]


def _row(table: TaskTable, column: str, pairs: Sequence[Pair], tables: Sequence[TaskTable]) -> list[str]:
    best = pairs[0].first
    behind = [(pair.second, pair) for pair in pairs if pair.verdict.kind is Kind.GAIN]
    others = [(pair.second, pair) for pair in pairs if pair.verdict.kind is not Kind.GAIN]
    seen = [(other, pair) for other, pair in others if pair.verdict.value > pair.verdict.margin]
    compared = {pair.second.label for pair in pairs} | {best.label}
    apart = [cell for cell in table.cells() if cell.column == column and cell.n and cell.label not in compared]
    said = "; ".join(f"{_named(o)} {_ends(p)}" for o, p in sorted(behind, key=lambda b: b[0].score))
    apart_by = "; ".join(
        f"{_named(o)} {100 * p.verdict.value:.1f}" for o, p in sorted(seen, key=lambda b: -b[1].verdict.value)
    )
    together = ", ".join(_named(o) for o, p in others if p.verdict.value <= p.verdict.margin)
    why = "; ".join(f"{code(c.label)}, {phrases.not_comparable(c) or 'other bytes'}" for c in apart)
    left = f" (not compared: {why})" if apart else ""
    each = [said or NOTHING, apart_by or NOTHING, (together or NOTHING) + left]
    return [named(table, tables), column, _score(best), *each]


def _ends(pair: Pair) -> str:
    interval = pair.verdict.interval
    ends = (
        f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]{raised(wording.BOUND * interval.bound)}"
        if interval
        else ""
    )
    return f"{100 * pair.verdict.value:.1f}{ends}{phrases.p_text(pair.verdict)}"


def _named(cell: CellSummary) -> str:
    """With what it is to be read with."""
    noted = phrases.note(cell)
    return code(cell.label) + (f" ({noted})" if noted else "")


def _score(cell: CellSummary) -> str:
    """With the shares of outputs that say nothing."""
    noted = phrases.note(cell)
    return f"{code(cell.label)} {wording.score(cell.score)} ({'; '.join(filter(None, [wording.outputs(cell), noted]))})"
