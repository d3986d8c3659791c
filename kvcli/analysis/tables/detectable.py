"""What size of loss the cells of a table could have shown, in one sentence (docs/statistics.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvcli.analysis.statistics import power
from kvcli.analysis.statistics.stats import Difference
from kvcli.analysis.tables.judged import Judged
from kvcli.analysis.tables.table import TaskTable

ROUGH = 0.1
"""From 10 points on, tenths of a point say nothing more."""


def sentence(table: TaskTable, judged: Judged) -> str:
    """The median over a table's cells of the smallest loss with an 80 % chance of being established at the family's
    level; a cell in which no loss would be counts as infinite. Empty where nothing is compared."""
    found = [cell.difference for cell in table.cells() if cell.difference]
    if not found:
        return ""
    size, every = judged.family.size, smallest(found, judged.family.level)
    median = every[len(every) // 2]
    considered = f"{size:,} comparison{'s' * (size != 1)} considered"
    if math.isinf(median):
        which = f"at least half of its {len(every)} cells" if math.isfinite(every[0]) else _any(len(every))
        return (
            f"No loss, however large, has an 80 % chance of being established in {which}: too few samples or clusters "
            f"({considered})."
        )
    which = f"median of its {len(every)} cells, " if len(every) > 1 else ""
    return f"A loss of {_points(median)} has an 80 % chance of being established here ({which}{considered})."


def smallest(found: Sequence[Difference], level: float) -> list[float]:
    """The smallest detectable loss of each cell in rising order; infinite where a cell can show none."""
    each = (power.detectable(one, level) for one in found)
    return sorted(math.inf if value is None else value for value in each)


def _any(count: int) -> str:
    return "its one cell" if count == 1 else f"any of its {count} cells"


def _points(value: float) -> str:
    text = f"{100 * value:.0f}" if value >= ROUGH else f"{100 * value:.1f}"
    return f"{text} point{'' if text == '1.0' else 's'}"
