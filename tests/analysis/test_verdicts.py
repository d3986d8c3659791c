"""Which verdict each interval gives, at a margin and in a family."""

from __future__ import annotations

import time

import numpy as np
import pytest

from kvcli.analysis.statistics import stats, verdicts
from kvcli.analysis.statistics.family import Family
from kvcli.analysis.statistics.stats import Difference, Interval
from kvcli.analysis.statistics.verdicts import Kind, judge, judge_all


def _with(low: float, high: float, p: float | None = 0.001) -> Difference:
    return Difference((low + high) / 2, Interval(low, high, ""), p, "", 100, 100, 0, 0)


def _binary(n: int, better: int, worse: int) -> Difference:
    compressed = np.array([1.0] * better + [0.0] * worse + [1.0] * (n - better - worse))
    return stats.paired_difference(compressed, np.array([0.0] * better + [1.0] * (n - better)))


@pytest.mark.parametrize(
    ("low", "high", "p", "kind"),
    [
        (-0.16, -0.08, 0.001, Kind.LOSS), (0.01, 0.05, 0.001, Kind.GAIN), (-0.015, -0.001, 0.01, Kind.LOSS),
        (-0.019, 0.019, 0.9, Kind.UNCHANGED), (-0.01, 0.03, 0.3, Kind.NO_LOSS), (-0.02, 0.01, 0.5, Kind.OPEN),
        (-0.05, 0.05, 1.0, Kind.OPEN), (-0.05, -0.001, 0.06, Kind.OPEN), (-0.01, -0.001, 0.06, Kind.UNCHANGED),
        (0.001, 0.05, 0.06, Kind.NO_LOSS), (-0.05, -0.01, None, Kind.LOSS),
    ],
)  # fmt: skip
def test_kinds(low: float, high: float, p: float | None, kind: Kind) -> None:
    assert judge(_with(low, high, p), Family(1), adjusted=p).kind is kind


def test_the_margin_is_an_option() -> None:
    found = _with(-0.03, 0.03, 0.9)
    assert judge(found, Family(1), adjusted=0.9).kind is Kind.OPEN
    assert judge(found, Family(1), 0.05, 0.9).kind is Kind.UNCHANGED


def test_a_loss_may_be_smaller_than_the_margin() -> None:
    assert judge(_with(-0.015, -0.001), Family(1)).small
    assert not judge(_with(-0.03, -0.001), Family(1)).small


def test_no_interval_is_open() -> None:
    found = judge(stats.paired_difference(np.zeros(5), np.ones(5), np.zeros(5, np.int32)), Family(3))
    assert (found.kind, found.interval, found.needed) == (Kind.OPEN, None, None)


def test_a_flat_cell_is_unchanged_only_with_enough_samples() -> None:
    """No changed sample: 189 of them alone show it, about 780 in a family of 700."""
    assert judge(_binary(188, 0, 0), Family(1)).kind is Kind.OPEN
    assert judge(_binary(189, 0, 0), Family(1)).kind is Kind.UNCHANGED
    among = judge(_binary(400, 0, 0), Family(700))
    assert among.kind is Kind.OPEN
    assert among.needed is not None
    assert judge(_binary(among.needed.samples, 0, 0), Family(700)).kind is Kind.UNCHANGED
    assert judge(_binary(int(among.needed.samples * 0.95), 0, 0), Family(700)).kind is Kind.OPEN


def test_the_same_loss_in_a_larger_family() -> None:
    """20 of 200 lost, 6 gained: a loss by itself, not among 700; the unadjusted interval stands beside."""
    found = _binary(200, 6, 20)
    alone, among = judge_all([found], Family(1))[0], judge_all([found], Family(700))[0]
    assert alone is not None
    assert among is not None
    assert (alone.kind, among.kind) == (Kind.LOSS, Kind.OPEN)
    assert alone.interval == among.alone == found.interval
    assert among.interval is not None
    assert among.interval.high > 0
    assert among.p == 1.0
    assert among.needed is not None
    assert among.needed.samples > 200
    assert (among.family, among.n, among.margin) == (700, 200, 0.02)


def test_judging_keeps_the_order_and_the_gaps() -> None:
    cells = [_binary(200, 0, 60), None, _binary(200, 3, 3)]
    found = judge_all(cells, Family(5))
    assert [v and v.kind for v in found] == [Kind.LOSS, None, Kind.OPEN]
    first, last = found[0], found[2]
    assert first is not None
    assert last is not None
    assert first.p == pytest.approx(5 * stats.mcnemar_midp(0, 60))
    assert last.p == 1.0
    assert judge_all([], Family(0)) == []


def test_a_plan_smaller_than_the_findings_does_not_fail() -> None:
    assert len(judge_all([_binary(50, 1, 1)] * 3, Family(2))) == 3


def test_how_often_no_loss_is_claimed_of_a_loss_at_the_margin() -> None:
    """True loss 2 points: 'no loss beyond 2 points' is wrong then, and said in at most about 2.5 % of runs."""
    rng = np.random.default_rng(3)
    wrong = 0
    for worse, better, _ in rng.multinomial(600, [0.06, 0.04, 0.9], 1500).tolist():
        wrong += judge(_binary(600, better, worse), Family(1)).kind in (Kind.NO_LOSS, Kind.UNCHANGED)
    assert wrong / 1500 <= 0.035


def test_a_million_records_in_seconds() -> None:
    """700 cells of 1,400 samples, one in seven graded."""
    rng = np.random.default_rng(0)
    full = (rng.random(1400) < 0.7) * 1.0
    begun = time.perf_counter()
    found = []
    for i in range(700):
        lost = rng.random(1400) < 0.04
        found.append(stats.paired_difference(np.where(lost, 0.5 if i % 7 == 0 else 0.0, full), full))
    judged = verdicts.judge_all(found, Family(700))
    assert time.perf_counter() - begun < 10
    assert sum(v is not None and v.kind is Kind.LOSS for v in judged) > 500
    assert judged == verdicts.judge_all(found, Family(700))
