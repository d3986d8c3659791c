"""Slow attention that anyone can check by eye: the truth the other backends are tested against."""

from __future__ import annotations

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


def prefill(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, weights: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """As backends.prefill, the prefix already in key and value, with the whole tensor of probabilities in memory."""
    visible = causal(query.shape[2], key.shape[2]).to(query.device)
    p = probabilities(query, key, scaling, visible)
    values = value.to(p.dtype).repeat_interleave(query.shape[1] // value.shape[1], 1)
    sums = {name: (p * w.to(p.dtype)[:, None, :, None]).sum(2) for name, w in weights.items()}
    return (p @ values).to(query.dtype), sums
