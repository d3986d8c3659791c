"""Uniformly random tokens: the control arm of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class Random(Method):
    """Random positions per layer and KV head, drawn without replacement, seeded per sample.

    Only the newest token is protected; `window=` and `sinks=` make it the fair control for windowed methods. Use at
    least 5 seeds where it is an arm of a comparison.
    """

    name = "random"
    title = "Random tokens"
    tier = 1
    seeded = True
    protects = "window newest tokens and sinks first tokens, at most half of the budget"

    window: int = setting(1, ge=1, help="newest tokens always kept")
    sinks: int = setting(0, ge=0, help="first tokens always kept")

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.cache.select import join, whole

        window, sinks, flags = budget.protect(self.window, self.sinks)
        free = ctx.n - window - sinks
        draw = max(0, min(free, budget.per_head - window - sinks))
        fixed = torch.cat([whole(sinks), torch.arange(ctx.n - window, ctx.n)])
        kept = []
        for layer in range(ctx.layers):
            generator = ctx.generator("random", layer)
            order = torch.stack([torch.randperm(free, generator=generator) for _ in range(ctx.kv_heads)])
            kept.append(join(fixed, order[:, :draw] + sinks))
        return Selection(kept, flags)
