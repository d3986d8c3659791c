"""How many samples of each cell the commands of a folder asked for, from its run.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from kvcli.results.schema import prompts_name


def planned(run: Mapping[str, Any], seen: Mapping[str, int]) -> dict[str, int]:
    """Cell -> samples asked for: the most of its commands' limits, without those left out for their length, at most
    what the task has.

    run: what run.json holds. seen: cell -> samples with a record; they count as asked for.
    """
    cells: Mapping[str, Any] = run.get("cells") or {}
    most: Counter[str] = Counter()
    for cell, count in seen.items():
        task = cells.get(cell, {}).get("task", "")
        most[task] = max(most[task], count)
    asked = {cell: count for cell, count in seen.items() if cell in cells}
    for generation in run.get("generations") or ():
        limit = generation.get("grid", {}).get("limit")
        for cell in generation.get("cells", ()):
            task = cells.get(cell, {}).get("task", "")
            known = (run.get("tasks") or {}).get(task, {}).get("samples")
            has = (limit or most[task]) if known is None else known
            first = limit - _left_out(run, cells.get(cell, {}), limit) if limit else has
            asked[cell] = max(asked.get(cell, 0), min(has, first))
    return asked


def _left_out(run: Mapping[str, Any], cell: Mapping[str, Any], limit: int) -> int:
    """How many of the first `limit` samples of a cell's task were longer than --max-prompt-tokens."""
    which = prompts_name(*(int(cell.get(name) or 0) for name in ("shots", "shot_seed", "shot_order")))
    places = (run.get("tasks", {}).get(cell.get("task", ""), {}).get("left_out") or {}).get(which) or ()
    return sum(place < limit for place in places)
