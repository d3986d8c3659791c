"""What methods share that give every key a score per KV head and keep the best ones."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcli.methods.base import Method, Selection

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class RankedMethod(Method):
    """Keeps the first `sinks` and the newest tokens and, per layer and KV head, the best keys between them.

    Methods of this kind can be the base of a wrapper, which shares the budget out otherwise or ranks again.
    """

    signed: ClassVar[bool] = False
    """Whether scores can be below zero: then they cannot be weighed by a product."""

    def protected(self, budget: Budget) -> tuple[int, int, frozenset[str]]:
        """(newest tokens, sinks, flags) that are not in the contest; at least the newest one."""
        return budget.protect(1)

    @abstractmethod
    def scores(self, ctx: Context, layer: int, newest: int, sinks: int) -> Tensor:
        """[H_kv, n - newest - sinks] float32 at least: the keys between the protected ones; the largest stay, of equal
        ones the first."""

    def sizes(self, budget: Budget, newest: int, sinks: int) -> list[int]:
        """Keys a KV head keeps beyond the protected ones, per layer."""
        return [max(0, budget.per_head - newest - sinks)] * budget.layers

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.cache.select import join, top_positions

        newest, sinks, flags = self.protected(budget)
        always = torch.cat([torch.arange(sinks), torch.arange(ctx.n - newest, ctx.n)])
        kept = []
        for layer, size in enumerate(self.sizes(budget, newest, sinks)):
            best = top_positions(self.scores(ctx, layer, newest, sinks), size) + sinks
            kept.append(join(best, always))
        return Selection(kept, flags)
