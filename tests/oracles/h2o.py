"""H2O (arXiv:2306.14048, section 4): half the budget recent tokens, half heavy hitters.

A heavy hitter has a large accumulated attention: the sum (no mean) over all prompt queries of causal attention. Query
heads that share a KV head are averaged (`reduce=max`: the largest). Heavy hitters are chosen outside the recent half.
"""

from __future__ import annotations

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Array, Prompt


def h2o(prompt: Prompt, size: int, *, reduce: str = "mean", column_sums: list[Array] | None = None) -> Answer:
    n, group = prompt.n, prompt.group
    recent = max(1, size // 2)
    picks: list[list[Top]] = []
    for sums in column_sums or prompt.column_sums():
        layer = []
        for g in range(prompt.kv_heads):
            scores = {}
            for p in range(n - recent):
                members = [float(sums[h, p]) for h in range(g * group, (g + 1) * group)]
                scores[p] = max(members) if reduce == "max" else sum(members) / group
            layer.append(Top(set(range(n - recent, n)), scores, size - recent))
        picks.append(layer)
    return Answer(list(map(list, picks)))
