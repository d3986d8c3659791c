"""SnapKV (arXiv:2404.14469, section 4 and listing 1; FasterDecoding/SnapKV snapkv_utils.py).

The attention of the last `window` queries is summed per query head over the keys before the window, smoothed by a
pool of `kernel` neighbours (stride 1, same padding; an average counts the padding as zeros, as the authors' code does),
averaged over the query heads of each KV head (`reduce=max`: the largest); the window is kept and the best of the rest
fill the budget.
"""

from __future__ import annotations

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Prompt, cut_window


def window_sums(prompt: Prompt, layer: int, window: int) -> list[list[float]]:
    """[H][n - window]: attention from the window's queries to each key before the window."""
    n = prompt.n
    out = []
    for h in range(prompt.heads):
        total = [0.0] * (n - window)
        for i in range(n - window, n):
            row = prompt.attention[layer][h, i]
            for p in range(n - window):
                total[p] += float(row[p])
        out.append(total)
    return out


def pooled(values: list[float], kernel: int, pool: str) -> list[float]:
    out = []
    for p in range(len(values)):
        seen = values[max(0, p - kernel // 2) : p + kernel // 2 + 1]
        out.append(max(seen) if pool == "max" else sum(seen) / kernel)
    return out


def head_scores(prompt: Prompt, layer: int, window: int, kernel: int, pool: str, reduce: str) -> list[list[float]]:
    """[H_kv][n - window]."""
    per_head = [pooled(sums, kernel, pool) for sums in window_sums(prompt, layer, window)]
    out = []
    for g in range(prompt.kv_heads):
        members = per_head[g * prompt.group : (g + 1) * prompt.group]
        out.append([max(v) if reduce == "max" else sum(v) / prompt.group for v in zip(*members, strict=True)])
    return out


def snapkv(
    prompt: Prompt,
    size: int,
    *,
    window: int = 32,
    kernel: int = 7,
    pool: str = "max",
    reduce: str = "mean",
    strict: bool = False,
) -> Answer:
    n = prompt.n
    w, cut = cut_window(window, n, size, strict)
    recent = set(range(n - w, n))
    picks = []
    for layer in range(prompt.layers):
        scores = head_scores(prompt, layer, w, kernel, pool, reduce)
        picks.append([Top(recent, dict(enumerate(head)), max(0, size - w)) for head in scores])
    return Answer(list(map(list, picks)), {"fallback"} if cut else {"over_budget"} if w > size else set())
