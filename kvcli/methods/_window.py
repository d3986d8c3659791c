"""What methods share that rank keys by the attention of the prompt's last queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods._ranked import RankedMethod
from kvcli.methods.base import setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


def received(ctx: Context, layer: int, window: int) -> Tensor:
    """[H, n - w] float32: attention each key before the window received, summed over the window's queries."""
    attention = ctx.window_attention(layer, window)
    return attention[..., : ctx.n - attention.shape[1]].sum(1)


def snap_scores(ctx: Context, layer: int, window: int, kernel: int, pooling: str, reduce: str) -> Tensor:
    """[H_kv, n - w]: SnapKV's importance: summed, pooled per query head, then reduced over the GQA group.

    The window itself is not in the contest, so no score can push it out. Source: SnapKV, arXiv:2404.14469.
    Differs: the official code keeps one set per query head; here a KV head is stored once.
    """
    from kvcli.cache.select import pool

    key = ("snap_scores", layer, window, kernel, pooling, reduce)
    return ctx.once(key, lambda: ctx.per_kv_head(pool(received(ctx, layer, window), kernel, pooling), reduce))


@dataclass(frozen=True)
class WindowMethod(RankedMethod):
    """Keeps the window and, per layer and KV head, the keys before it that it attends to most."""

    window: int = setting(32, ge=1, help="last queries that vote, always kept", paper="32; SnapKV's code also 64")
    kernel: int = setting(7, ge=1, odd=True, help="pooling width", paper="7; SnapKV's code also 5")
    pool: str = setting(
        "max", choices=("max", "avg"), help="pooling over neighbours", paper="max; SnapKV's code also avg"
    )
    reduce: str = setting(
        "mean",
        choices=("mean", "max"),
        help="how query heads of a KV head share one score",
        paper="one set per query head",
    )

    def needs(self) -> frozenset[str]:
        return frozenset({f"window:{self.window}"})

    def protected(self, budget: Budget) -> tuple[int, int, frozenset[str]]:
        return budget.protect(self.window)

    def scores(self, ctx: Context, layer: int, newest: int, sinks: int) -> Tensor:
        return snap_scores(ctx, layer, newest, self.kernel, self.pool, self.reduce)
