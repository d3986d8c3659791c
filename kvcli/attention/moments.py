"""Mean and covariance of queries before their rotation, gathered block by block; parts of a prompt merge exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_BYTES = 32 << 20

Unrotate = Callable[[Tensor, Tensor], Tensor]
"""(queries [..., Q, D], their positions [Q]) -> the queries as they were before RoPE."""


@dataclass(frozen=True)
class Moments:
    """Of `count` [...] queries per head: mean [..., H, D] and scatter [..., H, D, D], the sum of the outer products of
    their distances from the mean. Centred, because a family whose queries have a bias would lose its covariance in the
    difference of two large numbers."""

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, queries: Tensor, chosen: Tensor) -> Moments:
        """queries [B, H, Q, D]; chosen [B, Q]: 1 for those that count, 0 for the others."""
        count = chosen.sum(1)
        share = chosen[:, None, :, None]
        mean = (queries * share).sum(2) / count.clamp_min(1)[:, None, None]
        apart = (queries - mean[:, :, None]) * share
        return cls(count, mean, apart.transpose(-1, -2) @ apart)

    def merged(self, other: Moments) -> Moments:
        """Of both sets together."""
        count = self.count + other.count
        share = other.count / count.clamp_min(1)
        apart = other.mean - self.mean
        between = apart[..., :, None] * apart[..., None, :] * (self.count * share)[..., None, None, None]
        return Moments(count, self.mean + apart * share[..., None, None], self.scatter + other.scatter + between)

    def row(self, row: int) -> Moments:
        """One prompt of a batch."""
        return Moments(self.count[row], self.mean[row], self.scatter[row])

    def covariance(self) -> Tensor:
        """[..., H, D, D], divided by the count; zero for none."""
        return self.scatter / self.count.clamp_min(1)[..., None, None, None]


def query_moments(query: Tensor, before: int, chosen: Tensor, unrotate: Unrotate) -> Moments:
    """Of B rows of new tokens that stand behind `before` others: query [B, H, Q, D] rotated, chosen [B, Q].

    Float32 at least.
    """
    batch, heads, size, dim = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    rows = max(16, _BLOCK_BYTES // (batch * heads * dim * 4))
    parts = []
    for start in range(0, size, rows):
        block = query[:, :, start : start + rows].to(exact)
        positions = torch.arange(before + start, before + start + block.shape[2], device=query.device)
        parts.append(Moments.of(unrotate(block, positions), chosen[:, start : start + rows].to(exact)))
    total = parts[0]
    for part in parts[1:]:
        total = total.merged(part)
    return total
