"""PyramidKV (arXiv:2406.02069, section 3.2; KVCache-Factory pyramidkv_utils.py without its integer division).

SnapKV's scores; the budget outside the window falls linearly from the first layer to the last, which gets free / beta.
Exact fractions; the layers' budgets add up to layers x free (METHODS.md, traps), largest remainders first.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Prompt, cut_window
from tests.oracles.snapkv import head_scores


def layer_budgets(layers: int, free: int, most: int, beta: int | str) -> list[int]:
    """KV pairs outside the window for each layer; none above `most`."""
    if layers == 1:
        return [min(free, most)]
    last = free / Fraction(beta)
    first = 2 * free - last
    if first > most:
        first = Fraction(most)
        last = 2 * free - first
    exact = [first - i * (first - last) / (layers - 1) for i in range(layers)]
    parts = [floor(x) for x in exact]
    by_remainder = sorted(range(layers), key=lambda i: (-(exact[i] - parts[i]), i))
    for i in by_remainder[: layers * free - sum(parts)]:
        parts[i] += 1
    return parts


def pyramidkv(
    prompt: Prompt,
    size: int,
    *,
    window: int = 8,
    kernel: int = 7,
    beta: int | str = 20,
    pool: str = "max",
    reduce: str = "mean",
    strict: bool = False,
) -> Answer:
    n = prompt.n
    w, cut = cut_window(window, n, size, strict)
    budgets = layer_budgets(prompt.layers, max(0, size - w), n - w, beta)
    recent = set(range(n - w, n))
    picks = []
    for layer in range(prompt.layers):
        scores = head_scores(prompt, layer, w, kernel, pool, reduce)
        picks.append([Top(recent, dict(enumerate(head)), budgets[layer]) for head in scores])
    return Answer(list(map(list, picks)), {"fallback"} if cut else {"over_budget"} if w > size else set())
