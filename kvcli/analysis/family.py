"""The family of comparisons: all that a sweep's plan makes with `full`, and p-values and levels that hold for them all.

Source of the plan: run.json's `generations` (each command's cell ids, written before it measures) and `cells` (what
each id means).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcli.analysis.stats import ALPHA

FULL = "full"
DENSE = "dense"
WITHIN = ("seed", "draw")
"""Averaged within each sample, so cells that differ by nothing else are one comparison."""
PROMPTS = ("task", "shots", "shot_seed", "shot_order", "query", "first_token", "weights")
ASKED = ("method", "ratio", "budget", "match", "decode")
_USUAL = {"shot_seed": 0, "shot_order": 0, "query": "aware", "weights": DENSE, "draw": 0}
"""What a fact is where a cell does not state it."""


@dataclass(frozen=True)
class Family:
    """How many comparisons share the 5 % risk of a false statement. Unfinished ones count: they were planned."""

    size: int
    commands: int = 1
    """Commands that the plan grew by; more than one means it was not fixed from the start."""
    planned: bool = True
    """False where run.json holds no plan, so that only what was found is counted."""

    @property
    def level(self) -> float:
        """Confidence level of each interval so that all of them hold at once with 95 % (Bonferroni)."""
        return 1 - ALPHA / max(self.size, 1)


def planned(meta: Mapping[str, Any], found: int = 0) -> Family:
    """The family of a run. meta: run.json; found: comparisons the records allow, the least the family can be."""
    described = meta.get("cells")
    described = described if isinstance(described, Mapping) else {}
    commands = meta.get("generations") or []
    ids = list(dict.fromkeys(i for command in commands for i in command["cells"])) or list(described)
    facts = [described[i] for i in ids if isinstance(described.get(i), Mapping)]
    return Family(max(len(comparisons(facts)), found), max(len(commands), 1), bool(facts))


def comparisons(cells: Iterable[Mapping[str, Any]]) -> set[tuple[str, ...]]:
    """What is compared with `full`: each method at each size on each set of prompts; `full` with other weights is
    compared with `full` of the dense model. cells: facts of cells, as run.json has them.
    """
    found = set()
    for facts in cells:
        if facts.get("method") == FULL and _fact(facts, "weights") == DENSE:
            continue
        found.add(tuple(json.dumps(_fact(facts, name), sort_keys=True) for name in (*PROMPTS, *ASKED)))
    return found


def between_methods(cells: Iterable[Mapping[str, Any]]) -> int:
    """Pairs of methods asked for the same size on the same prompts: the family of method against method."""
    groups: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    sized = len(PROMPTS) + 1
    for key in comparisons(cells):
        if json.loads(key[len(PROMPTS)]) == FULL:
            continue
        methods = groups.setdefault((*key[: len(PROMPTS)], *key[sized : sized + 3]), set())
        methods.add((key[len(PROMPTS)], key[-1]))
    return sum(len(methods) * (len(methods) - 1) // 2 for methods in groups.values())


def _fact(facts: Mapping[str, Any], name: str) -> Any:
    value = facts.get(name)
    return _USUAL.get(name) if value is None else value


def holm(p: Sequence[float | None], size: int) -> list[float | None]:
    """Holm's step-down adjusted p-values in a family of `size`, of which those not given count as 1.

    None stays None and counts as 1. Source: Holm 1979, Scand J Stat 6:65; Wright 1992, Biometrics 48:1005.
    """
    known = np.array([1.0 if value is None else value for value in p])
    if size < len(known):
        raise ValueError(f"a family of {size} has {len(known)} p-values")
    order = np.argsort(known, kind="stable")
    adjusted = np.empty(len(known))
    steps = size - np.arange(len(known))
    adjusted[order] = np.minimum(np.maximum.accumulate(known[order] * steps), 1.0) if len(known) else ()
    return [None if was is None else float(now) for was, now in zip(p, adjusted, strict=True)]
