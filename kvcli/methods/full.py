"""The baseline: everything is kept, on the same code path as every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Domain, Method, Selection

if TYPE_CHECKING:
    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class Full(Method):
    """Every pair stays. Its rows decode as those of every other method do: only what is evicted makes a difference."""

    name = "full"
    title = "Full cache"
    tier = 0
    domain = Domain("points", points=(1.0,))
    protects = "everything"

    def select(self, ctx: Context, budget: Budget) -> Selection:
        from kvcli.cache.select import whole

        return Selection([whole(ctx.n) for _ in range(ctx.layers)])
