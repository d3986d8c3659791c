"""Quest in plain loops: which slots each query head reads, by the upper bounds of whole pages."""

from __future__ import annotations

import numpy as np


def quest(query: np.ndarray, keys: np.ndarray, filled: list[int], tokens: int, page: int, least: int) -> list[set[int]]:
    """query [H, D], keys [H_kv, S, D], filled pairs per KV head -> per query head the slots it reads."""
    heads, kv_heads = query.shape[0], keys.shape[0]
    reads = []
    for head in range(heads):
        kv = head // (heads // kv_heads)
        bounds = []
        for start in range(0, filled[kv], page):
            members = range(start, min(start + page, filled[kv]))
            total = 0.0
            for channel in range(query.shape[1]):
                total += max(query[head, channel] * keys[kv, t, channel] for t in members)
            bounds.append((-total, start, members))
        count = min(max(least, tokens // page), len(bounds))
        reads.append({t for _, _, members in sorted(bounds, key=lambda b: b[:2])[:count] for t in members})
    return reads


def read_bytes(reads: list[set[int]], kv_heads: int, filled: list[int], page: int, width: int, chosen: bool) -> int:
    """16-bit bytes: pairs that any head of a group reads (keys and values of `width`), and two bounds per page."""
    group = len(reads) // kv_heads
    total = 0
    for kv in range(kv_heads):
        union: set[int] = set().union(*reads[kv * group : (kv + 1) * group])
        total += len(union) * 2 * width
        total += -(-filled[kv] // page) * 2 * width if chosen else 0
    return total * 2
