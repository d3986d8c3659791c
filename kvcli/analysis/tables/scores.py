"""Scores of each sample, seeds and draws averaged within it first: for what compares more than one cell with full."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from kvcli.analysis.reading.load import Run
from kvcli.analysis.statistics.stats import Codes, Floats


class SampleScores:
    """Mean scores of groups of cells, by sample; the records are sorted once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._order = np.lexsort((run.sample, run.cell))
        self._ends = np.searchsorted(run.cell[self._order], np.arange(len(run.cells) + 1))
        self._codes = {cell.cell_id: code for code, cell in enumerate(run.cells)}

    def of(self, cell_ids: Collection[str]) -> tuple[Floats, Codes]:
        """Mean score (NaN = none finished) and cluster (-1 = none) of every sample of the run.

        cell_ids: cells that differ by seed or draw only, as CellSummary.cell_ids has them.
        """
        rows = np.concatenate([self._rows(cell_id) for cell_id in cell_ids])
        rows = rows[~np.isnan(self.run.score[rows])]
        sample, samples = self.run.sample[rows], len(self.run.samples)
        with np.errstate(invalid="ignore"):
            value: Floats = np.bincount(sample, self.run.score[rows], samples) / np.bincount(sample, None, samples)
        cluster: Codes = np.full(samples, -1, np.int32)
        cluster[sample] = self.run.cluster[rows]
        return value, cluster

    def _rows(self, cell_id: str) -> np.ndarray:
        code = self._codes[cell_id]
        return self._order[self._ends[code] : self._ends[code + 1]]
