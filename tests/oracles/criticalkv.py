"""CriticalKV (arXiv:2502.03805, algorithm 1; kvpress criticalkv_press.py, by its authors).

A head's budget B (protected tokens left out) is filled in two stages: the int(first * B) keys with the largest base
scores, then of the other keys those with the largest (score + eps) * ||W_o v||_1. W_o v is the value of the key sent
through a query head's columns of the output projection; the norm is the mean over the query heads of a KV head. Scores
of an observation window are means over its queries. heads=adaptive: B is the head's share under AdaKV's safeguard rule.
"""

from __future__ import annotations

import math
from fractions import Fraction

from tests.oracles.adakv import Scores, head_counts
from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Array, Prompt


def value_weights(prompt: Prompt, projections: list[Array], layer: int) -> list[list[float]]:
    """[H_kv][n]; projections: per layer [hidden, H * D]."""
    matrix = projections[layer]
    width = prompt.values[layer].shape[2]
    out = []
    for g in range(prompt.kv_heads):
        row = []
        for p in range(prompt.n):
            value = prompt.values[layer][g, p].tolist()
            norms = []
            for h in range(g * prompt.group, (g + 1) * prompt.group):
                columns = matrix[:, h * width : (h + 1) * width].tolist()
                norms.append(math.fsum(abs(math.fsum(w * v for w, v in zip(r, value, strict=True))) for r in columns))
            row.append(math.fsum(norms) / len(norms))
        out.append(row)
    return out


def criticalkv(
    prompt: Prompt,
    projections: list[Array],
    scores: Scores,
    sizes: list[int],
    newest: int,
    flags: set[str],
    *,
    first: float = 0.5,
    eps: float = 1e-4,
    heads: str = "even",
) -> Answer:
    """scores, sizes: the base's, per layer (scores as means over a window's queries); newest: what it protects."""
    n = prompt.n
    always = set(range(n - newest, n))
    picks: list[list[Top]] = []
    for layer, (found, size) in enumerate(zip(scores, sizes, strict=True)):
        weight = value_weights(prompt, projections, layer)
        counts = head_counts(found, size, rule="safeguard") if heads == "adaptive" else [size] * prompt.kv_heads
        row = []
        for h, (head, count) in enumerate(zip(found, counts, strict=True)):
            stage1 = sorted(range(len(head)), key=lambda p, head=head: (-head[p], p))[
                : int(Fraction(str(first)) * count)
            ]
            others = {p: (s + eps) * weight[h][p] for p, s in enumerate(head) if p not in stage1}
            row.append(Top(always | set(stage1), others, count - len(stage1)))
        picks.append(row)
    return Answer(list(map(list, picks)), flags)
