"""Attention of new tokens over compressed caches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decode(query: Tensor, key: Tensor, value: Tensor, scaling: float, valid: Tensor | None) -> Tensor:
    """Attention of Q new tokens over a compressed cache and themselves.

    query [R, H, Q, D]; key, value [R, H_kv, S, D], the new tokens' own the last Q; valid [R, 1 or H_kv, S - new] marks
    the slots of the compressed part that hold a kept pair (None: all do); slots after it are always valid.
    Returns [R, H, Q, D].
    """
    rows, heads, new, dim = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    group = heads // kv_heads
    packed = query.reshape(rows, kv_heads, group * new, dim)
    mask = None
    if valid is not None:
        mask = F.pad(valid, (0, size - valid.shape[-1]), value=True)[:, :, None, :]
    if new > 1:
        causal = torch.ones(new, size, dtype=torch.bool, device=query.device).tril(size - new)
        mask = causal if mask is None else mask & causal
        mask = mask.repeat(*([1] * (mask.dim() - 2)), group, 1)
    elif query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64):
        return _one_token(packed, key, value, scaling, mask).reshape(rows, heads, new, dim)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, new, dim)


def _one_token(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Attention of few queries over long keys, bound by reading the cache once: [R, H_kv, G, D] -> the same.

    K q^T instead of q K^T and no other copy of the cache: on a CPU up to twice as fast as the fused kernel, which is
    made for many queries.
    """
    rows, kv_heads, group, dim = query.shape
    size = key.shape[2]
    scores = torch.bmm(_rows(key), query.reshape(rows * kv_heads, group, dim).transpose(1, 2))
    scores = scores.transpose(1, 2).contiguous().mul_(scaling)
    if mask is not None:
        by_row = scores.view(rows, kv_heads, group, size)
        by_row.masked_fill_(~mask, float("-inf"))
    return torch.bmm(scores.softmax(-1), _rows(value)).view(rows, kv_heads, group, value.shape[-1])


def _rows(x: Tensor) -> Tensor:
    """[R, H_kv, S, D] -> [R * H_kv, S, D] without copying: only the first S of each row's slots are looked at."""
    rows, kv_heads, size, dim = x.shape
    if x.stride(0) != kv_heads * x.stride(1) or x.stride(2) != dim or x.stride(3) != 1:
        return x.reshape(rows * kv_heads, size, dim)
    return x.as_strided((rows * kv_heads, size, dim), (x.stride(1), dim, 1))
