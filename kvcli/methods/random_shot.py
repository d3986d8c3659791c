"""Random Shot: ShotKV's granularity with a random choice, its control arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class RandomShot(Method):
    """Whole shots in random order while they fit, protected tokens as in ShotKV; seeded per sample.

    Source: arXiv:2502.01941v4, table 4. Differs: the paper does not say whether layers draw apart; here they do,
    as ShotKV chooses per layer, and `scope=all-layers` draws once.
    """

    name = "random_shot"
    title = "Random Shot"
    paper = "arXiv:2502.01941"
    tier = 1
    seeded = True
    budget_scope = "layer"
    protects = "system, question and special tokens (may exceed the budget)"

    scope: str = setting(
        "layer", choices=("layer", "all-layers"), help="one draw per layer, or one for all", paper="not said"
    )
    fit: str = setting(
        "skip", choices=("skip", "stop"), help="at a shot that does not fit: skip it, or stop", paper="not said"
    )

    def layers_alike(self) -> int:
        return int(self.scope == "layer")

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.methods._units import keep_units, units

        count = len(units(ctx))
        draws = range(ctx.layers) if self.scope == "layer" else [0] * ctx.layers
        orders = [torch.randperm(count, generator=ctx.generator("random_shot", d)).tolist() for d in draws]
        return keep_units(ctx, budget, orders, self.fit)
