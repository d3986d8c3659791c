"""AdaKV: heads whose attention is spread keep more than heads whose attention is concentrated."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from kvcli.errors import KvcliError
from kvcli.methods._ordered import Ranked, ranked_once
from kvcli.methods.base import Selection, Wrapper, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class AdaKV(Wrapper):
    """The KV heads of a layer share one budget: a head gets as many pairs as it has among the layer's best scores.

    With B pairs per head outside the base's protected tokens, c_h of the layer's B * H_kv largest scores are head h's.
    Its budget is 0.8 c_h + 0.2 B, and it keeps its own best so many. `rule=safeguard`: the best fifth of B of each head
    is safe, and the rest goes to the largest scores of all heads together. Source: arXiv:2407.11550, section 3, and its
    code (floor 0.2 as it advises for GQA, no weights on scores as in its published runs); rule=safeguard after kvpress.
    Differs: budgets are rounded by largest remainder, so that a layer's total is exact (the code rounds each head for
    itself); equal scores go to the first position, then the first head; scores are the base's own (mean over a group's
    query heads); kvpress counts the window as part of the safe fifth, here the fifth lies outside of it.
    """

    name = "adakv"
    title = "AdaKV"
    paper = "arXiv:2407.11550"
    tier = 2
    budget_scope = "layer"
    protects = "what its base protects"

    base: str = setting("snapkv", help="whose scores: a method that ranks keys per head", paper="snapkv, pyramidkv")
    floor: float = setting(
        0.2, ge=0.0, le=1.0, help="share of the even budget that every head gets", paper="0.2 for GQA"
    )
    rule: str = setting(
        "floor",
        choices=("floor", "safeguard"),
        help="mix budgets with the even one, or keep a safe part",
        paper="floor",
    )
    normalize: bool = setting(
        False,
        help="weigh a head's scores by the share that its best B hold (rule=floor)",
        paper="an option of its code",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self.inner, "iterative", False):
            what = f"{self.base} evicts in steps with these settings and has no one score per key"
            raise KvcliError(what, given=f"--method adakv:base={self.base}", fix=f"adakv:base={self.base}")
        if self.normalize and self.rule == "safeguard":
            what = "normalize weighs the scores of rule=floor and has no effect with rule=safeguard"
            raise KvcliError(what, given="--method adakv:normalize=true,rule=safeguard", fix="adakv:normalize=true")
        if self.normalize and self.inner.signed:
            what = f"scores of {self.base} can be below zero, and normalize weighs them by a product"
            raise KvcliError(what, given=f"--method adakv:base={self.base},normalize=true", fix="normalize=false")
        # pairs that a base shares out over layers too are held to the model's total
        scope = "model" if getattr(self.inner, "budget_scope", "") == "model" else "layer"
        object.__setattr__(self, "budget_scope", scope)

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        newest, sinks, flags = self.inner.protected(budget)
        always = torch.cat([torch.arange(sinks), torch.arange(ctx.n - newest, ctx.n)])
        kept: list[Tensor | list[Tensor]] = []
        for layer, size in enumerate(self.inner.sizes(budget, newest, sinks)):
            scores = self.inner.scores(ctx, layer, newest, sinks)
            ranked = ranked_once(ctx, self.inner, (layer, newest, sinks), scores)
            counts = self._counts(ranked, scores, size)
            best = [order[:count].long() + sinks for order, count in zip(ranked.by_head, counts, strict=True)]
            kept.append([torch.cat([head, always]).sort().values for head in best])
        return Selection(kept, flags)

    def _counts(self, ranked: Ranked, scores: Tensor, size: int) -> list[int]:
        """Pairs each KV head keeps beyond the protected ones; the sum is H_kv * size."""
        from kvcli.cache.budget import share_out

        heads, most = scores.shape
        if self.rule == "safeguard":
            return ranked.safeguarded(size, self.floor)
        if self.normalize:
            ranked = Ranked.of(weighed(scores, size))
        floor = Fraction(str(self.floor))  # exact, so that remainders tie where they should
        ideal: list[Any] = [(1 - floor) * count + floor * size for count in ranked.heads_of_best(heads * size)]
        return share_out(ideal, heads * size, [most] * heads)


def weighed(scores: Tensor, size: int) -> Tensor:
    """Each head's scores times the share of their sum that its best `size` hold. Raises KvcliError below zero."""
    if bool((scores < 0).any()):
        what = "normalize weighs heads by shares of their scores, and some scores of this base are below zero"
        raise KvcliError(what, given="--method adakv:normalize=true", fix="normalize=false, or base=snapkv")
    best = scores.sort(-1, descending=True).values[:, :size]
    share = best.sum(-1, keepdim=True) / scores.sum(-1, keepdim=True)
    return scores * share.nan_to_num(1.0)
