"""The mean over tasks: chance-adjusted retention of every method and size."""

from __future__ import annotations

from collections.abc import Sequence

from kvcli.analysis.marked import Grid, Paragraph, Section, code, raised, section, user
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.means import TasksMean
from kvcli.analysis.tables.table import DENSE

FALLBACK = wording.MARKS["fallback"]


def means_section(means: Sequence[TasksMean]) -> Section | None:
    """Chance-adjusted retention, mean over tasks: what claims across tasks use."""
    if not means:
        return None
    columns = sorted({mean.column for mean in means}, key=lambda c: c.order)
    groups: dict[tuple[str, str], list[TasksMean]] = {}
    for mean in means:
        groups.setdefault((mean.method, _mode_of(mean)), []).append(mean)
    rows = []
    for (method, mode), found in groups.items():
        counts = sorted({len(mean.tasks) for mean in found})
        kept = {mean.column.text: _kept(mean) for mean in found}
        tasks = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        rows.append([code(method), mode, tasks, *(kept.get(column.text, "") for column in columns)])
    explained = (
        "Each task counts once, with its largest number of shots. Kept: (P - chance) / (P of full - chance), so tasks "
        "of different chance compare. Intervals come from resampling samples within each task; they are 95 %, "
        "unadjusted, and say nothing about tasks that were not run."
    )
    if any(mean.fallback for mean in means):
        explained += f" Raised {FALLBACK}: fallback in all outputs of some of its tasks, so not the method named."
    titles = ("method", "mode", "tasks", *(column.text for column in columns))
    grid = Grid(titles, rows, frozenset(range(2, len(titles))))
    return section("means", "Mean over tasks: share kept of what full has above chance", Paragraph(explained), grid)


def _mode_of(mean: TasksMean) -> str:
    parts = [f"first token {mean.first_token}", *([f"query {mean.query}"] if mean.query != "aware" else [])]
    return ", ".join([*parts, *([user(mean.weights)] if mean.weights != DENSE else [])])


def _kept(mean: TasksMean) -> str:
    """'85 % [79, 89]', and which tasks are not in it, with the reason."""
    found = mean.retention
    why: dict[str, list[str]] = {}
    for task, reason in mean.left_out:
        why.setdefault(reason, []).append(code(task))
    for task in found.left_out if found else ():
        why.setdefault("not defined there", []).append(code(task))
    left = "; ".join(f"without {', '.join(tasks)}: {reason}" for reason, tasks in why.items())
    value = "-"
    if found is not None:
        ends = f" [{100 * found.interval.low:.0f}, {100 * found.interval.high:.0f}]" if found.interval else ""
        value = f"{100 * found.value:.0f} %{ends}"
    value += raised(FALLBACK) if mean.fallback and found is not None else ""
    return f"{value} ({left})" if left else value
