"""What may be said of a comparison, all comparisons of its family considered, and at a margin stated beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvcli.analysis.statistics import power
from kvcli.analysis.statistics.family import Family, holm
from kvcli.analysis.statistics.power import Needed
from kvcli.analysis.statistics.stats import ALPHA, Difference, Interval

MARGIN = 0.02
"""A loss up to so much counts as none: 2 points."""


class Kind(StrEnum):
    LOSS = "loss"
    """The interval lies below 0."""
    GAIN = "gain"
    UNCHANGED = "unchanged"
    """Equivalence: the interval lies within -margin .. +margin."""
    NO_LOSS = "no loss beyond the margin"
    """Non-inferiority: the interval lies above -margin."""
    OPEN = "not established"


@dataclass(frozen=True)
class Verdict:
    """One comparison's verdict and all that a sentence about it says."""

    kind: Kind
    value: float
    """The difference, in score."""
    interval: Interval | None
    """Simultaneous: with those of the whole family it holds with 95 %."""
    p: float | None
    """Holm-adjusted."""
    alone: Interval | None
    """The 95 % interval of this comparison alone: unadjusted."""
    n: int
    margin: float
    family: int
    """Comparisons of the family."""
    needed: Needed | None = None
    """Of an open verdict: the samples that would probably do."""

    @property
    def small(self) -> bool:
        """A loss or gain that the whole interval puts below the margin."""
        return self.interval is not None and -self.margin < self.interval.low and self.interval.high < self.margin


def judge(found: Difference, family: Family, margin: float = MARGIN, adjusted: float | None = None) -> Verdict:
    """The verdict of one difference. adjusted: its Holm p-value; None: there is none, the interval alone decides."""
    interval = found.at(family.level)
    kind = _kind(interval, margin, adjusted is None or adjusted < ALPHA)
    needed = power.needed(found, margin, family.level) if kind is Kind.OPEN else None
    return Verdict(
        kind, found.value, interval, adjusted, found.interval, found.n, margin, family.size, needed
    )  # fmt: skip


def _kind(interval: Interval | None, margin: float, differs: bool) -> Kind:
    """All kinds follow from the one simultaneous interval, so all may be looked at; loss and gain need p too."""
    if interval is None:
        return Kind.OPEN
    if differs and interval.high < 0:
        return Kind.LOSS
    if differs and interval.low > 0:
        return Kind.GAIN
    if interval.low <= -margin:
        return Kind.OPEN
    return Kind.UNCHANGED if interval.high < margin else Kind.NO_LOSS


def judge_all(
    found: Sequence[Difference | None], family: Family, margin: float = MARGIN
) -> list[Verdict | None]:  # fmt: skip
    """Verdicts of the comparisons that a run has records of, in their order; None where there is nothing to compare.

    family: as planned; comparisons not measured yet count in it.
    """
    there = [difference for difference in found if difference is not None]
    adjusted = iter(holm([difference.p for difference in there], max(family.size, len(there))))
    return [None if difference is None else judge(difference, family, margin, next(adjusted)) for difference in found]
