"""What stands under a report's title: which records it is about, and what to know before reading on."""

from __future__ import annotations

import shlex

from kvcli.analysis.marked import code, strong
from kvcli.analysis.reading.load import Run
from kvcli.analysis.reports.contents import Contents
from kvcli.analysis.tables.cells import told_by_circles
from kvcli.results.planned import planned


def head(made: Contents) -> list[str]:
    """One or two sentences under the title."""
    run = made.run
    text = f"Run {code(run.name)}, {len(run):,} records."
    status = run.meta.get("status")
    if status not in (None, "done", "complete", "finished"):
        text += " " + strong(f"Status {status}: not all samples are in{_of_planned(run)}.")
    text += _subset(run)
    count = sum(len(table.warnings) for table in made.tables)
    warned = (
        strong(f"{count} sanity warning{'s' * (count > 1)}")
        + f" below: read {'them' if count > 1 else 'it'} with the verdict."
    )
    return [text, *([warned] if count else []), *_older(run)]


def _older(run: Run) -> list[str]:
    """That the share of incoherent outputs is not by the whole rule."""
    count = told_by_circles(run)
    if not count:
        return []
    which = "The records" if count == len(run) else f"{count:,} records"
    return [
        f"{which} do not say whether their output is text: incoherent here means only that it runs in circles. "
        f"{code(shlex.join(['kvcli', 'rescore', str(run.folder)]))} looks at them again."
    ]


def _of_planned(run: Run) -> str:
    """' (12 of 40 records)'; empty where run.json holds no plan."""
    whole = sum(planned(run.meta, {}).values())
    return f" ({len(run):,} of {whole:,} records)" if whole > len(run) else ""


def _subset(run: Run) -> str:
    """Which samples were measured, where they are not all of every task."""
    limits = _limits(run)
    if not limits or limits == {None}:
        return ""
    known = sorted(limit for limit in limits if limit is not None)
    if len(limits) == 1:
        return f" A subset: {code(f'--limit {known[0]}')}, the same samples for every method."
    most = "all" if None in limits else str(known[-1])
    return (
        f" Cells were measured on subsets of {known[0]} to {most} samples of a task ({code('--limit')}), nested: the "
        "smaller ones lie within the larger. Differences use the samples both have."
    )


def _limits(run: Run) -> set[int | None]:
    """The limits of all cells, each the largest that a command asked for; None: all samples."""
    most: dict[str, float] = {}
    for command in run.meta.get("generations") or []:
        limit = (command.get("grid") or {}).get("limit")
        for cell in command["cells"]:
            most[cell] = max(most.get(cell, 0), float("inf") if limit is None else limit)
    if not most:
        return {run.config("limit")}
    return {None if limit == float("inf") else int(limit) for limit in most.values()}
