"""KeyDiff (arXiv:2504.15364, section 3).

The anchor of a set of keys is the mean of its keys divided by their lengths; a key's score is minus the cosine between
it and the anchor, and the largest scores stay. One shot: over the whole prompt. In blocks: tokens enter the cache
`block` at a time, and after each block the cache is cut to its size by the scores over what it holds.
The newest token of the prompt always stays; in earlier blocks no token is protected.
"""

from __future__ import annotations

import math

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Prompt


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(math.fsum(x * x for x in vector))
    return [x / length if length else 0.0 for x in vector]


def scores(keys: list[list[float]], members: list[int]) -> dict[int, float]:
    units = {p: unit(keys[p]) for p in members}
    anchor = [math.fsum(units[p][d] for p in members) / len(members) for d in range(len(keys[0]))]
    direction = unit(anchor)
    return {p: -math.fsum(a * b for a, b in zip(units[p], direction, strict=True)) for p in members}


def blockwise(keys: list[list[float]], size: int, block: int) -> Top:
    """The last step's choice among what the steps before it left."""
    n = len(keys)
    cache: list[int] = []
    pick = Top(set(range(n)), {}, 0)
    for start in range(0, n, block):
        cache += range(start, min(start + block, n))
        if len(cache) > size:
            forced = {n - 1} & set(cache)
            found = {p: s for p, s in scores(keys, cache).items() if p not in forced}
            pick = Top(forced, found, size - len(forced))
            cache = pick.kept()
    return pick


def keydiff(prompt: Prompt, size: int, *, block: int = 0, strict: bool = False) -> Answer:
    n = prompt.n
    picks: list[list[Top]] = []
    for layer in range(prompt.layers):
        heads = [prompt.keys[layer][h].tolist() for h in range(prompt.kv_heads)]
        if block and size < n:
            picks.append([blockwise(keys, size, block) for keys in heads])
        else:
            found = [scores(keys, list(range(n))) for keys in heads]
            picks.append([Top({n - 1}, {p: s for p, s in head.items() if p < n - 1}, size - 1) for head in found])
    return Answer(list(map(list, picks)))
