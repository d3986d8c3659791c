"""Figures that draw one value of each cell: difference, score, relative change, KL, top-1 agreement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvcli.analysis.figures.sheets import Sheet, Value, sheets_of
from kvcli.analysis.figures.views import View
from kvcli.analysis.statistics import retention, spread
from kvcli.analysis.statistics.stats import LEVEL, Codes, Floats, Interval
from kvcli.analysis.tables.table import CellSummary, TaskTable


def difference(view: View) -> list[Sheet]:
    """The default: score with compression minus score without, on the same samples."""
    return sheets_of(
        view, "difference", "Difference to the full cache", "difference to full (points)", "95 % paired intervals",
        "points", lambda table, cell: difference_of(cell),
    )  # fmt: skip


def difference_of(cell: CellSummary) -> Value | None:
    found = cell.difference
    return _value(100 * found.value, found.interval, found.n, 100) if found else None


def score(view: View) -> list[Sheet]:
    bars = "95 % intervals, not for comparing methods"
    return sheets_of(
        view, "score", "Score", "score", bars, "unit",
        lambda table, cell: _value(cell.score, cell.interval, cell.n), levels=True,
    )  # fmt: skip


def relative(view: View) -> list[Sheet]:
    """The paper's delta P = (P - P_full) / P_full, in per cent, with MOVER intervals (docs/statistics.md)."""

    def value(table: TaskTable, cell: CellSummary) -> Value | None:
        if cell.difference is None or table.full is None:
            return None
        compressed, clusters = view.scores.of(cell.cell_ids)
        full, _ = view.scores.of(table.full.cell_ids)
        both = ~np.isnan(compressed) & ~np.isnan(full)
        found = retention.retention(
            compressed[both], full[both], 0.0, clusters[both], difference=cell.difference, level=LEVEL
        )
        if found.loss is None:
            return None
        drawn = _value(100 * found.loss, found.loss_interval, int(both.sum()), 100)
        # No score is below 0, so no loss is below -100 %, wherever the ratio's interval ends.
        return replace(drawn, low=None if drawn.low is None else max(drawn.low, -100.0))

    return sheets_of(
        view, "relative", "Relative change of the score", "relative change ΔP (%)", "95 % intervals", "points", value
    )


def kl(view: View) -> list[Sheet]:
    """KL divergence of the compressed cache's predictions from full's, on full's own answer."""
    return sheets_of(
        view, "kl", "KL divergence from the full cache", "KL (nats)",
        "means over samples, 95 % intervals", "log", lambda table, cell: _mean(view, cell, "kl", np.inf),
    )  # fmt: skip


def top1(view: View) -> list[Sheet]:
    """Share of tokens of full's own answer at which both have the same likeliest token."""
    return sheets_of(
        view, "top1", "Top-1 agreement with the full cache", "top-1 agreement",
        "means over samples, 95 % intervals", "unit", lambda table, cell: _mean(view, cell, "top1", 1.0),
    )  # fmt: skip


def _mean(view: View, cell: CellSummary, name: str, most: float) -> Value | None:
    values = view.measured.of(cell.cell_ids, name)
    there = ~np.isnan(values)
    if not there.any():
        return None
    _, clusters = view.scores.of(cell.cell_ids)
    return _value(float(values[there].mean()), mean_interval(values[there], clusters[there], most), int(there.sum()))


def mean_interval(values: Floats, clusters: Codes, most: float) -> Interval | None:
    """BCa bootstrap over samples where at least ten differ from 0 and none share a cluster, else t; never below 0.

    Where all values agree and there is no upper bound (KL), there is no interval.
    """
    codes = spread.clustered(clusters)
    if codes is None and np.count_nonzero(values) >= spread.MIN_NONZERO and np.ptp(values) > 0:
        return spread.bca(values)
    found = spread.spread(values, codes, 0.0, most)
    if np.isinf(most):
        half = spread.Spread(found.mean, found.error, found.units, found.units, 0.0, most, found.clustered)
        return half.interval(LEVEL) if np.ptp(values) > 0 else None
    return found.interval(LEVEL)


def _value(y: float, ends: Interval | None, n: int, scale: float = 1.0) -> Value:
    return Value(y, scale * ends.low, scale * ends.high, n) if ends else Value(y, None, None, n)
