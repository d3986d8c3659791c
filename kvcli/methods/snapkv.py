"""SnapKV: the keys that the prompt's last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class SnapKV(Method):
    """Top keys per KV head by the pooled attention of an observation window; the window is kept.

    Source: arXiv:2404.14469, section 4; defaults as in the paper's LongBench runs. Differs: one set per KV head (mean
    over its query heads), the official code keeps one per query head.
    """

    name = "snapkv"
    title = "SnapKV"
    paper = "arXiv:2404.14469"
    tier = 1
    protects = "the observation window, at most half of the budget"

    window: int = setting(32, ge=1, help="last queries that vote, always kept")
    kernel: int = setting(7, ge=1, odd=True, help="pooling width")
    pool: str = setting("max", choices=("max", "avg"), help="pooling over neighbours")
    reduce: str = setting("mean", choices=("mean", "max"), help="how query heads of a KV head share one score")

    def needs(self) -> frozenset[str]:
        return frozenset({f"window:{self.window}"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.cache.select import join, top_positions
        from kvcli.methods._window import snap_scores

        window, _, flags = budget.protect(self.window)
        newest = torch.arange(ctx.n - window, ctx.n)
        kept = []
        for layer in range(ctx.layers):
            scores = snap_scores(ctx, layer, window, self.kernel, self.pool, self.reduce)
            kept.append(join(top_positions(scores, max(0, budget.per_head - window)), newest))
        return Selection(kept, flags)
