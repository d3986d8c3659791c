"""Averages over methods or tasks. Their uncertainty is that of the samples, never the spread over methods or tasks.

The methods and tasks are those the user chose, not draws from all there could be; what would change if the study were
repeated is the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvcli.analysis.statistics import retention, spread, stats
from kvcli.analysis.statistics.stats import Codes, Difference, Floats, Interval

MIN_UNITS = 50
"""With fewer samples or clusters a bootstrap's intervals are too narrow; the t intervals of such tasks are not."""
TIE = 1e-6
"""Resampled averages this near to the average equal it: they are sums in single precision."""


@dataclass(frozen=True)
class Scores:
    """One task's scores on the samples that both have: of a method (or of the mean over methods), and of full."""

    task: str
    compressed: Floats
    full: Floats
    clusters: Codes | None = None
    chance: float = 0.0
    difference: Difference | None = None
    """stats.paired_difference of these scores, where it is known already."""
    drawn: Floats | None = None
    """Resampled means of compressed, full and size, where `draw` has made them already."""


@dataclass(frozen=True)
class Average:
    """A mean over tasks, each task counting once."""

    value: float
    interval: Interval | None
    tasks: int
    n: int
    """Samples of all tasks."""
    left_out: tuple[str, ...] = ()
    """Tasks whose retention is not defined."""


def over_methods(compressed: Sequence[Floats]) -> Floats:
    """Each sample's mean over methods, to be compared with full like one method's scores.

    compressed: per method [n] scores of the same samples, NaN where it has none; such samples are NaN in the mean.
    """
    mean: Floats = np.stack(list(compressed)).mean(0)
    return mean


def difference_over_methods(compressed: Sequence[Floats], full: Floats, clusters: Codes | None = None) -> Difference:
    """The mean loss over methods. Samples that one of them or full lacks are left out."""
    mean = over_methods(compressed)
    both = ~np.isnan(mean) & ~np.isnan(full)
    return stats.paired_difference(mean[both], full[both], None if clusters is None else clusters[both])


def difference_over_tasks(tasks: Sequence[Scores]) -> Average:
    """The mean over tasks of the difference to full."""
    return _average([_of_difference(task, number) for number, task in enumerate(tasks)], tasks, ())


def retention_over_tasks(tasks: Sequence[Scores]) -> Average | None:
    """The mean over tasks of chance-adjusted retention; None where it is defined for no task."""
    parts = [_of_retention(task, number) for number, task in enumerate(tasks)]
    kept = [task for task, part in zip(tasks, parts, strict=True) if part]
    left_out = tuple(task.task for task, part in zip(tasks, parts, strict=True) if not part)
    return _average([part for part in parts if part], kept, left_out) if kept else None


@dataclass(frozen=True)
class _Part:
    """One task's figure: value, its own interval, what each unit adds to it, and the figure of each resample."""

    value: float
    interval: Interval | None
    influence: Floats
    resamples: Floats | None
    """[RESAMPLES]; None where too few units are there, changed or differ for resamples to say much."""


def _of_difference(task: Scores, number: int) -> _Part:
    change, codes = task.compressed - task.full, spread.clustered(task.clusters)
    found = task.difference or stats.paired_difference(task.compressed, task.full, task.clusters)
    influence = spread.residuals(change, codes)
    drawn = _drawn(task, number)
    resamples = None if drawn is None else (drawn[:, 0] - drawn[:, 1]) / drawn[:, 2]
    return _Part(found.value, found.interval, influence, resamples)


def _of_retention(task: Scores, number: int) -> _Part | None:
    known = task.difference
    found = retention.retention(task.compressed, task.full, task.chance, task.clusters, difference=known)
    if found.value is None or found.interval is None:
        return None
    codes, above = spread.clustered(task.clusters), float(task.full.mean()) - task.chance
    influence = spread.residuals(task.compressed - found.value * task.full, codes) / above
    drawn, resamples = _drawn(task, number), None
    if drawn is not None:
        kept, there = (drawn[:, column] / drawn[:, 2] - task.chance for column in (0, 1))
        resamples = kept / there if (there > 0).all() else None
    return _Part(found.value, found.interval, influence, resamples)


def _drawn(task: Scores, number: int) -> Floats | None:
    """[RESAMPLES, 3] per resample the mean over units of compressed, full and size, in an order of the task's own: the
    tasks are drawn apart from each other."""
    codes = spread.clustered(task.clusters)
    changed, _ = spread.unit_sums((task.compressed != task.full).astype(np.float64), codes)
    alike = spread.spread(task.compressed - task.full, codes, -1.0, 1.0).alike
    if len(changed) < MIN_UNITS or np.count_nonzero(changed) < stats.MIN_NONZERO or alike:
        return None
    drawn = draw([task])[0].drawn if task.drawn is None else task.drawn
    return None if drawn is None else drawn[np.random.default_rng((stats.SEED, number)).permutation(len(drawn))]


def draw(cells: Sequence[Scores]) -> list[Scores]:
    """The same, resampled; all at once, which is much faster than each by itself. cells: of one task, whose samples,
    clusters and scores of full are the same."""
    codes = spread.clustered(cells[0].clusters)
    full, sizes = spread.unit_sums(cells[0].full, codes)
    sums = [spread.unit_sums(cell.compressed, codes)[0] for cell in cells]
    found = spread.resampled(np.stack([full, sizes, *sums], 1))
    return [replace(cell, drawn=found[:, (2 + i, 0, 1)]) for i, cell in enumerate(cells)]


def _average(parts: Sequence[_Part], tasks: Sequence[Scores], left_out: tuple[str, ...]) -> Average:
    value = float(np.mean([part.value for part in parts]))
    return Average(value, _interval(parts, value), len(parts), sum(len(task.full) for task in tasks), left_out)


def _interval(parts: Sequence[_Part], value: float) -> Interval | None:
    """BCa of the mean over tasks, samples drawn within each; where a task has too little for that, MOVER of the tasks'
    own intervals (Zou, Donner 2008, Stat Med 27:1693), in which a flat task keeps its width."""
    resamples = [part.resamples for part in parts if part.resamples is not None]
    influence = np.concatenate([part.influence for part in parts]) / len(parts)
    if len(resamples) == len(parts) and np.ptp(influence) > 0:
        low, high = spread.bca_ends(np.mean(resamples, axis=0), value, TIE, influence)
        return Interval(low, high, f"BCa bootstrap within {len(parts)} tasks")
    ends = [part.interval for part in parts if part.interval is not None]
    if len(ends) < len(parts):
        return None
    below = sum((part.value - end.low) ** 2 for part, end in zip(parts, ends, strict=True))
    above = sum((part.value - end.high) ** 2 for part, end in zip(parts, ends, strict=True))
    return Interval(value - below**0.5 / len(parts), value + above**0.5 / len(parts), f"MOVER of {len(parts)} tasks")
