"""Causal attention of a whole prompt, and its column sums, behind one function.

`sdpa` and `flash` take output and logsumexp from a fused kernel (fused.py) and the column sums from one more pass over
the keys (sums.py). `blockwise` computes both together in plain PyTorch, one block of queries at a time: asked for by
name, and where no fused kernel fits. No n x n tensor is ever held. `reference` holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from kvcli.attention import fused, reference
from kvcli.attention.sums import column_sums

_BLOCK_BYTES = 32 << 20

Prefix = tuple[Tensor, Tensor]
"""Keys and values [H_kv, P, D] of tokens that stand before every row of a batch."""


def choose(backend: str, query: Tensor) -> str:
    """The backend behind `auto`: flash-attn where it is installed and fits, else PyTorch's fused kernels."""
    if backend != "auto":
        return backend
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and half and query.shape[-1] <= 256 and find_spec("flash_attn") is not None:
        return "flash"
    return "sdpa"


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    weights: dict[str, Tensor],
    backend: str = "auto",
    prefix: Prefix | None = None,
    bands: Mapping[str, int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Causal attention of new tokens over a shared prefix (if any) and themselves, and its column sums.

    query [B, H, S, D]; key, value [B, H_kv, S, D]; prefix: keys and values [H_kv, P, D] that stand before every row;
    weights[name] [B, S]: how much each query counts in the sum of that name; bands[name]: a sum of that name takes only
    queries less than so many positions behind the key. Returns output [B, H, S, D] and sums[name] [B, H, P + S],
    float32 at least.
    """
    backend = choose(backend, query)
    if backend == "reference":
        return reference.prefill(query, *_joined(key, value, prefix), scaling, weights, bands)
    if backend == "blockwise":
        return _blockwise(query, key, value, scaling, weights, prefix, bands)
    done = _fused(query, key, value, scaling, backend, prefix, exact=bool(weights))
    if done is None:  # no fused kernel fits, see fused.attention
        return _blockwise(query, key, value, scaling, weights, prefix, bands)
    out, lse = done
    before = None if prefix is None else prefix[0]
    return out, column_sums(query, key, lse, scaling, weights, before, bands) if weights else {}


def _joined(key: Tensor, value: Tensor, prefix: Prefix | None) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H_kv, P + S, D]."""
    if prefix is None:
        return key, value
    before = (x.expand(key.shape[0], -1, -1, -1) for x in prefix)
    return tuple(torch.cat([old, new], 2) for old, new in zip(before, (key, value), strict=True))  # type: ignore[return-value]


def _fused(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, backend: str, prefix: Prefix | None, *, exact: bool
) -> tuple[Tensor, Tensor] | None:
    """(output, logsumexp [B, H, S]) over prefix and own keys, or None where no fused kernel fits.

    Prefix and own keys are two calls, merged by their logsumexps: the prefix is read once for all rows, and none of it
    depends on how a kernel aligns its causal mask when there are more keys than queries.
    """
    package = backend == "flash"
    half = query.dtype in (torch.float16, torch.bfloat16)
    exact |= prefix is not None or (half and query.device.type == "cpu")  # what is captured must not move the output
    own = fused.attention(query, key, value, scaling, causal=True, package=package, exact=exact)
    if own is None or prefix is None:
        return own
    batch, heads, size, dim = query.shape
    rows = query.transpose(0, 1).reshape(1, heads, batch * size, dim)
    keys, values = (x[None] for x in prefix)
    far = fused.attention(rows, keys, values, scaling, causal=False, package=package, exact=exact)
    if far is None:
        return None
    out, lse = (x.reshape(heads, batch, size, *x.shape[3:]).transpose(0, 1) for x in far)
    return fused.merged(own, (out, lse))


def _blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    weights: dict[str, Tensor],
    prefix: Prefix | None,
    bands: Mapping[str, int] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and column sums, one block of queries against the keys it can see."""
    batch, heads, size, dim = query.shape
    kv_heads, width = key.shape[1], value.shape[-1]
    group = heads // kv_heads
    before = 0 if prefix is None else prefix[0].shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = query.view(batch, kv_heads, group, size, dim)
    out = query.new_empty(batch, kv_heads, group, size, width)
    sums = {name: query.new_zeros(batch, kv_heads, group, before + size, dtype=exact) for name in weights}
    rows = max(16, min(size, _BLOCK_BYTES // (batch * heads * (before + size) * 4)))
    exact_key, exact_prefix = key.to(exact), None if prefix is None else prefix[0].to(exact)
    for start in range(0, size, rows):
        end = min(size, start + rows)
        count, seen = end - start, before + end
        block = grouped[:, :, :, start:end].reshape(batch, kv_heads, group * count, dim).to(exact)
        scores = block.new_empty(batch, kv_heads, group * count, seen)  # 16-bit logits would round sums by percents
        if exact_prefix is not None:
            scores[..., :before] = _with_prefix(block, exact_prefix.transpose(-1, -2))
        scores[..., before:] = block @ exact_key[:, :, :end].transpose(-1, -2)
        scores = scores.view(batch, kv_heads, group, count, seen).mul_(scaling)
        future = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        scores[..., before + start :].masked_fill_(future, float("-inf"))
        p = scores.softmax(-1)
        flat = p.to(value.dtype).view(batch, kv_heads, group * count, seen)
        mixed = flat[..., before:] @ value[:, :, :end]
        if prefix is not None:
            mixed = mixed + _with_prefix(flat[..., :before], prefix[1])
        out[:, :, :, start:end] = mixed.view(batch, kv_heads, group, count, width)
        for name, weight in weights.items():
            part = weight[:, start:end].to(exact)[:, None, None, None]
            near = p
            if bands and name in bands:
                near = p * reference.within(count, seen, bands[name]).to(p.device)
            sums[name][..., :seen] += (part @ near).squeeze(-2)
    shaped = out.reshape(batch, heads, size, width)
    return shaped, {name: s.view(batch, heads, before + size) for name, s in sums.items()}


def _with_prefix(rows: Tensor, shared: Tensor) -> Tensor:
    """rows [B, H_kv, R, X] @ shared [H_kv, X, Y] -> [B, H_kv, R, Y] as one product per head."""
    batch, kv_heads, count, inner = rows.shape
    flat = rows.transpose(0, 1).reshape(kv_heads, batch * count, inner)
    return (flat @ shared).view(kv_heads, batch, count, -1).transpose(0, 1)
