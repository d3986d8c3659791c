"""Scissorhands (arXiv:2305.17118, algorithm 2): a key is unimportant to the query of token t when it receives less than
1/t; over the last `history` queries the keys that were so most often go, but for the `recent` newest tokens.

The query heads of a KV head share the mean of their attention (`reduce=max`: the largest); the recent tokens take at
most half of the budget (METHODS.md, One rule for protected tokens).
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Array, Prompt, cut_window


def unimportant(members: Sequence[Array], query: int, reduce: str) -> list[int]:
    """Keys that get less than their even share of one query's attention. members: [n] of each query head."""
    out = []
    for p in range(query + 1):
        seen = [float(row[p]) for row in members]
        shared = max(seen) if reduce == "max" else sum(seen) / len(seen)
        if shared < 1 / (query + 1):
            out.append(p)
    return out


def scissorhands(
    prompt: Prompt, size: int, *, history: int = 400, recent: int = 10, reduce: str = "mean", strict: bool = False
) -> Answer:
    n, group = prompt.n, prompt.group
    w, cut = cut_window(recent, n, size, strict)
    picks = []
    for weights in prompt.attention:
        layer = []
        for g in range(prompt.kv_heads):
            counts = [0] * n
            for i in range(max(0, n - history), n):
                for p in unimportant([weights[h, i] for h in range(g * group, (g + 1) * group)], i, reduce):
                    counts[p] += 1
            scores = {p: -float(counts[p]) for p in range(n - w)}
            layer.append(Top(set(range(n - w, n)), scores, max(0, size - w)))
        picks.append(layer)
    return Answer(list(map(list, picks)), {"fallback"} if cut else {"over_budget"} if w > size else set())
