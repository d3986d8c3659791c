"""Finding 5: tasks that gain most from exemplars lose most under compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcli.analysis.findings.data import Data, by_task, deep_columns
from kvcli.analysis.findings.outcome import FEWEST_TASKS, LEVEL, Finding, Outcome, untested
from kvcli.analysis.findings.part import Part, part_of, smallest_common
from kvcli.analysis.findings.tau import tau
from kvcli.analysis.marked import code
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.table import TaskTable

TITLE = "What gains most from the prompt loses most"
NEEDS = f"{FEWEST_TASKS} tasks, each with 0 shots and with more, at a ratio of 0.3 or less: {code('--shots 0,8')}"


@dataclass(frozen=True)
class Gain:
    """One task. gain: of full's score by its shots; lost: the share of that score that compression takes."""

    task: str
    shots: int
    gain: float
    lost: float
    paired: bool
    """Whether the gain is that of the same samples; else 0 shots come with samples of their own."""

    def text(self) -> str:
        other = "" if self.paired else " (other samples)"
        gained = f"gains {wording.points(self.gain)} points from {wording.shots(self.shots)}{other}"
        return f"{code(self.task)} {gained} and loses {100 * self.lost:.0f} % of its score"


def gain_and_loss(data: Data, level: float = LEVEL) -> Finding:
    gains = [found for tables in by_task(data.usual()).values() if (found := _gain(data, tables, level))]
    listed = "; ".join(one.text() for one in gains)
    if len(gains) < FEWEST_TASKS:
        here = f"Here there {'is' if len(gains) == 1 else 'are'} {len(gains)}: {listed}." if gains else ""
        return untested(5, TITLE, f"it takes {NEEDS}", here)
    value, p = tau(np.array([one.gain for one in gains]), np.array([one.lost for one in gains]))
    said = f"{listed}. Kendall's tau over {len(gains)} tasks is {value:+.2f}, two-sided p {_p(p)}."
    if p >= 1 - level:
        return Finding(5, TITLE, Outcome.OPEN, said, "more tasks: here the tasks are the sample")
    return Finding(5, TITLE, Outcome.HOLDS if value > 0 else Outcome.NOT, said)


def _gain(data: Data, tables: Sequence[TaskTable], level: float) -> Gain | None:
    bare = next((t for t in tables if t.shots == 0 and t.full and t.full.n), None)
    rich = max((t for t in tables if t.shots and deep_columns([t])), key=lambda t: t.shots or 0, default=None)
    common = smallest_common([rich]) if rich else None
    part = part_of(data, rich, common) if rich and common else None
    kept = part.kept(level) if part else None
    if bare is None or part is None or kept is None or kept.value is None or kept.interval is None:
        return None
    gain, paired = _gained(data, part, bare)
    return Gain(part.name, part.table.shots or 0, gain, 1 - kept.value, paired)


def _p(value: float) -> str:
    shown = wording.p_value(value)
    return shown if shown.startswith("<") else f"= {shown}"


def _gained(data: Data, part: Part, bare: TaskTable) -> tuple[float, bool]:
    """full with shots minus full without, on the samples that both finished; where the two have no two samples in
    common, as where other shots come with other questions, of the means."""
    assert bare.full is not None
    without = data.scores.of(bare.full.cell_ids)[0][part.samples]
    both = ~np.isnan(without)
    if both.sum() < 2:
        return float(part.full.mean()) - bare.full.score, False
    return float((part.full[both] - without[both]).mean()), True
