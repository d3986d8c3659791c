"""What keys receive from chosen queries, block by block: no tensor of all queries by all keys is ever held."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_BYTES = 32 << 20


def most_received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[H_kv, S - Q]: the most attention each key before the queries' own received from any query of its group.

    query [H, Q, D]; key [H_kv, S, D], the queries' own the last Q, seen causally; the softmax runs over all S keys.
    Float32 at least.
    """
    before = key.shape[1] - query.shape[1]
    most = query.new_zeros(key.shape[0], before, dtype=_exact(query))
    for _, p in _probabilities(query, key, scaling):
        most = torch.maximum(most, p[..., :before].amax((1, 2)))
    return most


def summed_received(query: Tensor, key: Tensor, weights: Tensor, scaling: float) -> Tensor:
    """[H, S]: the attention each key received, summed over the queries with a weight for each.

    query [H, Q, D]; key [H_kv, S, D], the queries' own the last Q, seen causally; weights [Q]. Float32 at least.
    """
    exact = _exact(query)
    sums = query.new_zeros(key.shape[0], query.shape[0] // key.shape[0], key.shape[1], dtype=exact)
    weights = weights.to(query.device, exact)
    for start, p in _probabilities(query, key, scaling):
        rows, seen = p.shape[2:]
        sums[..., :seen] += (weights[start : start + rows, None] * p).sum(2)
    return sums.flatten(0, 1)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _probabilities(query: Tensor, key: Tensor, scaling: float) -> Iterator[tuple[int, Tensor]]:
    """(first query, p [H_kv, G, rows, seen]) of one block of queries after the other; keys behind a block are left
    out."""
    heads, count, dim = query.shape
    kv_heads, size = key.shape[:2]
    group, before = heads // kv_heads, size - count
    grouped = query.reshape(kv_heads, group, count, dim)
    keys = key.to(_exact(query)).transpose(-1, -2)  # 16-bit logits would round maxima and sums by percents
    block = max(16, _BLOCK_BYTES // (heads * size * 4))
    for start in range(0, count, block):
        end = min(count, start + block)
        part = grouped[:, :, start:end].reshape(kv_heads, group * (end - start), dim).to(keys.dtype)
        scores = (part @ keys[..., : before + end]).mul_(scaling).view(kv_heads, group, end - start, before + end)
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu(1)
        scores[..., before + start :].masked_fill_(future, float("-inf"))
        yield start, scores.softmax(-1)
