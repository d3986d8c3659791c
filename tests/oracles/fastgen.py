"""FastGen (arXiv:2310.01801, sections 3.3 and 3.4; the sets as in AnswerDotAI/cold-compress, KVCacheHybrid).

Per KV head the first of special / + punctuation / + frequent / + local / full whose attention, restricted to the rule's
keys, adds up to at least T on average over all prompt queries. The last rule's local part moves with the query; its
frequent ones are chosen outside the newest ones. Attention is averaged over the query heads of a group first.
"""

from __future__ import annotations

import math
from fractions import Fraction

from tests.oracles.prompts import Array, Prompt

NEAR = 1e-9


def share(part: str, n: int) -> int:
    return math.floor(Fraction(part) * n + Fraction(1, 2))


def fastgen(
    prompt: Prompt, punctuation: set[int], recovery: float, *, local: str = "0.3", frequent: str = "0.3"
) -> list[list[tuple[list[list[int]], list[float]]]]:
    """[layer][kv_head]: (the kept positions of the five rules, what the first four hold)."""
    n, group = prompt.n, prompt.group
    special = {p for kind, start, end, _ in prompt.layout if kind == "special" for p in range(start, end)} | {n - 1}
    near, many = max(1, share(local, n)), share(frequent, n)
    out = []
    for weights in prompt.attention:
        heads = []
        for g in range(prompt.kv_heads):
            rows = sum(weights[g * group : (g + 1) * group]) / group
            heads.append(_rules(rows, special, punctuation, near, many))
        out.append(heads)
    return out


def _rules(
    rows: Array, special: set[int], punctuation: set[int], near: int, many: int
) -> tuple[list[list[int]], list[float]]:
    n = len(rows)
    sums = [sum(float(rows[q, k]) for q in range(n)) for k in range(n)]

    def largest(taken: set[int]) -> set[int]:
        left = sorted((k for k in range(n) if k not in taken), key=lambda k: (-sums[k], k))
        return set(left[:many])

    marked = special | punctuation
    newest = set(range(n - near, n))
    third, far = marked | largest(marked), marked | largest(marked | newest)
    held = [sum(sums[k] for k in kept) / n for kept in (special, marked, third)]
    local = 0.0
    for q in range(n):
        for k in range(q + 1):
            if k in far or q - k < near:
                local += float(rows[q, k]) / n
    sets = [special, marked, third, far | newest, set(range(n))]
    return [sorted(kept) for kept in sets], [*held, local]


def chosen(held: list[float], recovery: float) -> set[int]:
    """The rule, or both where a sum lies at the threshold."""
    strict, loose = (next((r for r in range(4) if held[r] >= recovery + d), 4) for d in (NEAR, -NEAR))
    return {strict, loose}
