"""Causal attention of a whole prompt, and its column sums, behind one function.

`blockwise` computes output and column sums together, one block of queries at a time (any device);
`sdpa` and `flash` take the output (and logsumexp) from a fused kernel and recompute probabilities block by block only
for the column sums. No n x n tensor is ever held.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcli.attention import reference

_BLOCK_BYTES = 32 << 20

Prefix = tuple[Tensor, Tensor]
"""Keys and values [H_kv, P, D] of tokens that stand before every row of a batch."""


def choose(backend: str, query: Tensor, sums: bool) -> str:
    """The backend behind `auto`: flash-attn where it is installed and fits, else SDPA, blockwise for sums on a CPU."""
    if backend != "auto":
        return backend
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and half and query.shape[-1] <= 256 and find_spec("flash_attn") is not None:
        return "flash"
    return "blockwise" if sums and query.device.type == "cpu" else "sdpa"


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    weights: dict[str, Tensor],
    backend: str = "auto",
    prefix: Prefix | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Causal attention of new tokens over a shared prefix (if any) and themselves, and its column sums.

    query [B, H, S, D]; key, value [B, H_kv, S, D]; prefix: keys and values [H_kv, P, D] that stand before every row;
    weights[name] [B, S]: how much each query counts in the sum of that name. Returns output [B, H, S, D] and
    sums[name] [B, H, P + S], float32 at least.
    """
    backend = choose(backend, query, bool(weights))
    if backend == "reference":
        return reference.prefill(query, *_joined(key, value, prefix), scaling, weights)
    if backend == "blockwise":
        return _blockwise(query, key, value, scaling, weights, prefix, None)
    if backend == "sdpa" and query.device.type == "cuda" and not weights and prefix is None:
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa), {}
    fused = _fused(query, key, value, scaling, backend, prefix)
    if fused is None:  # the kernel keeps its logsumexp to itself, or has no mask for a prefix
        return _blockwise(query, key, value, scaling, weights, prefix, None)
    out, lse = fused
    return out, _blockwise(query, key, value, scaling, weights, prefix, lse)[1] if weights else {}


def _joined(key: Tensor, value: Tensor, prefix: Prefix | None) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H_kv, P + S, D]."""
    if prefix is None:
        return key, value
    before = (x.expand(key.shape[0], -1, -1, -1) for x in prefix)
    return tuple(torch.cat([old, new], 2) for old, new in zip(before, (key, value), strict=True))  # type: ignore[return-value]


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, backend: str, prefix: Prefix | None
) -> tuple[Tensor, Tensor] | None:
    """(output, logsumexp [B, H, S]) of fused kernels; None where they cannot give both."""
    if backend == "flash":
        from flash_attn import flash_attn_func

        q, k, v = (x.transpose(1, 2) for x in (query, *_joined(key, value, prefix)))
        out, lse, _ = flash_attn_func(q, k, v, softmax_scale=scaling, causal=True, return_attn_probs=True)
        return out.transpose(1, 2), lse
    if query.device.type != "cpu" or query.dtype == torch.float16:
        return None
    own = _cpu_flash(query, key, value, scaling, causal=True)
    if prefix is None:
        return own
    batch, heads, size, dim = query.shape
    rows = query.transpose(0, 1).reshape(1, heads, batch * size, dim)  # one product with the prefix serves all rows
    far_out, far_lse = _cpu_flash(rows, prefix[0][None], prefix[1][None], scaling, causal=False)
    far_out = far_out.view(heads, batch, size, dim).transpose(0, 1)
    far_lse = far_lse.view(heads, batch, size).transpose(0, 1)
    lse = torch.logaddexp(own[1], far_lse)
    near, far = ((part - lse).exp().unsqueeze(-1) for part in (own[1], far_lse))
    return (near * own[0] + far * far_out).to(query.dtype), lse


def _cpu_flash(query: Tensor, key: Tensor, value: Tensor, scaling: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    heads = query.shape[1]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(query, _repeat(key, heads), _repeat(value, heads), 0.0, causal, scale=scaling)
    return out, lse


def _blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    weights: dict[str, Tensor],
    prefix: Prefix | None,
    lse: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and column sums, one block of queries against the keys it can see. With lse, sums only."""
    batch, heads, size, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    before = 0 if prefix is None else prefix[0].shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = query.view(batch, kv_heads, group, size, dim)
    out = torch.empty_like(grouped) if lse is None else grouped
    row_lse = None if lse is None else lse.view(batch, kv_heads, group, size)
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
        if row_lse is None:
            p = scores.softmax(-1)
            flat = p.to(value.dtype).view(batch, kv_heads, group * count, seen)
            mixed = flat[..., before:] @ value[:, :, :end]
            if prefix is not None:
                mixed = mixed + _with_prefix(flat[..., :before], prefix[1])
            out[:, :, :, start:end] = mixed.view(batch, kv_heads, group, count, dim)
        else:
            p = scores.sub_(row_lse[:, :, :, start:end, None]).exp_()
        for name, weight in weights.items():
            part = weight[:, start:end].to(exact)[:, None, None, None]
            sums[name][..., :seen] += (part @ p).squeeze(-2)
    shaped = out.reshape(batch, heads, size, dim)
    return shaped, {name: s.view(batch, heads, before + size) for name, s in sums.items()}


def _with_prefix(rows: Tensor, shared: Tensor) -> Tensor:
    """rows [B, H_kv, R, X] @ shared [H_kv, X, Y] -> [B, H_kv, R, Y] as one product per head."""
    batch, kv_heads, count, inner = rows.shape
    flat = rows.transpose(0, 1).reshape(kv_heads, batch * count, inner)
    return (flat @ shared).view(kv_heads, batch, count, -1).transpose(0, 1)
