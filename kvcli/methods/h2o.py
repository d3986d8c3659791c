"""H2O: heavy hitters by accumulated attention, and the recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods._ranked import RankedMethod
from kvcli.methods.base import setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating


@dataclass(frozen=True)
class H2O(RankedMethod):
    """Half of each head's budget recent tokens, half the others with the largest column sums.

    The score is the causal attention a key received, summed over all prompt queries. While generating, the sums go on
    accumulating over what is still there (an evicted token's sum is gone), and of the pairs outside the recent half of
    the cap the one with the smallest sum leaves. Source: arXiv:2306.14048, section 4 and algorithm 1. Differs: column
    sums of query heads that share a KV head are reduced to one score; the prompt is read densely before anything
    leaves, so what is kept has already mixed in what is dropped (optimistic).
    """

    name = "h2o"
    title = "H2O"
    paper = "arXiv:2306.14048"
    tier = 1
    phases = ("prefill", "decode")
    protects = "the recent half of the budget"
    decoding = "unified"

    reduce: str = setting("mean", choices=("mean", "max"), help="how query heads of a KV head share one score")

    def needs(self) -> frozenset[str]:
        return frozenset({"column_sum"})

    def protected(self, budget: Budget) -> tuple[int, int, frozenset[str]]:
        return max(1, budget.per_head // 2), 0, frozenset()

    def scores(self, ctx: Context, layer: int, newest: int, sinks: int) -> Tensor:
        return ctx.per_kv_head(ctx.column_sum(layer)[:, : ctx.n - newest], self.reduce)

    def decode_start(self, ctx: Context, layer: int) -> dict[str, Tensor]:
        """received [H, n]: per query head, so that `reduce` acts on whole sums."""
        return {"received": ctx.column_sum(layer)}

    def decode_update(self, view: Generating) -> None:
        assert view.attention is not None
        view.state["received"] += view.attention * view.counts

    def decode_rank(self, view: Generating) -> Tensor:
        # the recent half grows more slowly than the text, so none of its pairs can have left
        recent = view.position > view.newest - (view.cap // 2).clamp_min(1)
        return view.per_kv_head(view.state["received"], self.reduce).masked_fill(recent, float("inf"))
