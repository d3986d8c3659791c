"""KVzip (arXiv:2505.23416, section 3; snu-mllab/KVzip attention/score.py and model/wrapper.py).

A key's score is the largest attention that any query of the repetition, in any query head of its group, gives it; the
softmax runs over the front of the prompt, the chunk being repeated and the queries' own keys. One budget for all layers
and heads. What stands around the context (and the first `sinks` tokens) is kept, at most half of a head's budget: the
newest first (METHODS.md, One rule for protected tokens). Ties: position, then layer, then head.
"""

from __future__ import annotations

import math

from tests.oracles.prompts import Array, Layout, Prompt

Scores = list[list[list[float]]]
"""[layer][kv_head][n]."""


def most_received(queries: Array, keys: Array, scaling: float, own: int) -> list[list[float]]:
    """[H_kv][keys before the last `own`]: queries [H, own, D] see all keys before their own and, in order, these."""
    group, before = len(queries) // len(keys), keys.shape[1] - own
    out = [[0.0] * before for _ in keys]
    for h, head in enumerate(queries):
        for i, q in enumerate(head):
            logits = [scaling * float(q @ k) for k in keys[h // group, : before + i + 1]]
            top = max(logits)
            total = sum(math.exp(x - top) for x in logits)
            for p in range(before):
                out[h // group][p] = max(out[h // group][p], math.exp(logits[p] - top) / total)
    return out


def repeated(layout: Layout) -> tuple[int, int]:
    """The prompt without template and system text in front and question and template behind; else with the question."""
    kinds = [kind for kind, start, end, _ in layout for _ in range(start, end)]
    inner = [p for p, kind in enumerate(kinds) if kind not in ("special", "system")]
    for outer in (("special", "question"), ("special",)):
        behind = [p for p, kind in enumerate(kinds) if kind not in outer]
        if inner and behind and inner[0] <= behind[-1]:
            return inner[0], behind[-1] + 1
    return 0, len(kinds)


def kvzip(
    prompt: Prompt, scores: Scores, size: int, *, sinks: int = 4, strict: bool = False
) -> tuple[list[list[list[int]]], set[str]]:
    """(kept[layer][kv_head], flags) at `size` KV pairs per head on average."""
    n, (start, end) = prompt.n, repeated(prompt.layout)
    newest = max(1, n - end)
    first = min(max(start, sinks), n - newest)
    flags: set[str] = set()
    if size < n and strict and newest + first > size:
        flags = {"over_budget"}
    elif size < n and not strict:
        half = max(1, size // 2)
        few = min(newest, half)
        rest = min(first, max(0, half - few))
        flags = {"fallback"} if few < newest or rest < first else set()
        newest, first = few, rest
    fixed = {*range(first), *range(n - newest, n)}
    pairs = [(layer, head) for layer in range(prompt.layers) for head in range(prompt.kv_heads)]
    kept = {pair: set(fixed) for pair in pairs}
    room = size * len(pairs) - len(fixed) * len(pairs)
    contest = [(-scores[a][b][p], p, a, b) for a, b in pairs for p in range(n) if p not in fixed]
    for _, p, layer, head in sorted(contest)[: max(0, room)]:
        kept[layer, head].add(p)
    return [[sorted(kept[a, b]) for b in range(prompt.kv_heads)] for a in range(prompt.layers)], flags
