"""Slow attention that anyone can check by eye: the truth the other backends are tested against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def probabilities(query: Tensor, key: Tensor, scaling: float, visible: Tensor) -> Tensor:
    """softmax(q k^T * scaling) over the visible keys, float32 at least.

    query [B, H, Q, D]; key [B, H_kv, S, D]; visible: bool, broadcastable to [B, H, Q, S]. Returns [B, H, Q, S].
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    keys = key.to(exact).repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.to(exact) @ keys.transpose(-1, -2) * scaling
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


def causal(queries: int, keys: int) -> Tensor:
    """bool [Q, S]: the last Q of S positions look back."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def within(queries: int, keys: int, width: int) -> Tensor:
    """bool [Q, S]: which keys stand less than `width` positions before each of the last Q of S positions."""
    return causal(queries, keys) & ~causal(queries, keys).tril(keys - queries - width)


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    weights: dict[str, Tensor],
    bands: Mapping[str, int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As backends.prefill, the prefix already in key and value, with the whole tensor of probabilities in memory."""
    visible = causal(query.shape[2], key.shape[2]).to(query.device)
    p = probabilities(query, key, scaling, visible)
    values = value.to(p.dtype).repeat_interleave(query.shape[1] // value.shape[1], 1)
    sums = {}
    for name, weight in weights.items():
        part = p * weight.to(p.dtype)[:, None, :, None]
        if bands and name in bands:
            part = part * within(p.shape[2], p.shape[3], bands[name]).to(p.device)
        sums[name] = part.sum(2)
    return (p @ values).to(query.dtype), sums
