"""PyramidInfer (arXiv:2405.12532; mutonix/pyramidinfer models/modeling_llama_pyramidinfer.py, configs/*.json).

`authors_sizes` is the code's rule word for word. `solved_sizes` is kvcli's: the same decay without rounding on the way
and cut to the least context instead of skipped, its depth solved for a total (METHODS.md, pyramidinfer).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from operator import mul

from scipy.optimize import brentq

from tests.oracles.prompts import Array


def authors_sizes(
    n: int, layers: int, share: float, *, recent: float = 0.2, least: int = 64, interval: int = 1
) -> list[int]:
    """Tokens that enter each layer."""
    newest = int(n * recent)
    least = min(least, n - 1 - newest)
    older, out = n - 1 - newest, []
    for layer in range(layers):
        out.append(older + newest + 1)
        handed = (1.0 - share) * (math.cos(math.pi * layer / layers) + 1) / 2 + share
        if layer % interval == 0 and older > least and handed < 1.0:
            older = int(older * handed) if int(older * handed) > least else older
    return out


def solved_sizes(
    n: int, layers: int, size: int, *, recent: float = 0.2, least: int = 64, interval: int = 1, strict: bool = False
) -> tuple[list[int], int, set[str]]:
    """(tokens that enter each layer, newest tokens that stay, flags); the sizes add up to layers x size."""
    newest = min(int(n * recent), n - 1) + 1
    least = min(least, n - newest)
    older, total = n - newest, layers * size
    if size == n:
        return [n] * layers, newest, set()

    def entering(share: float, scale: float) -> list[float]:
        handed = [
            scale * (share + (1 - share) * (math.cos(math.pi * i / layers) + 1) / 2) if i % interval == 0 else 1.0
            for i in range(layers - 1)
        ]
        return [newest + max(least, older * product) for product in accumulate(handed, mul, initial=1.0)]

    def solved(of: Callable[[float], list[float]]) -> list[float]:
        return of(brentq(lambda x: sum(of(x)) - total, 0.0, 1.0, xtol=1e-15, rtol=1e-15))

    lowest, flags = n + (layers - 1) * (newest + least), set[str]()
    if total > lowest and sum(entering(0.0, 1.0)) <= total:
        ideal = solved(lambda share: entering(share, 1.0))
    elif total > lowest:
        ideal = solved(lambda scale: entering(0.0, scale))
    elif total == lowest or strict:
        flags = {"over_budget"} if total < lowest else set()
        ideal = [float(n)] + [float(newest + least)] * (layers - 1)
    else:
        flags = {"fallback"}
        if total < n + layers - 1:
            flags |= {"unreachable", "over_budget"}
        others = max(1.0, (total - n) / (layers - 1)) if layers > 1 else 1.0
        ideal = [float(n)] + [others] * (layers - 1)
        newest = 1 + int((newest - 1) * (others - 1) / max(1, newest - 1 + least))
    total = max(total, round(sum(ideal))) if flags & {"over_budget"} else total
    out = [math.floor(x + 1e-9) for x in ideal]
    by_remainder = sorted(range(layers), key=lambda i: (out[i] - ideal[i], i))
    for i in by_remainder[: total - sum(out)]:
        out[i] += 1
    return out, newest, flags


def score(attention: Array, newest: int, weight: float = 1.2) -> list[float]:
    """What each older token of a layer got: attention [H, m, m] of its tokens, causal among themselves."""
    heads, m, _ = attention.shape
    out = []
    for p in range(m - newest):
        total = 0.0
        for step, i in enumerate(range(m - newest, m)):
            counts = 1.0 + (weight - 1.0) * step / (newest - 1) if newest > 1 else 1.0
            total += counts * sum(float(attention[h, i, p]) for h in range(heads)) / heads
        out.append(total / newest)
    return out


def going_on(scores: list[float], m: int, size: int, newest: int, sinks: int = 4) -> list[int]:
    """The `size` of a layer's m tokens that enter the next: the newest, the first `sinks`, the best of the others."""
    older = range(m - newest)
    first = list(older[:sinks])[: size - newest]
    best = sorted((p for p in older if p not in first), key=lambda p: (-scores[p], p))
    return sorted([*first, *best[: size - newest - len(first)], *range(m - newest, m)])
