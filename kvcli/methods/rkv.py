"""R-KV: what recent queries attend to, and what is not said again by other keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating

_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class RKV(Method):
    """Pairs rank by mix * importance - (1 - mix) * redundancy; the newest `window` stay. Made for long answers.

    Importance: the attention of the last `window` queries over the pairs before the window (their softmax runs over
    these alone), the largest of a KV head's query heads, averaged over the queries, max-pooled over `kernel`
    neighbours. Redundancy: every pair's mean cosine similarity to the other keys that are held, as a softmax; among the
    keys that are similar to one key (above `threshold`), the newest is not blamed for it, so that of several near
    duplicates the newest stays. `--ratio 1` keeps the prompt whole; the authors' runs are those of `--budget 1024 --cap
    fixed --decode-interval 128`.

    Source: arXiv:2505.24133, section 3, and the authors' code (Zefan-Cai/R-KV: `cal_similarity`, `R1KV.update_kv`);
    mix is the paper's lambda, 0.1 there and 0.07 in the code's defaults. Differs: the code takes the largest logit of a
    KV head's query heads and then the softmax, here each query head has its own (`reduce=mean`: their mean); each
    query keeps the attention it gave at its own position, computed once; neighbours and the newest similar key go by
    position, in the code by place in a cache that its own evictions have shuffled; there the first pair also goes
    unblamed by keys that are similar to none; the window is cut to half of the budget. The authors compress while
    generating only: with a ratio below 1 the prompt is held to the same rule once it is read.
    """

    name = "rkv"
    title = "R-KV"
    paper = "arXiv:2505.24133"
    tier = 2
    phases = ("prefill", "decode")
    protects = "the newest tokens, at most half of the budget"
    decoding = "unified"

    window: int = setting(8, ge=1, help="newest queries that vote; their pairs are always kept", paper="8 in its code")
    kernel: int = setting(7, ge=1, odd=True, help="pooling width", paper="7 in its code")
    mix: float = setting(
        0.1,
        ge=0.0,
        le=1.0,
        help="weight of importance; the rest is redundancy's",
        paper="0.1; 0.07 in its code's defaults",
    )
    threshold: float = setting(
        0.5, ge=0.0, le=1.0, help="cosine similarity above which keys are near duplicates", paper="0.5 in its code"
    )
    reduce: str = setting("max", choices=("mean", "max"), help="how query heads of a KV head share one score")

    def needs(self) -> frozenset[str]:
        return frozenset({f"window:{self.window}"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.cache.select import join, top_positions

        if budget.everything:
            return Selection([torch.arange(ctx.n)] * ctx.layers)
        window, _, flags = budget.protect(self.window)
        newest = torch.arange(ctx.n - window, ctx.n)
        kept = []
        for layer in range(ctx.layers):
            key = ("rkv", layer, window, self.kernel, self.mix, self.threshold, self.reduce)
            scores = ctx.once(key, partial(self._prompt_scores, ctx, layer, window))
            kept.append(join(top_positions(scores, max(0, budget.per_head - window)), newest))
        return Selection(kept, flags)

    def _prompt_scores(self, ctx: Context, layer: int, window: int) -> Tensor:
        """[H_kv, n - window]"""
        import torch

        from kvcli.cache.select import pool

        end = ctx.n - window
        seen = renormalised(ctx.window_attention(layer, window)[..., :end].transpose(1, 2))
        importance = pool(ctx.per_kv_head(seen, self.reduce).mean(-1), self.kernel, "max")

        def alike() -> Tensor:
            keys = ctx.keys[layer]
            position = torch.arange(ctx.n, device=keys.device).expand(ctx.kv_heads, -1)
            return redundancy(keys, position, self.threshold)

        repeated = ctx.once(("rkv redundancy", layer, self.threshold), alike)
        return self.mix * importance - (1 - self.mix) * repeated[:, :end]

    def decode_start(self, ctx: Context, layer: int) -> dict[str, Tensor]:
        """recent [H, n, window]: a ring of what the last queries gave to each key; query i's place is i mod window."""
        import torch

        def ring() -> Tensor:
            attention = ctx.window_attention(layer, self.window)
            exact = torch.promote_types(ctx.keys[layer].dtype, torch.float32)
            places = torch.arange(ctx.n - attention.shape[1], ctx.n, device=attention.device) % self.window
            out = attention.new_zeros(ctx.heads, ctx.n, self.window, dtype=exact)
            out[..., places] = attention.transpose(1, 2).to(exact)
            return out

        return {"recent": ctx.once(("rkv ring", layer, self.window), ring)}

    def decode_update(self, view: Generating) -> None:
        """The newest query's attention takes the place of the oldest one's."""
        assert view.attention is not None
        ring = view.state["recent"]
        place = (view.newest % self.window)[..., None].expand(*ring.shape[:3], 1)
        fresh = view.attention.to(ring.dtype)[..., None].where(view.counts[..., None], ring.gather(-1, place))
        ring.scatter_(-1, place, fresh)

    def decode_whole(self) -> int:
        return self.window

    def decode_rank(self, view: Generating) -> Tensor:
        import torch

        assert view.keys is not None
        ring, position = view.state["recent"], view.position
        window = view.protected(self.window).clamp_min(1)
        recent = position > view.newest - window
        before = (position >= 0) & ~recent
        group = ring.shape[1] // view.kv_heads
        age = (view.newest - torch.arange(self.window, device=ring.device)) % self.window
        votes = (age < window)[:, :, None]  # [R, 1, 1, W]
        seen = renormalised(ring * before.repeat_interleave(group, 1)[..., None])
        shared = (view.per_kv_head(seen, self.reduce) * votes).sum(-1) / window
        importance = pooled_in_order(shared, position, before, self.kernel)
        repeated = redundancy(view.keys, position, self.threshold).to(importance.dtype)
        return (self.mix * importance - (1 - self.mix) * repeated).masked_fill(recent, float("inf"))


def renormalised(attention: Tensor) -> Tensor:
    """[..., S, W]: each query's attention over the S keys, made to add up to 1; one that sees none of them gives 0."""
    total = attention.sum(-2, keepdim=True)
    return attention / total.where(total > 0, 1)


def pooled_in_order(scores: Tensor, position: Tensor, mine: Tensor, kernel: int) -> Tensor:
    """[..., S]: max-pool of the scores of `mine` over neighbours by position, whatever their slots; others hold 0."""
    from kvcli.cache.select import pool

    order = position.argsort(dim=-1, stable=True)
    low = scores.masked_fill(~mine, float("-inf")).gather(-1, order)
    return scores.scatter(-1, order, pool(low, kernel, "max")).masked_fill(~mine, 0)


def redundancy(keys: Tensor, position: Tensor, threshold: float) -> Tensor:
    """[..., S] float32 at least: a softmax of each key's mean similarity to the others; 0 where position is -1.

    keys [..., S, D]; position [..., S]. A key's similarity to the newest of those above the threshold counts 0 for that
    newest one. Some rows of the S x S similarities at a time.
    """
    import torch

    held = position >= 0
    exact = keys.to(torch.promote_types(keys.dtype, torch.float32))
    unit = (exact / (exact.norm(dim=-1, keepdim=True) + 1e-8)).masked_fill(~held[..., None], 0)
    size = unit.shape[-2]
    block = max(1, _BLOCK_BYTES // (16 * position.numel()))
    total = unit.new_zeros(position.shape)
    for start in range(0, size, block):
        alike = unit[..., start : start + block, :] @ unit.transpose(-1, -2)
        alike.diagonal(start, -2, -1).zero_()
        newest, place = position[..., None, :].where(alike > threshold, -1).max(-1, keepdim=True)
        alike.scatter_(-1, place, alike.gather(-1, place).masked_fill(newest >= 0, 0))
        total += alike.sum(-2)
    mean = total / held.sum(-1, keepdim=True)
    return mean.masked_fill(~held, float("-inf")).softmax(-1)
