"""Causal attention of a whole prompt, and of new tokens over compressed caches, behind two functions.

prefill(): `blockwise` computes output and column sums together, one block of queries at a time (any device);
`sdpa` and `flash` take the output (and logsumexp) from a fused kernel and recompute probabilities block by block only
for the column sums. No n x n tensor is ever held.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcli.attention import reference

BACKENDS = ("auto", "flash", "sdpa", "blockwise", "reference")
_BLOCK_BYTES = 32 << 20


def choose(backend: str, device: torch.device, sums: bool) -> str:
    """The backend behind `auto`: flash-attn where it is installed, else SDPA, blockwise for sums on a CPU."""
    if backend != "auto":
        return backend
    if device.type == "cuda" and find_spec("flash_attn") is not None:
        return "flash"
    return "blockwise" if sums and device.type == "cpu" else "sdpa"


def prefill(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, weights: dict[str, Tensor], backend: str = "auto"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Causal attention of Q = S queries and its column sums.

    query [B, H, S, D]; key, value [B, H_kv, S, D]; weights[name] [B, S]: how much each query counts in the sum of that
    name. Returns output [B, H, S, D] and sums[name] [B, H, S], float32 at least.
    """
    backend = choose(backend, query.device, bool(weights))
    if backend == "reference":
        return reference.prefill(query, key, value, scaling, weights)
    if backend == "blockwise":
        return _blockwise(query, key, value, scaling, weights, None)
    if not weights:
        return _fused(query, key, value, scaling, backend)[0], {}
    out, lse = _fused(query, key, value, scaling, backend)
    if lse is None:  # the kernel keeps its logsumexp to itself
        return _blockwise(query, key, value, scaling, weights, None)
    return out, _blockwise(query, key, value, scaling, weights, lse)[1]


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _fused(query: Tensor, key: Tensor, value: Tensor, scaling: float, backend: str) -> tuple[Tensor, Tensor | None]:
    """(output, logsumexp [B, H, S] or None) of a fused causal kernel."""
    heads = query.shape[1]
    if backend == "flash":
        from flash_attn import flash_attn_func

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse, _ = flash_attn_func(q, k, v, softmax_scale=scaling, causal=True, return_attn_probs=True)
        return out.transpose(1, 2), lse
    if query.device.type == "cpu" and query.dtype != torch.float16:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, _repeat(key, heads), _repeat(value, heads), 0.0, True, scale=scaling)
    gqa = heads != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa), None


def _blockwise(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, weights: dict[str, Tensor], lse: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and column sums, one block of queries against the keys it can see. With lse, sums only."""
    batch, heads, size, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = query.view(batch, kv_heads, group, size, dim)
    out = torch.empty_like(grouped) if lse is None else query
    row_lse = None if lse is None else lse.view(batch, kv_heads, group, size)
    sums = {name: query.new_zeros(batch, kv_heads, group, size, dtype=exact) for name in weights}
    rows = max(16, min(size, _BLOCK_BYTES // (batch * heads * size * 4)))
    for start in range(0, size, rows):
        end = min(size, start + rows)
        count = end - start
        block = grouped[:, :, :, start:end].reshape(batch, kv_heads, group * count, dim)
        scores = (block @ key[:, :, :end].transpose(-1, -2)).view(batch, kv_heads, group, count, end)
        scores = scores.to(exact).mul_(scaling)
        future = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        scores[..., start:end].masked_fill_(future, float("-inf"))
        if row_lse is None:
            p = scores.softmax(-1)
            flat = p.to(value.dtype).view(batch, kv_heads, group * count, end)
            out[:, :, :, start:end] = (flat @ value[:, :, :end]).view(batch, kv_heads, group, count, dim)
        else:
            p = scores.sub_(row_lse[:, :, :, start:end, None]).exp_()
        for name, weight in weights.items():
            part = weight[:, start:end].to(exact)[:, None, None, None]
            sums[name][..., :end] += (part @ p).squeeze(-2)
    shaped = out.view(batch, heads, size, dim)
    return shaped, {name: s.view(batch, heads, size) for name, s in sums.items()}


def decode(query: Tensor, key: Tensor, value: Tensor, scaling: float, valid: Tensor | None) -> Tensor:
    """Attention of Q new tokens over a compressed cache and themselves.

    query [R, H, Q, D]; key, value [R, H_kv, S, D], the new tokens' own the last Q; valid [R, 1 or H_kv, S - new] marks
    the slots of the compressed part that hold a kept pair (None: all do); slots after it are always valid.
    Returns [R, H, Q, D].
    """
    rows, heads, new, dim = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    group = heads // kv_heads
    mask = None
    if valid is not None:
        mask = F.pad(valid, (0, size - valid.shape[-1]), value=True)[:, :, None, :]
    if new > 1:
        causal = torch.ones(new, size, dtype=torch.bool, device=query.device).tril(size - new)
        mask = causal if mask is None else mask & causal
        mask = mask.repeat(*([1] * (mask.dim() - 2)), group, 1)
    packed = query.reshape(rows, kv_heads, group * new, dim)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, new, dim)
