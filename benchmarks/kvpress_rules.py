"""kvpress 0.5.5's selections as kvcli plugin methods, in kvpress's own conventions, for a like-for-like timing.

The removed share is 1 - kept ratio, int() cuts off the fraction, windows are never cut for small budgets. Used as
`benchmarks/kvpress_rules.py:Snap` and so on; not how kvcli's own methods of these names work (kvcli/methods).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection

if TYPE_CHECKING:
    import torch

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context

WINDOW, KERNEL, SINKS, CHUNK, BETA = 64, 5, 4, 20, 20


def kept_count(n: int, budget: Budget) -> int:
    """int(n * (1 - compression_ratio)) in floating point, as kvpress computes it."""
    return max(1, int(n * (1 - removed(budget))))


def removed(budget: Budget) -> float:
    return 1 - float(budget.ratio) if budget.ratio is not None else 1 - budget.per_head / budget.n


def largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """[H_kv, k] sorted positions of the largest scores [H_kv, n]."""
    return scores.topk(k, -1).indices.sort(-1).values


def snap_scores(ctx: Context, layer: int) -> torch.Tensor:
    """[H_kv, n]: mean over the window, average pooling, mean over the group; the window itself scores highest."""

    def make() -> torch.Tensor:
        from torch.nn import functional as F

        attention = ctx.window_attention(layer, WINDOW)[..., : ctx.n - WINDOW].mean(1)
        pooled = F.avg_pool1d(attention[None], KERNEL, stride=1, padding=KERNEL // 2)[0]
        scores = ctx.per_kv_head(pooled)
        return F.pad(scores, (0, WINDOW), value=scores.max().item() + 1)

    return ctx.once(("kvpress", layer), make)


@dataclass(frozen=True)
class Snap(Method):
    """SnapKVPress."""

    keeps_last = False

    def needs(self) -> frozenset[str]:
        return frozenset({f"window:{WINDOW}"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        k = kept_count(ctx.n, budget)
        return Selection([largest(snap_scores(ctx, layer), k) for layer in range(ctx.layers)])


@dataclass(frozen=True)
class Observed(Method):
    """ObservedAttentionPress: column means over the queries that can see a key."""

    keeps_last = False

    def needs(self) -> frozenset[str]:
        return frozenset({"column_sum"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        k = kept_count(ctx.n, budget)
        kept = []
        for layer in range(ctx.layers):
            scores = ctx.per_kv_head(ctx.column_sum(layer))
            scores = scores / torch.arange(ctx.n, 0, -1, device=scores.device)  # the queries that could see the key
            kept.append(largest(scores, k))
        return Selection(kept)


@dataclass(frozen=True)
class Streaming(Method):
    """StreamingLLMPress."""

    keeps_last = False

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        gone = ctx.n - kept_count(ctx.n, budget)
        kept = torch.cat([torch.arange(SINKS), torch.arange(SINKS + gone, ctx.n)])
        return Selection([kept] * ctx.layers)


@dataclass(frozen=True)
class Knorm(Method):
    """KnormPress: the smallest key norms."""

    keeps_last = False

    def select(self, ctx: Context, budget: Budget) -> Selection:
        k = kept_count(ctx.n, budget)
        return Selection([largest(-keys.norm(dim=-1), k) for keys in ctx.keys])


@dataclass(frozen=True)
class Pyramid(Method):
    """PyramidKVPress: SnapKV's budget wherever the pyramid does not fit."""

    keeps_last = False
    budget_scope = "model"

    def needs(self) -> frozenset[str]:
        return frozenset({f"window:{WINDOW}"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        kept = [largest(snap_scores(ctx, i), self.size(ctx.n, i, ctx.layers, budget)) for i in range(ctx.layers)]
        over = sum(k.shape[1] for k in kept) > budget.per_head * ctx.layers
        return Selection(kept, frozenset({"over_budget"}) if over else frozenset())

    @staticmethod
    def size(n: int, layer: int, layers: int, budget: Budget) -> int:
        share = 1 - removed(budget)
        capacity = WINDOW + n * share
        low = (capacity - WINDOW) / BETA
        high = (capacity - WINDOW) * 2 - low
        if high >= n - WINDOW:
            high = n - WINDOW
            low = (capacity - WINDOW) * 2 - high
        if not n >= high >= low >= WINDOW:
            return max(1, round(n * share))
        return round(high - layer * (high - low) / (layers - 1))


@dataclass(frozen=True)
class Chunk(Method):
    """ChunkKVPress over SnapKV scores."""

    keeps_last = False
    budget_scope = "layer"

    def needs(self) -> frozenset[str]:
        return frozenset({f"window:{WINDOW}"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        starts = range(0, ctx.n, CHUNK)
        count = max(1, int(len(starts) * (1 - removed(budget))))
        kept = []
        for layer in range(ctx.layers):
            scores = snap_scores(ctx, layer).sum(0)
            means = torch.stack([scores[a : a + CHUNK].mean() for a in starts])
            best = means.topk(count).indices.sort().values.tolist()
            kept.append(torch.tensor([i for c in best for i in range(c * CHUNK, min(ctx.n, (c + 1) * CHUNK))]))
        over = len(kept[0]) > budget.per_head
        return Selection(kept, frozenset({"over_budget"}) if over else frozenset())
