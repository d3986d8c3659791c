"""DuoAttention (arXiv:2410.10819, section 2; mit-han-lab/duo-attention duo_attn/utils.py and patch/tuple_kv_cache.py).

Retrieval heads hold every token, streaming heads the first `sinks` and the newest `recent`. Heads become retrieval
heads from the largest score down (of equal ones the first) while the model's budget holds.
"""

from __future__ import annotations

from tests.oracles.headkv import kv_head_scores
from tests.oracles.prompts import Prompt


def duo_attention(
    prompt: Prompt,
    size: int,
    profile: list[list[float]],
    *,
    sinks: int = 64,
    recent: int = 256,
    reduce: str = "mean",
) -> tuple[list[list[list[int]]], set[str], int]:
    """(kept[layer][kv_head], flags, retrieval heads). profile: one number per query head, or per KV head."""
    n = prompt.n
    group = len(profile[0]) // prompt.kv_heads
    scores = kv_head_scores(profile, group, reduce)
    stream = [p for p in range(n) if p < sinks or p >= n - recent]
    total = size * len(scores)
    held = [stream for _ in scores]
    retrieving = 0
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        trial = [*held]
        trial[i] = list(range(n))
        if sum(map(len, trial)) > total and len(stream) < n:
            break
        held, retrieving = trial, retrieving + 1
    flags = {"unreachable", "over_budget"} if sum(map(len, held)) > total else set()
    rows = [held[a : a + prompt.kv_heads] for a in range(0, len(held), prompt.kv_heads)]
    return rows, flags, retrieving
