"""What `run` and `sweep` say of a grid: before it runs what will not be as typed, afterwards what had no effect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvcli.analysis.tables.table import TaskTable
from kvcli.analysis.tables.wording import MARKS
from kvcli.config import SweepConfig
from kvcli.grammar import parse_methods

if TYPE_CHECKING:
    from kvcli.engine.prompts import PromptSet


def without_ratio(config: SweepConfig, passed: dict[str, Any]) -> list[str]:
    """Says which methods a typed ratio or budget does not apply to."""
    from kvcli.methods.catalog import build

    typed_size = "--ratio" if passed.get("ratios") else "--budget" if passed.get("budgets") else ""
    own = [m for m in config.methods if typed_size and build(m).domain.kind == "none"]
    size = "a size of its own" if len(own) == 1 else "sizes of their own"
    return [f"{', '.join(own)}: {size}, {typed_size} does not apply"] if own else []


def larger_than_prompts(config: SweepConfig, prompt_sets: Iterable[PromptSet]) -> list[str]:
    """Says which budgets no prompt is longer than."""
    longest = max((len(part.ids) for prompts in prompt_sets for part in prompts.parts), default=0)
    idle = [str(size) for size in config.budgets if size >= longest > 0]
    if not idle:
        return []
    return [f"--budget {','.join(idle)}: no prompt is longer ({longest:,} tokens at most), so nothing is evicted"]


def floors(config: SweepConfig) -> list[str]:
    """Says which methods keep the same at several sizes: how small is too small depends on the prompt."""
    from kvcli.methods.catalog import build

    named = [m for m in config.methods if build(m).domain.floor]
    if not named or config.ratios == ("1",):
        return []
    sizes = "budgets" if config.budgets else "ratios"
    listing = f"kvcli list methods {_source(named[0]) if len(named) == 1 else 'NAME'}"
    return [
        f"{', '.join(named)}: cannot go below a floor that depends on the prompt; smaller {sizes} keep the same, "
        f"flagged {MARKS['unreachable']} ({listing})"
    ]


def idle(tables: Sequence[TaskTable]) -> list[str]:
    """Says of which methods every record is a `noop`, whatever was asked for, and where their settings are. Budgets
    are told beforehand (`larger_than_prompts`)."""
    always: dict[str, bool] = {}
    for table in tables:
        told = {column.text for column in table.columns if column.kind in ("own", "ratio") and column.text != "1"}
        for cell in table.cells():
            if cell.column in told and cell.records:
                always[cell.method] = always.get(cell.method, True) and cell.noop == cell.records
    return [
        f"{method}: nothing was left out of any prompt (flag {MARKS['noop']} everywhere), so it is the same as full; "
        f"longer prompts or smaller settings: kvcli list methods {_source(method)}"
        for method, everywhere in always.items()
        if everywhere
    ]


def _source(method: str) -> str:
    """The name without settings; where methods are joined, the first, which evicts."""
    return parse_methods([method])[0].parts[0].source
