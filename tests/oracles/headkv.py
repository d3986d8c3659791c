"""HeadKV (arXiv:2410.19258, section 3; FYYFU/HeadKV headkv/snapkv_utils.py, ReasonSnapKVCluster).

b = budget - window for a head. Every head has b - b / beta of its own; b / beta of each head form a pool that is shared
out over all layers and heads by score^temp. A head cannot hold more than the prompt's keys before the window: what is
left over goes to the others by the same shares. Exact fractions, rounded to 9 places in the end; largest remainders, of
equal ones the first.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Prompt, cut_window
from tests.oracles.snapkv import head_scores


def head_budgets(scores: list[float], b: int, most: int, beta: str, temp: str) -> list[int]:
    """Keys beyond the window for each head of the model."""
    count = len(scores)
    powers = [Fraction((x / max(scores)) ** float(temp)) if max(scores) else Fraction(1) for x in scores]
    sizes = [b - b / Fraction(beta) for _ in scores]
    left = b * count - sum(sizes)
    full: set[int] = set()
    while left > 0 and len(full) < count:
        others = [i for i in range(count) if i not in full]
        whole = sum(powers[i] for i in others)
        wish = {i: left * powers[i] / whole if whole else left / len(others) for i in others}
        over = [i for i in others if sizes[i] + wish[i] >= most]
        for i in over or others:
            more = most - sizes[i] if over else wish[i]
            sizes[i] += more
            left -= more
        full |= set(over or others)
    sizes = [Fraction(round(x, 9)) for x in sizes]
    parts = [floor(x) for x in sizes]
    order = sorted(range(count), key=lambda i: (-(sizes[i] - parts[i]), i))
    for i in order[: min(b, most) * count - sum(parts)]:
        parts[i] += 1
    return parts


def kv_head_scores(profile: list[list[float]], group: int, reduce: str) -> list[float]:
    """All KV heads, layer by layer, from one number per query head."""
    out = []
    for row in profile:
        for g in range(len(row) // group):
            members = row[g * group : (g + 1) * group]
            out.append(max(members) if reduce == "max" else sum(members) / group)
    return out


def headkv(
    prompt: Prompt,
    size: int,
    profile: list[list[float]],
    *,
    window: int = 32,
    kernel: int = 7,
    pool: str = "max",
    reduce: str = "mean",
    beta: str = "1.005",
    temp: str = "1",
    head_reduce: str = "mean",
    strict: bool = False,
) -> Answer:
    n = prompt.n
    w, cut = cut_window(window, n, size, strict)
    budgets = head_budgets(
        kv_head_scores(profile, prompt.group, head_reduce), max(0, size - w), n - w, str(beta), str(temp)
    )
    picks: list[list[Top]] = []
    for layer in range(prompt.layers):
        scores = head_scores(prompt, layer, w, kernel, pool, reduce)
        mine = budgets[layer * prompt.kv_heads : (layer + 1) * prompt.kv_heads]
        picks.append(
            [Top(set(range(n - w, n)), dict(enumerate(head)), count) for head, count in zip(scores, mine, strict=True)]
        )
    return Answer(list(map(list, picks)), {"fallback"} if cut else {"over_budget"} if w > size else set())
