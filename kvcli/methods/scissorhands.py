"""Scissorhands: tokens that often received little attention leave first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating


@dataclass(frozen=True)
class Scissorhands(Method):
    """Per KV head the keys that were least often unimportant to the last queries, and the newest ones.

    A key is unimportant to the query of token t (counted from 1, evicted tokens included) when it receives less than
    1/t, its even share. The count covers the last `history` queries and is not divided by how many of them saw the key;
    the largest counts leave, of equal ones the newest. The `recent` newest tokens stay, cut to half of the budget or
    cap. Source: arXiv:2305.17118, algorithm 2; its defaults (history 400, recent 10) and what it counts are checked
    against a public reading of it (AnswerDotAI/cold-compress), which takes the tokens in the cache for t. Differs: all
    layers have one budget, the paper gives later layers more; one pair leaves as another comes, the paper drops many at
    once (`--decode-interval`); the query heads of a KV head share one attention, their mean (`reduce=max`: the
    largest); the prompt is read densely before anything leaves, so what is kept has already mixed in what is dropped
    (optimistic).

    Memory while generating: history / 8 + 4 bytes per KV pair, a tenth of a 16-bit pair of width 128.
    """

    name = "scissorhands"
    title = "Scissorhands"
    paper = "arXiv:2305.17118"
    tier = 2
    phases = ("prefill", "decode")
    protects = "the newest tokens, at most half of the budget"
    decoding = "unified"

    history: int = setting(400, ge=1, help="last queries that are asked", paper="400")
    recent: int = setting(10, ge=1, help="newest tokens, always kept", paper="10")
    reduce: str = setting("mean", choices=("mean", "max"), help="how query heads of a KV head share one attention")

    def needs(self) -> frozenset[str]:
        return frozenset({f"window:{self.history}"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.cache.select import join, top_positions

        recent, _, flags = budget.protect(self.recent)
        newest = torch.arange(ctx.n - recent, ctx.n)
        kept = []
        for layer in range(ctx.layers):
            counts = self._counts(ctx, layer)[:, : ctx.n - recent]
            kept.append(join(top_positions(-counts, max(0, budget.per_head - recent)), newest))
        return Selection(kept, flags)

    def decode_start(self, ctx: Context, layer: int) -> dict[str, Tensor]:
        """count [H_kv, n] int32; low [H_kv, n, history / 8] uint8: a ring of bits, one for each query."""
        import torch

        def rings() -> Tensor:
            heads = range(ctx.kv_heads)
            return torch.stack([pack(self._low(ctx, layer, head), ctx.n, self.history) for head in heads])

        low = ctx.once(("scissorhands rings", layer, self.history, self.reduce), rings)
        return {"count": self._counts(ctx, layer), "low": low}

    def decode_update(self, view: Generating) -> None:
        """The newest query's bit takes the place of the one that falls out of the history."""
        import torch

        assert view.attention is not None
        attention = view.per_kv_head(view.attention, self.reduce)
        low = (attention < 1 / (view.newest + 1).to(attention.dtype)) & (view.position >= 0)
        ring, place = view.state["low"], view.newest % self.history
        index = (place // 8).expand_as(low)[..., None]
        bit = torch.ones_like(place, dtype=torch.uint8) << (place % 8).to(torch.uint8)
        byte = ring.gather(-1, index)[..., 0]
        was = (byte & bit) > 0
        low = torch.where(view.counts, low, was)
        ring.scatter_(-1, index, torch.where(low, byte | bit, byte & ~bit)[..., None])
        view.state["count"] += low.int() - was.int()

    def decode_whole(self) -> int:
        return self.recent

    def decode_rank(self, view: Generating) -> Tensor:
        recent = view.position > view.newest - view.protected(self.recent).clamp_min(1)
        return (-view.state["count"].float()).masked_fill(recent, float("inf"))

    def _counts(self, ctx: Context, layer: int) -> Tensor:
        """[H_kv, n] int32: to how many of the last queries each key was unimportant."""
        import torch

        def make() -> Tensor:
            return torch.stack([self._low(ctx, layer, head).sum(0, dtype=torch.int32) for head in range(ctx.kv_heads)])

        return ctx.once(("scissorhands", layer, self.history, self.reduce), make)

    def _low(self, ctx: Context, layer: int, head: int) -> Tensor:
        """bool [w, n]: to which of the last w = min(history, n) queries each key was unimportant, for one KV head.

        One head at a time: w rows of all heads at once would be large.
        """
        import torch

        w, group = min(self.history, ctx.n), ctx.heads // ctx.kv_heads
        keys = ctx.keys[layer][head]
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        query = torch.arange(ctx.n - w, ctx.n, device=keys.device)[:, None]
        unseen = torch.arange(ctx.n, device=keys.device) > query
        shared = keys.new_zeros(w, ctx.n)
        for h in range(head * group, (head + 1) * group):
            scores = ctx.window_queries[layer][h, -w:].to(keys.dtype) @ keys.T * ctx.scaling[layer]
            attention = scores.masked_fill_(unseen, float("-inf")).softmax(-1)
            shared = torch.maximum(shared, attention) if self.reduce == "max" else shared.add_(attention)
        if self.reduce == "mean":
            shared /= group
        return (shared < 1 / (query + 1).to(keys.dtype)) & ~unseen


def pack(low: Tensor, n: int, history: int) -> Tensor:
    """bool [w, n] of the last w queries of n tokens -> uint8 [n, ceil(history / 8)]: query i's is bit i mod history."""
    import torch

    places = torch.arange(n - len(low), n, device=low.device) % history
    bits = low.new_zeros(low.shape[1], (history + 7) // 8 * 8, dtype=torch.uint8)
    bits[:, places] = low.T.to(torch.uint8)
    weights = 1 << torch.arange(8, device=low.device)
    return (bits.unflatten(1, (-1, 8)) * weights.to(torch.uint8)).sum(-1, dtype=torch.uint8)
