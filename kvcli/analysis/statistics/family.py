"""The family of comparisons: all that a sweep's plan makes with `full`, and p-values and levels that hold for them all.

Source of the plan: run.json's `generations` (each command's cell ids, written before it measures) and `cells` (what
each id means).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcli.analysis.statistics.stats import ALPHA

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
    grown: int = 0
    """Later commands that added comparisons: the plan was not fixed from the start."""
    looks: tuple[int | None, ...] = ()
    """Samples per task that a comparison was given in turn, where a later command added some (None: all there are). At
    each of these sizes it could be looked at."""
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
    commands = [command for command in meta.get("generations") or () if command["cells"]]
    commands = commands or [{"cells": list(described)}]
    each = [_comparisons_of(command, described) for command in commands]
    grown, looks = _growth(each, [(command.get("grid") or {}).get("limit") for command in commands])
    whole: set[tuple[str, ...]] = set().union(*each)
    known = any(isinstance(described.get(i), Mapping) for command in commands for i in command["cells"])
    return Family(max(len(whole), found), grown, looks, known)


def _comparisons_of(command: Mapping[str, Any], described: Mapping[str, Any]) -> set[tuple[str, ...]]:
    return comparisons(described[i] for i in command["cells"] if isinstance(described.get(i), Mapping))


def _growth(
    each: Sequence[set[tuple[str, ...]]], limits: Sequence[int | None]
) -> tuple[int, tuple[int | None, ...]]:  # fmt: skip
    """Later commands that added comparisons, and the sizes at which one that was there already was measured anew.

    each, limits: of every command its comparisons and its samples per task, None = all.
    """
    grown = 0
    sizes: dict[tuple[str, ...], float] = {}
    looks: set[float] = set()
    for number, (asked, limit) in enumerate(zip(each, limits, strict=True)):
        size = math.inf if limit is None else limit
        grown += number > 0 and not asked <= sizes.keys()
        for key in asked:
            before = sizes.setdefault(key, size)
            if size > before:
                looks |= {before, size}
                sizes[key] = size
    return grown, tuple(None if math.isinf(size) else int(size) for size in sorted(looks))


def comparisons(cells: Iterable[Mapping[str, Any]]) -> set[tuple[str, ...]]:
    """What is compared with `full`: each method at each size on each set of prompts; `full` with other weights is
    compared with `full` of the dense model. cells: facts of cells, as run.json has them.

    Bytes matched are those of a method at a size, so new code of that method makes no further comparison.
    """
    found = set()
    for facts in cells:
        if facts.get("method") == FULL and _fact(facts, "weights") == DENSE:
            continue
        found.add(tuple(json.dumps(_fact(facts, name), sort_keys=True) for name in (*PROMPTS, *ASKED)))
    return found


def between_methods(cells: Iterable[Mapping[str, Any]]) -> int:
    """Pairs of methods asked for the same size on the same prompts: the family of method against method.

    A method whose bytes others are held to is one of those with its bytes, as in the tables' columns.
    """
    groups: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    keys = [tuple(map(json.loads, key)) for key in comparisons(cells)]
    matched = {key[_MATCH] for key in keys}
    for key in keys:
        method, ratio, budget, match, decode = key[len(PROMPTS) :]
        if method == FULL:
            continue
        own = _named(method, ratio, budget)
        size = (None, None, own) if match is None and own in matched else (ratio, budget, match)
        group = groups.setdefault(tuple(map(json.dumps, (*key[: len(PROMPTS)], *size))), set())
        group.add((method, json.dumps(decode)))
    return sum(len(methods) * (len(methods) - 1) // 2 for methods in groups.values())


_MATCH = len(PROMPTS) + ASKED.index("match")


def _fact(facts: Mapping[str, Any], name: str) -> Any:
    value = facts.get(name)
    if name == "match" and isinstance(value, Mapping):
        return _named(str(value.get("method")), value.get("ratio"), value.get("budget"))
    return _USUAL.get(name) if value is None else value


def _named(method: str, ratio: Any, budget: Any) -> str:
    """A method at a size, as the records' `match` names it."""
    if ratio is not None:
        return f"{method}@{ratio}"
    return method if budget is None else f"{method}@{budget} KV"


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
