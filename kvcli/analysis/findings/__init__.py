"""The six findings of KVFundaBench (arXiv:2502.01941v4), tested on a user's own runs. docs/findings.md defines each.

Every test is fixed before the data are seen: which cells, which figure, which limit. An outcome that the data cannot
give is said as such. One file for each finding; outcome.py, data.py, part.py and same_bytes.py have what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvcli.analysis.findings.chunks import chunks_on_many_shots, has_many_shots
from kvcli.analysis.findings.data import Data, named_tasks
from kvcli.analysis.findings.gains import gain_and_loss
from kvcli.analysis.findings.long_answers import is_long, long_generation
from kvcli.analysis.findings.models import model_type
from kvcli.analysis.findings.outcome import FEWEST_TASKS, LARGE, LEVEL, MANY_SHOTS, STEEP, Finding, Outcome
from kvcli.analysis.findings.shots import short_prompts
from kvcli.analysis.findings.tasks import task_dependent
from kvcli.analysis.tables.table import TaskTable

__all__ = [
    "FEWEST_TASKS", "LARGE", "LEVEL", "MANY_SHOTS", "STEEP", "Data", "Finding", "Outcome", "chunks_on_many_shots",
    "findings", "gain_and_loss", "long_generation", "model_type", "short_prompts", "task_dependent",
]  # fmt: skip

_CONCERNS: dict[int, Callable[[TaskTable], bool]] = {4: has_many_shots, 6: is_long}
"""The tables that a finding looks at, where these are not all."""


def findings(runs: Sequence[Data]) -> list[Finding]:
    """All six. runs: the run the report is about first; finding 2 compares it with the others."""
    data = runs[0]
    found = [
        task_dependent(data), model_type(runs), short_prompts(data), chunks_on_many_shots(data), gain_and_loss(data),
        long_generation(data),
    ]  # fmt: skip
    return [_with_refused(one, runs) for one in found]


def _with_refused(one: Finding, runs: Sequence[Data]) -> Finding:
    """Names the tables that did not count because of their full, and why."""
    seen = runs if one.number == 2 else runs[:1]
    concerns = _CONCERNS.get(one.number, lambda table: True)
    refused: dict[str, list[TaskTable]] = {}
    for data in seen:
        for why, tables in data.refused().items():
            refused.setdefault(why, []).extend(table for table in tables if concerns(table))
    said = [f"Not used, for {why}: {named_tasks(tables)}." for why, tables in refused.items() if tables]
    return replace(one, said=" ".join(filter(None, [one.said, *said])))
