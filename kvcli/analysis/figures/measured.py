"""Figures of the records by cell and sample: KL, top-1 agreement, bytes, depth. Seeds and draws are averaged first."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvcli.analysis.reading.load import Run

Floats = NDArray[np.float64]


class Measured:
    """The records of a run, sorted by cell once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        order = np.argsort(run.cell, kind="stable")
        ends = np.searchsorted(run.cell[order], np.arange(len(run.cells) + 1))
        self._rows = {
            cell.cell_id: order[start:end] for cell, (start, end) in zip(run.cells, pairwise(ends), strict=True)
        }

    def of(self, cell_ids: Collection[str], name: str) -> Floats:
        """Mean per sample of the run over cells that differ by seed or draw; NaN where none has the figure.

        name: of Run.figures, or of what the task's scorer adds (Run.extra).
        """
        column = self.run.figures.get(name, self.run.extra.get(name))
        if column is None:
            return np.full(len(self.run.samples), np.nan)
        rows = np.concatenate([self._rows[cell_id] for cell_id in cell_ids])
        rows = rows[~np.isnan(column[rows])]
        sample, samples = self.run.sample[rows], len(self.run.samples)
        with np.errstate(invalid="ignore"):
            found: Floats = np.bincount(sample, column[rows], samples) / np.bincount(sample, None, samples)
        return found
