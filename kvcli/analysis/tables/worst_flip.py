"""The changed sample to look at first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcli.analysis.reading.load import Run
from kvcli.analysis.tables.table import TaskTable


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
    for one in (table.full, cell):
        rows = np.isin(run.cell, [codes[i] for i in one.cell_ids]) & ~np.isnan(run.score)
        scores.append(dict(zip(run.sample[rows].tolist(), run.score[rows].tolist(), strict=True)))
    gaps = {sample: scores[1][sample] - score for sample, score in scores[0].items() if sample in scores[1]}
    return table.task, run.samples[min(gaps, key=lambda sample: gaps[sample])]
