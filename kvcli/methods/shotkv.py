"""ShotKV: whole few-shot examples are kept or dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class ShotKV(Method):
    """Shots ranked by the attention their tokens received, averaged over the shot; the best that fit are kept whole.

    The score is the column sum over all prompt queries, summed over query heads, per layer. System, question and
    special tokens are always kept and count. Passages compete in sentences or blocks of 16 tokens. Source:
    arXiv:2502.01941v4, section 5 and algorithm 1; `scope=all-layers` is the v1 reading (one choice from scores averaged
    over layers); `fit=stop` ends at the first shot that does not fit.
    """

    name = "shotkv"
    title = "ShotKV"
    paper = "arXiv:2502.01941"
    tier = 1
    budget_scope = "layer"
    protects = "system, question and special tokens (may exceed the budget)"

    scope: str = setting("layer", choices=("layer", "all-layers"), help="one choice per layer, or one for all")
    queries: str = setting("all", choices=("all", "question"), help="whose attention counts")
    fit: str = setting("skip", choices=("skip", "stop"), help="at a shot that does not fit: skip it, or stop")

    def needs(self) -> frozenset[str]:
        return frozenset({"column_sum" if self.queries == "all" else "column_sum:question"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.methods._units import keep_units

        scores = [self._unit_scores(ctx, layer) for layer in range(ctx.layers)]
        if self.scope == "all-layers":
            scores = [torch.stack(scores).mean(0)] * ctx.layers
        orders = [torch.sort(s, descending=True, stable=True).indices.tolist() for s in scores]
        return keep_units(ctx, budget, orders, self.fit)

    def _unit_scores(self, ctx: Context, layer: int) -> Tensor:
        """[units]: mean over a unit's tokens of the attention received, summed over heads (eq. 3)."""
        from kvcli.methods._units import unit_index

        key = ("shotkv", layer, self.queries)
        return ctx.once(key, lambda: unit_index(ctx).means(ctx.column_sum(layer, self.queries).sum(0)))
