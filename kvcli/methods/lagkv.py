"""LagKV: the pairs that stand out when measured against the partition behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods._ranked import RankedMethod
from kvcli.methods.base import Domain, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class LagKV(RankedMethod):
    """Behind the sinks, each partition of `lag` tokens keeps the same number, chosen by comparison with the next one.

    Keys and values are scaled, channel by channel, with the smallest and largest of the next partition; the standard
    deviation over channels goes through a softmax over the partition, and the two softmaxes are added. The last whole
    partition has no next one and stays, with the tokens behind it. So there is a floor (0.29 at 900 tokens; a prompt
    below sinks + 2 lag tokens cannot be compressed): a smaller budget gets the floor, flagged `unreachable` and
    `over_budget`. Source: arXiv:2504.04704, section 3, and its code. Differs: lag 128, which its README uses (with the
    code's default of 1024 nothing happens below 2,064 tokens); all partitions are cut at once behind the prompt, none
    while generating; where the budget does not divide, the first partitions keep one more; a channel that is constant
    in the next partition counts 0 (the code divides by zero).
    """

    name = "lagkv"
    title = "LagKV"
    paper = "arXiv:2504.04704"
    tier = 2
    signed = True
    domain = Domain(floor="(sinks + the last whole partition and what follows it) / n")
    protects = "the first tokens, the last whole partition and what follows it; all of them, whatever the budget"

    sinks: int = setting(16, ge=0, help="first tokens, always kept", paper="16")
    lag: int = setting(
        128, ge=1, help="tokens per partition", paper="128; also 1024, which compresses nothing below 2,064 tokens"
    )

    def protected(self, budget: Budget) -> tuple[int, int, frozenset[str]]:
        sinks = min(self.sinks, budget.n - 1)
        compressible = max(0, (budget.n - sinks) // self.lag - 1) * self.lag
        newest = budget.n - sinks - compressible
        below = sinks + newest > budget.per_head
        return newest, sinks, frozenset({"unreachable", "over_budget"}) if below else frozenset()

    def select(self, ctx: Context, budget: Budget) -> Selection:
        selection = super().select(ctx, budget)
        if "unreachable" in selection.flags:
            newest, sinks, _ = self.protected(budget)
            selection.notes["nearest_ratio"] = math.ceil(1e4 * (newest + sinks) / ctx.n) / 1e4
        return selection

    def scores(self, ctx: Context, layer: int, newest: int, sinks: int) -> Tensor:
        return ctx.once(("lag ranks", layer, self.lag, newest, sinks), lambda: self._ranks(ctx, layer, newest, sinks))

    def _ranks(self, ctx: Context, layer: int, newest: int, sinks: int) -> Tensor:
        """[H_kv, m]: minus each pair's rank in its own partition, so that all partitions keep the same number."""
        import torch

        partitions = (ctx.n - newest - sinks) // self.lag
        if not partitions:
            return ctx.keys[layer].new_empty(ctx.kv_heads, 0, dtype=torch.float32)
        reach = slice(sinks, sinks + (partitions + 1) * self.lag)
        keys, values = ctx.keys[layer][:, reach], ctx.values[layer][:, reach]
        standing = _standing_out(keys, self.lag) + _standing_out(values, self.lag)
        order = torch.sort(standing, dim=-1, descending=True, stable=True).indices
        ranks = torch.empty_like(order).scatter_(
            -1, order, torch.arange(self.lag, device=order.device).expand_as(order)
        )
        return -ranks.flatten(1).float()


def _standing_out(states: Tensor, lag: int) -> Tensor:
    """[H_kv, p, lag] float32 at least, from [H_kv, (p + 1) * lag, D]: softmax over each of the first p partitions."""
    import torch

    wide = states.to(torch.promote_types(states.dtype, torch.float32)).unflatten(1, (-1, lag))
    low, high = wide[:, 1:].amin(-2, keepdim=True), wide[:, 1:].amax(-2, keepdim=True)
    spread = high - low
    scaled = torch.where(spread > 0, (wide[:, :-1] - low) / spread, 0.0)
    return scaled.std(-1).softmax(-1)
