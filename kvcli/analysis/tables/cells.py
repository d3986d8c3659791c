"""How a cell is summed up: seeds and draws averaged within each sample, score, difference to full, shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvcli.analysis.reading.load import Run
from kvcli.analysis.statistics import pass_at_k, stats
from kvcli.analysis.statistics.stats import Difference
from kvcli.analysis.tables.table import CellSummary, Column

INCOHERENT = "incoherent"
"""The record's field, and what scorers of requests call an output that is no text (kvcli.evals.coherence)."""
MOST_REPEATED = 0.5
"""For records without the field: share of an output's 4-grams of tokens that had come before. Worked solutions, code
and prose have below 0.42; of texts that kvcli.evals.coherence finds in circles, 99 % have more."""
LOOP_TOKENS = 20
"""A shorter output is not called one in circles: a number may hold its digit many times."""


def rows_of_cells(run: Run) -> list[NDArray[np.int64]]:
    """For each cell the numbers of its records, by sample: sums do not depend on the order of the lines."""
    order = np.lexsort((run.sample, run.cell))
    ends = np.searchsorted(run.cell[order], np.arange(len(run.cells) + 1))
    return [order[start:end] for start, end in pairwise(ends)]


@dataclass(frozen=True)
class CellScores:
    """Mean score per sample over seeds and draws. value, cluster: [number of samples of the run], NaN = not there."""

    value: NDArray[np.float64]
    cluster: NDArray[np.int32]
    rows: NDArray[np.int64]
    cells: tuple[int, ...]
    replaced: int
    """Cells left out because a later one has the same settings and seed."""


def cell_scores(run: Run, rows_of: Sequence[NDArray[np.int64]], codes: Sequence[int]) -> CellScores:
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
    return CellScores(value, cluster, rows, kept, len(codes) - len(kept))


def summary(
    run: Run, method: str, label: str, column: Column, scores: CellScores, full: CellScores | None
) -> CellSummary:
    """full: what the cell is compared with; None for full itself."""
    there = ~np.isnan(scores.value)
    values, clusters = scores.value[there], scores.cluster[there]
    rows = scores.rows
    failed = np.isnan(run.score[rows])
    done = rows[~failed]
    difference, relative = against(scores, full) if full else (None, None)
    records = len(done)
    return CellSummary(
        method=method, label=label, column=column.text, cell_ids=tuple(run.cells[c].cell_id for c in scores.cells),
        seeds=len(scores.cells), n=len(values), errors=int(failed.sum()),
        score=float(values.mean()) if len(values) else float("nan"),
        interval=stats.score_interval(values, clusters) if len(values) else None,
        difference=difference, relative=relative, measured_ratio=_mean(run.measured_ratio[done]), records=records,
        flags=_flag_counts(run, done), no_answer=_share(~run.answered[done]), truncated=_share(run.truncated[done]),
        incoherent=incoherent_share(run, done), repeats=_repeats(run, scores),
        extra=_extra(run, scores, done) | _pass_at_k(run, scores),
        asked=_asked(run, scores), kl=_mean(run.figures["kl"][done]),
        top1=_mean(run.figures["top1"][done]),
    )  # fmt: skip


def _asked(run: Run, scores: CellScores) -> int | None:
    """Records that commands asked for, of all its seeds and draws."""
    counts = [run.asked.get(run.cells[code].cell_id) for code in scores.cells]
    return None if None in counts else sum(count for count in counts if count is not None)


def _extra(run: Run, scores: CellScores, done: NDArray[np.int64]) -> dict[str, float]:
    """Means of the scorer's further figures, without those that only say where a sample stands."""
    standing = run.task_facts(run.cells[scores.cells[0]].task).get("conditions") or ()
    means = {name: _mean(column[done]) for name, column in run.extra.items() if name not in standing}
    return {name: mean for name, mean in means.items() if mean is not None}


def _pass_at_k(run: Run, scores: CellScores) -> dict[str, float]:
    """pass@k where several answers to each problem were drawn."""
    drawn = len({run.cells[c].draw for c in scores.cells}) > 1
    if not drawn or run.cells[scores.cells[0]].metric != pass_at_k.METRIC:
        return {}
    return pass_at_k.figures(run.score[scores.rows], run.sample[scores.rows])


def against(scores: CellScores, full: CellScores) -> tuple[Difference | None, float | None]:
    """Paired difference and relative change on the samples that both have."""
    both = ~np.isnan(scores.value) & ~np.isnan(full.value)
    if not both.any():
        return None, None
    compressed, reference = scores.value[both], full.value[both]
    difference = stats.paired_difference(compressed, reference, scores.cluster[both])
    base = float(reference.mean())
    return difference, difference.value / base if base > 0 else None


def _repeats(run: Run, scores: CellScores) -> tuple[int, int]:
    """How many seeds and how many draws."""
    cells = [run.cells[code] for code in scores.cells]
    return len({cell.seed for cell in cells}), len({cell.draw for cell in cells})


def incoherent_share(run: Run, done: NDArray[np.int64]) -> float | None:
    """Share of outputs that are no text: as the records say; of older ones that do not, those that run in circles.
    None where nothing was generated, as where options are chosen from."""
    stated, tokens = _stated(run, done), run.figures["n_new"][done]
    circles = (run.figures["repetition"][done] > MOST_REPEATED) & (tokens >= LOOP_TOKENS)
    written = ~np.isnan(stated) | (tokens > 0)
    found = np.where(np.isnan(stated), circles, stated > 0)
    return _share(found[written]) if written.any() else None


def _stated(run: Run, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 or 0 where a record says whether its output is text, by its own field or as its scorer's word; else NaN."""
    own = run.figures[INCOHERENT][rows]
    return np.where(np.isnan(own), run.extra[INCOHERENT][rows], own) if INCOHERENT in run.extra else own


def told_by_circles(run: Run) -> int:
    """Records whose output was generated and that do not say whether it is text: of older versions."""
    done = np.flatnonzero(~np.isnan(run.score) & (run.figures["n_new"] > 0))
    return int(np.isnan(_stated(run, done)).sum())


def _flag_counts(run: Run, rows: NDArray[np.int64]) -> dict[str, int]:
    found = {name: int(((run.flags[rows] >> bit) & 1).sum()) for bit, name in enumerate(run.flag_names)}
    return {name: count for name, count in found.items() if count}


def _share(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
