"""Knorm (arXiv:2406.11430, section 3; alessiodevoto/l2compress cache.py).

Per layer and KV head the keys with the smallest Euclidean norm stay; layers 0 and 1 keep everything. Here the total
over layers is the budget's: the other layers share what is left, the first of them one more where it does not divide.
They keep at least half of their budget (rounded up); the skipped layers share the rest then, and it is a fallback.
The newest token always stays.
"""

from __future__ import annotations

import math

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Prompt


def even(total: int, layers: list[int]) -> dict[int, int]:
    sizes = dict.fromkeys(layers, 0)
    for i in range(total):
        sizes[layers[i % len(layers)]] += 1
    return sizes


def layer_sizes(n: int, size: int, layers: int, skip: set[int], strict: bool = False) -> tuple[list[int], set[str]]:
    kept_whole = sorted(layer for layer in skip if layer < layers)
    others = [layer for layer in range(layers) if layer not in skip]
    left = size * layers - n * len(kept_whole)
    if strict:
        flags = {"over_budget"} if left < len(others) else set()
        sizes = {**dict.fromkeys(kept_whole, n), **(even(max(left, len(others)), others) if others else {})}
    else:
        least = math.ceil(size / 2) * len(others)
        flags = {"fallback"} if left < least else set()
        given = max(left, least)
        sizes = {**(even(given, others) if others else {})}
        sizes.update(even(size * layers - given, kept_whole) if kept_whole else {})
    return [sizes[layer] for layer in range(layers)], flags


def norm(vector: list[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in vector))


def knorm(prompt: Prompt, size: int, *, skip_layers: str = "0,1", strict: bool = False) -> Answer:
    n = prompt.n
    skip = set() if skip_layers == "none" else {int(word) for word in skip_layers.split(",")}
    sizes, flags = layer_sizes(n, size, prompt.layers, skip, strict)
    picks: list[list[Top]] = []
    for layer in range(prompt.layers):
        heads = [[norm(prompt.keys[layer][h, p].tolist()) for p in range(n - 1)] for h in range(prompt.kv_heads)]
        picks.append([Top({n - 1}, {p: -x for p, x in enumerate(head)}, sizes[layer] - 1) for head in heads])
    return Answer(list(map(list, picks)), flags)
