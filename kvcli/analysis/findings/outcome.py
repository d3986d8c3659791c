"""What a finding comes to: its outcomes, the limits that decide, and how they are put into words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvcli.analysis.marked import code
from kvcli.analysis.statistics import stats
from kvcli.analysis.statistics.retention import Relative
from kvcli.analysis.statistics.stats import Interval

LEVEL = 1 - stats.ALPHA / 6
"""Six findings share the 5 % risk of one false statement."""
DEEP = 0.3
"""The paper speaks of what happens at and below 30 % kept."""
LARGE = 0.1
"""A difference of retention that counts: 10 % of what full has above chance."""
MANY_SHOTS = 50
STEEP = 0.2
"""Finding 6: a loss of more than 20 points."""
FEWEST_TASKS = 5
"""With fewer tasks no order of them has p < 0.05."""


class Outcome(StrEnum):
    HOLDS = "holds"
    NOT = "does not hold"
    OPEN = "not established"
    UNTESTED = "cannot be tested here"


@dataclass(frozen=True)
class Finding:
    """One finding on these data. said: what was seen; needs: what a test, or a clear answer, would take."""

    number: int
    title: str
    outcome: Outcome
    said: str
    needs: str = ""


def untested(number: int, title: str, needs: str, here: str = "") -> Finding:
    return Finding(number, title, Outcome.UNTESTED, here.strip(), needs)


def shared(level: float, tests: int) -> float:
    """The level of each of several tests that share one risk."""
    return 1 - (1 - level) / tests


def verdict_of(
    apart: Sequence[Interval | None], said: str, *, claimed: bool = False, large: float = LARGE
) -> tuple[Outcome, str, str]:
    """claimed: the claim is that the difference is above 0. It does not hold where none can be above `large`."""
    holds = [i for i in apart if i and (i.low > 0 or (not claimed and i.high < 0))]
    against = sum(bool(i and i.high < 0) for i in apart) if claimed else 0
    other = f"{against} the other way" if against else ""
    if holds:
        shown = f"{len(holds)} of {len(apart)} shown"
        return Outcome.HOLDS, f"{said} ({', '.join(filter(None, [shown, other]))}).", ""
    said = f"{said} ({other})" if other and len(apart) > 1 else said
    small = [i for i in apart if i and i.high < large and (claimed or i.low > -large)]
    if small and len(small) == len(apart):
        return Outcome.NOT, f"{said}.", ""
    return Outcome.OPEN, f"{said}.", "more samples"


def percent(found: Relative) -> str:
    ends = f" [{100 * found.interval.low:.0f}, {100 * found.interval.high:.0f}]" if found.interval else ""
    return "-" if found.value is None else f"{100 * found.value:.0f} %{ends}"


def points(value: float, interval: Interval | None) -> str:
    ends = f" [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]" if interval else ""
    return f"{100 * value:+.1f} points{ends}"


def mean_over(methods: int) -> str:
    return f"mean over {methods} method{'s' * (methods != 1)}"


def listed(labels: Sequence[str]) -> str:
    return ", ".join(map(code, labels))
