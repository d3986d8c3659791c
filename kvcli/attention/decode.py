"""Attention of new tokens over compressed caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Segments = Sequence[tuple[int, int, int]]
"""(first row, row behind the last, slots to look at), covering all rows in order."""


def decode(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, visible: Tensor | None, segments: Segments = ()
) -> Tensor:
    """Attention of Q new tokens over a compressed cache and themselves.

    query [R, H, Q, D]; key, value [R, H_kv, S, D] with the new tokens' own among the slots; visible bool
    [R or 1, 1 or H_kv, Q, S]: the slots each new token sees (None: all); of one token also [R, H_kv, H / H_kv, S], for
    each query head. On a CPU, which is bound by reading the cache,
    each segment of rows is read apart and only as far as it is filled. Returns [R, H, Q, D].
    """
    rows, heads, new, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    packed = query.reshape(rows, kv_heads, group * new, dim)
    if new == 1 and query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64):
        out = query.new_empty(rows, kv_heads, group, value.shape[-1])
        for a, b, used in segments or [(0, rows, key.shape[2])]:
            seen = None if visible is None else visible[a:b, ..., :used]
            out[a:b] = _one_token(packed[a:b], key[a:b, :, :used], value[a:b, :, :used], scaling, seen)[0]
        return out.reshape(rows, heads, new, -1)
    mask = visible if visible is None or new == 1 else visible.repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, new, -1)


def decode_with_weights(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `decode` for one new token, and its attention over the slots: [R, H, 1, D] and [R, H, S], float32 at least."""
    rows, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    packed = query.reshape(rows, kv_heads, heads // kv_heads, dim)
    if query.dtype in (torch.float16, torch.bfloat16):  # 16-bit logits would round the weights by percents
        packed, key = packed.float(), key.float()
    out, weights = _one_token(packed, key, value, scaling, visible)
    return out.to(query.dtype).reshape(rows, heads, 1, -1), weights.view(rows, heads, -1)


def _one_token(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of few queries over long keys, bound by reading the cache once: [R, H_kv, G, D] -> the same, and the
    weights [R * H_kv, G, S].

    K q^T instead of q K^T and no other copy of the cache: on a CPU up to twice as fast as the fused kernel, which is
    made for many queries.
    """
    rows, kv_heads, group, dim = query.shape
    size = key.shape[2]
    scores = torch.bmm(_rows(key), query.reshape(rows * kv_heads, group, dim).transpose(1, 2))
    scores = scores.transpose(1, 2).contiguous().mul_(scaling)
    if visible is not None:
        scores.view(rows, kv_heads, group, size).masked_fill_(~visible, float("-inf"))
    weights = scores.softmax(-1)
    out = torch.bmm(weights.to(value.dtype), _rows(value))
    return out.view(rows, kv_heads, group, value.shape[-1]), weights


def _rows(x: Tensor) -> Tensor:
    """[R, H_kv, S, D] -> [R * H_kv, S, D] without copying: only the first S of each row's slots are looked at."""
    rows, kv_heads, size, dim = x.shape
    if x.stride(0) != kv_heads * x.stride(1) or x.stride(2) != dim or x.stride(3) != 1:
        return x.reshape(rows * kv_heads, size, dim)
    return x.as_strided((rows * kv_heads, size, dim), (x.stride(1), dim, 1))
