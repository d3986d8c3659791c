"""H2O: heavy hitters by accumulated attention, and the recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class H2O(Method):
    """Half of each head's budget recent tokens, half the others with the largest column sums.

    The score is the causal attention a key received, summed over all prompt queries. Source: arXiv:2306.14048,
    section 4 and algorithm 1. Differs: column sums of query heads that share a KV head are reduced to one score.
    """

    name = "h2o"
    title = "H2O"
    paper = "arXiv:2306.14048"
    tier = 1
    protects = "the recent half of the budget"

    reduce: str = setting("mean", choices=("mean", "max"), help="how query heads of a KV head share one score")

    def needs(self) -> frozenset[str]:
        return frozenset({"column_sum"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.cache.select import join, top_positions

        recent = max(1, budget.per_head // 2)
        heavy = budget.per_head - recent
        newest = torch.arange(ctx.n - recent, ctx.n)
        kept = []
        for layer in range(ctx.layers):
            scores = ctx.per_kv_head(ctx.column_sum(layer)[:, : ctx.n - recent], self.reduce)
            kept.append(join(top_positions(scores, heavy), newest))
        return Selection(kept)
