"""Scores from the attention of the prompt's last queries, shared by SnapKV, PyramidKV and ChunkKV."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

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
