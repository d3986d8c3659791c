"""Pure tensor functions behind the selections: top-k with ties by position, and sets of positions."""

from __future__ import annotations

import torch
from torch import Tensor


def top_positions(scores: Tensor, k: int) -> Tensor:
    """Sorted positions [..., k] (on the CPU) of the k largest scores [..., n]; of equal scores the first stays.

    Raises ValueError for NaN, which has no place in an order.
    """
    if bool(scores.isnan().any()):
        raise ValueError("scores contain NaN")
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(-1).values.cpu()


def join(*parts: Tensor) -> Tensor:
    """Sorted union of disjoint position tensors; [K] parts are repeated for [H_kv, K] ones."""
    heads = max((p.shape[0] for p in parts if p.dim() == 2), default=0)
    if heads:
        parts = tuple(p if p.dim() == 2 else p.expand(heads, -1) for p in parts)
    return torch.cat(parts, -1).sort(-1).values


def whole(n: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.arange(n, device=device)


def pool(scores: Tensor, kernel: int, kind: str) -> Tensor:
    """[..., n] -> [..., n]: max or mean over `kernel` neighbours (odd), stride 1; for the mean, padding counts
    as zeros, as in SnapKV's own code."""
    if not scores.shape[-1]:
        return scores
    flat = scores.reshape(1, -1, scores.shape[-1])
    if kind == "max":
        pooled = torch.nn.functional.max_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    else:
        pooled = torch.nn.functional.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    return pooled.reshape(scores.shape)
