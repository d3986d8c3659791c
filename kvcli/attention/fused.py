"""Output and logsumexp of one fused attention kernel: flash-attn's, or the one of PyTorch's that SDPA would take.

No kernel here holds an n x n tensor. GQA is native wherever the kernel has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

ALIGNED = 8
"""PyTorch's CUDA kernels read head dims that are multiples of this; zeros added to a head change no product."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, *, causal: bool, package: bool, exact: bool
) -> tuple[Tensor, Tensor] | None:
    """(output [B, H, Q, Dv], logsumexp [B, H, Q], float32 at least) of query over key, value [B, H_kv, S, D].

    causal: query i sees keys 0..i, for Q = S. package: flash-attn instead of PyTorch's kernels. exact: the
    logsumexp will be used, so it has to be that of float32 scores. None where no fused kernel fits: on CUDA for
    float64 and where SDPA itself would take its unfused kernel, on a CPU for values narrower or wider than keys.
    """
    if package:
        return _flash_package(query, key, value, scaling, causal)
    if query.device.type == "cuda":
        return _cuda(query, key, value, scaling, causal)
    if query.device.type == "cpu" and key.shape[-1] == value.shape[-1]:
        return _cpu(query, key, value, scaling, causal, exact)
    return None


def merged(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from (output, logsumexp) over each."""
    (near_out, near_lse), (far_out, far_lse) = near, far
    share = torch.sigmoid(far_lse - near_lse).unsqueeze(-1)
    out = torch.lerp(near_out.to(share.dtype), far_out.to(share.dtype), share)
    return out.to(near_out.dtype), torch.logaddexp(near_lse, far_lse)


def _flash_package(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool
) -> tuple[Tensor, Tensor] | None:
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=scaling, causal=causal, return_attn_probs=True)
    return out.transpose(1, 2), _rows(lse, query)


def _cpu(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool, exact: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's flash kernel for CPUs. Its logsumexp is of scores in the dtype of the query, hence `exact`."""
    dtype = torch.promote_types(query.dtype, torch.float32) if exact else query.dtype
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(query.to(dtype), key.to(dtype), value.to(dtype), 0.0, causal, scale=scaling)
    return out.to(query.dtype), lse


def _cuda(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor] | None:
    """The kernel that `scaled_dot_product_attention` picks for these inputs on this GPU, called for its logsumexp too.

    cuDNN's and flash have GQA. The memory-efficient kernel, which float32 takes, has not: keys and values are repeated
    per query head for it, O(n) memory.
    """
    if query.dtype == torch.float64:
        return None
    width = value.shape[-1]
    q, k, v = (_aligned(x) for x in (query, key, value))
    kernel = _choice(q, k, v, scaling, causal)
    if kernel == SDPBackend.MATH and q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        kernel = _choice(q, k, v, scaling, causal)
    if kernel == SDPBackend.CUDNN_ATTENTION:
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse = cudnn(q, k, v, None, True, 0.0, causal, scale=scaling)[:2]
    elif kernel == SDPBackend.FLASH_ATTENTION:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scaling)[:2]
    elif kernel == SDPBackend.EFFICIENT_ATTENTION:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse = efficient(q, k, v, None, True, 0.0, causal, scale=scaling)[:2]
    else:
        return None
    return out[..., :width], _rows(lse, query)


def _choice(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> SDPBackend:
    gqa = query.shape[1] != key.shape[1]
    return SDPBackend(torch._fused_sdp_choice(query, key, value, None, 0.0, causal, scale=scaling, enable_gqa=gqa))


def _aligned(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % ALIGNED)) if x.shape[-1] % ALIGNED else x


def _rows(lse: Tensor, query: Tensor) -> Tensor:
    """[B, H, Q] of a kernel's logsumexp; cuDNN's has a last axis of 1, the memory-efficient kernel's rows to spare."""
    batch, heads, rows = query.shape[:3]
    if lse.dim() == 4 and lse.shape[-1] == 1:
        lse = lse.squeeze(-1)
    if lse.dim() != 3 or lse.shape[:2] != (batch, heads) or lse.shape[2] < rows:
        raise RuntimeError(f"this kernel's logsumexp has shape {tuple(lse.shape)} for queries {tuple(query.shape)}")
    return lse[:, :, :rows]
