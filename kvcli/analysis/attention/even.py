"""What keys would receive if every query spread its attention evenly over the keys that it sees.

An early key is seen by more queries, and by those that see few others: what a stretch of the prompt receives says first
how long it is and where it stands. Held against evenly spread attention it says what the model looks at.
"""

from __future__ import annotations

import numpy as np

from kvcli.analysis.attention.data import Atlas, Floats


def even_share(n: int, queries: int) -> Floats:
    """[n], adding up to 1: what each key receives from the last `queries` of n queries, mean over them."""
    weights = 1 / np.arange(1, n + 1)
    weights[: n - queries] = 0
    return np.asarray(np.cumsum(weights[::-1])[::-1] / queries)


def even_of(atlas: Atlas, prompt: int, queries: str) -> Floats:
    facts = atlas.prompts[prompt]
    return even_share(facts["n"], facts["queries"][queries])


def even_by_label(atlas: Atlas, prompt: int, queries: str) -> dict[str, float]:
    """Of each region by its label ('shot 0')."""
    share, found = even_of(atlas, prompt, queries), dict[str, float]()
    for label, start, end in atlas.prompts[prompt]["regions"]:
        found[label] = found.get(label, 0.0) + float(share[start:end].sum())
    return found


def even_region(atlas: Atlas, kind: str, group: int, queries: str) -> float:
    """Of a kind of region, mean over the prompts of a group."""
    every = [even_by_label(atlas, i, queries) for i in atlas.members(group)]
    return float(np.mean([sum(v for label, v in of.items() if label.partition(" ")[0] == kind) for of in every]))


def even_shots(atlas: Atlas, prompt: int, queries: str) -> Floats:
    """[shots], in order of their index."""
    found = even_by_label(atlas, prompt, queries)
    shots = sorted(int(label.partition(" ")[2]) for label in found if label.startswith("shot "))
    return np.array([found[f"shot {i}"] for i in shots])


def even_curves(atlas: Atlas, prompt: int, queries: str, points: int) -> Floats:
    """[3, points]: the cumulative curves of evenly spread attention, as attention/maps.py makes those of a head."""
    share = even_of(atlas, prompt, queries)
    rest = share[atlas.meta["sinks"] :]
    own = rest / rest.sum() if rest.sum() else rest
    return np.stack([_ranked(each, points) for each in (share, own, rest)])


def _ranked(share: Floats, points: int) -> Floats:
    if not len(share):
        return np.zeros(points)
    sums = np.concatenate([[0.0], np.sort(share)[::-1].cumsum()])
    return np.interp(np.linspace(0, len(share), points), np.arange(len(share) + 1), sums)
