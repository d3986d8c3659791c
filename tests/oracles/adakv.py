"""AdaKV (arXiv:2407.11550, section 3 and algorithm 1; FFY0/AdaKV snapkv_utils.py; rule=safeguard: kvpress).

The base's scores of all KV heads of a layer, protected tokens left out, are pooled; the H * B best of them are counted
per head (c_h). A head's budget is (1 - floor) * c_h + floor * B, whole numbers by largest remainder (of equal ones the
first head's), so that the layer keeps H * B exactly; a head keeps its own best. With rule=safeguard each head first
keeps its int(floor * B) best, and the rest of H * B goes to the best remaining pairs of all heads. Of equal scores the
smallest position goes first, then the first head. normalize: a head's scores times the share of their sum that its B
best hold.
"""

from __future__ import annotations

import math
from fractions import Fraction

from tests.oracles.picks import Answer, Top

Scores = list[list[list[float]]]
"""[layer][KV head][key between the protected ones]."""


def largest_remainder(ideal: list[Fraction], total: int) -> list[int]:
    parts = [math.floor(x) for x in ideal]
    order = sorted(range(len(ideal)), key=lambda i: (-(ideal[i] - parts[i]), i))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def best_of_all(scores: list[list[float]], count: int, without: set[tuple[int, int]] = frozenset()) -> list[int]:  # type: ignore[assignment]
    """How many of the best `count` pairs (head, key) are each head's."""
    pairs = [(h, p) for h, head in enumerate(scores) for p in range(len(head)) if (h, p) not in without]
    pairs.sort(key=lambda pair: (-scores[pair[0]][pair[1]], pair[1], pair[0]))
    taken = [0] * len(scores)
    for h, _ in pairs[:count]:
        taken[h] += 1
    return taken


def head_counts(
    scores: list[list[float]], size: int, floor: str = "0.2", rule: str = "floor", normalize: bool = False
) -> list[int]:
    heads, share = len(scores), Fraction(floor)
    if rule == "safeguard":
        safe = int(share * size)
        first = {
            (h, p)
            for h, head in enumerate(scores)
            for p in sorted(range(len(head)), key=lambda p, head=head: (-head[p], p))[:safe]
        }
        more = best_of_all(scores, heads * size - len(first), first)
        return [safe + extra for extra in more]
    weighed = scores
    if normalize:
        weighed = []
        for head in scores:
            total = math.fsum(head)
            weight = math.fsum(sorted(head, reverse=True)[:size]) / total if total else 1.0
            weighed.append([weight * s for s in head])
    counts = best_of_all(weighed, heads * size)
    return largest_remainder([(1 - share) * c + share * size for c in counts], heads * size)


def adakv(
    scores: Scores, sizes: list[int], newest: int, sinks: int, n: int, flags: set[str], **settings: object
) -> Answer:
    """scores and sizes: the base's, per layer; newest and sinks: what it protects."""
    always = {*range(sinks), *range(n - newest, n)}
    picks: list[list[Top]] = []
    for layer, size in zip(scores, sizes, strict=True):
        counts = head_counts(layer, size, **settings)  # type: ignore[arg-type]
        picks.append(
            [Top(always, {sinks + p: s for p, s in enumerate(head)}, c) for head, c in zip(layer, counts, strict=True)]
        )
    return Answer(list(map(list, picks)), flags)
