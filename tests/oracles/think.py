"""ThinK (arXiv:2407.21018, section 3.2; SalesforceAIResearch/ThinK, kv_pruning_utils.py).

Per KV head, a channel's score is the Frobenius norm of Q_i K_i, the outer product of that channel of the last `window`
queries (all query heads of the group, one below the other) and of the keys that are pruned: those before the last
`window` of the cache. The floor(prune * D) channels with the smallest scores are taken out of these keys.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from tests.oracles.prompts import Array, Prompt


def channel_scores(queries: Array, keys: Array) -> list[float]:
    """queries [m, D], keys [P, D]."""
    scores = []
    for channel in range(keys.shape[1]):
        product = np.outer(queries[:, channel], keys[:, channel])
        scores.append(float(np.sqrt((product**2).sum())))
    return scores


def think(
    prompt: Prompt, layer: int, head: int, kept: list[int], *, prune: str = "0.4", window: int = 32
) -> tuple[Array, list[int], float]:
    """(keys that are read [K, D], channels that stay, bytes of keys, values and channel numbers)."""
    keys = prompt.keys[layer][head][kept]
    width = keys.shape[1]
    group = range(head * prompt.group, (head + 1) * prompt.group)
    queries = np.concatenate([prompt.queries[layer][h, max(0, prompt.n - window) :] for h in group])
    old = max(0, len(kept) - window)
    gone = int(Fraction(prune) * width)
    scores = channel_scores(queries, keys[:old])
    ranked = sorted(range(width), key=lambda c: (-scores[c], c))
    stay = sorted(ranked[: width - gone])
    out = keys.copy()
    for token in range(old):
        for channel in range(width):
            if channel not in stay:
                out[token, channel] = 0.0
    size = 2 * (old * len(stay) + (len(kept) - old) * width + len(kept) * width)
    size += len(stay) if old and gone else 0  # channel numbers where some are missing
    return out, stay, size
