"""The oracle: keys by the attention that the full cache's own answer gives them.

A key's score is what it receives from the last prompt token and from every answer token that chose another one (all
but the last), summed; the query heads of a group are averaged. The newest prompt token stays.
"""

from __future__ import annotations

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Array


def received(attention: Array, n: int) -> list[list[float]]:
    """[H][n] of attention [H, n - 1 + m, n - 1 + m] over a prompt of n tokens and the m - 1 answer tokens behind it."""
    out = []
    for rows in attention:
        sums = [0.0] * n
        for query in range(n - 1, len(rows)):
            for key in range(n):
                sums[key] += float(rows[query][key])
        out.append(sums)
    return out


def oracle(sums: list[list[list[float]]], kv_heads: int, size: int) -> Answer:
    """sums [layer][H][n]."""
    picks = []
    for layer in sums:
        group, n = len(layer) // kv_heads, len(layer[0])
        heads = []
        for g in range(kv_heads):
            members = layer[g * group : (g + 1) * group]
            scores = {p: sum(m[p] for m in members) / group for p in range(n - 1)}
            heads.append(Top({n - 1}, scores, size - 1))
        picks.append(heads)
    return Answer(list(map(list, picks)))
