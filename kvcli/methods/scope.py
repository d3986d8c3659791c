"""SCOPE: prompt and answer are compressed apart, each to heavy hitters and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating

_KERNEL = 7
"""Width of the max-pool of `prefill=snapkv`, as in the authors' runs."""


@dataclass(frozen=True)
class SCOPE(Method):
    """The prompt's part is chosen once and stays; of the generated tokens the newest and those the newest query reads.

    Prompt: the keys before a window of 8 with the largest column sums (`prefill=h2o`, the authors' main runs) or with
    the most attention from that window, max-pooled over 7 (`prefill=snapkv`, one of their plug-in runs); the window
    stays. Generated tokens, per KV head: the `recent` newest stay, cut to half of the cap, and of the others those with
    the most attention from the newest query alone. Source: arXiv:2412.13649, figure 3, and the authors' code
    (Linking-ai/SCOPE, model/kv_utils.py). Their strategies are the ways the cap moves: slide is a fixed cap
    (`--decode-budget N`, theirs 512 or 1024 with 256 recent); adaptive a cap that gains a pair at regular intervals
    (`--decode-ratio R`, one every 1/R tokens); discontinuous either of them with `--decode-interval`.

    Differs: their adaptive cap starts from the recent window's size and reaches N at the longest output allowed; cut to
    half, the recent window also fits caps below 512. Query heads of a KV head share one score, the authors keep a set
    per query head. Their column sums let a prompt's queries look ahead; here attention is causal.
    """

    name = "scope"
    title = "SCOPE"
    paper = "arXiv:2412.13649"
    tier = 2
    phases = ("prefill", "decode")
    protects = "the prompt's window and the newest generated tokens, each at most half of its budget"
    decoding = "separate"

    prefill: str = setting(
        "h2o", choices=("h2o", "snapkv"), help="how the prompt's part is chosen", paper="h2o; snapkv as a plug-in"
    )
    window: int = setting(8, ge=1, help="newest prompt tokens, always kept; for snapkv, whose queries vote", paper="8")
    recent: int = setting(256, ge=1, help="newest generated tokens, always kept", paper="256")
    reduce: str = setting("mean", choices=("mean", "max"), help="how query heads of a KV head share one score")

    def needs(self) -> frozenset[str]:
        return frozenset({"column_sum" if self.prefill == "h2o" else f"window:{self.window}"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.cache.select import join, top_positions

        window, _, flags = budget.protect(self.window)
        newest = torch.arange(ctx.n - window, ctx.n)
        kept = []
        for layer in range(ctx.layers):
            scores = self._scores(ctx, layer, window)
            kept.append(join(top_positions(scores, max(0, budget.per_head - window)), newest))
        return Selection(kept, flags)

    def _scores(self, ctx: Context, layer: int, window: int) -> Tensor:
        """[H_kv, n - window]"""
        from kvcli.methods._window import snap_scores

        if self.prefill == "snapkv":
            return snap_scores(ctx, layer, window, _KERNEL, "max", self.reduce)
        return ctx.per_kv_head(ctx.column_sum(layer)[:, : ctx.n - window], self.reduce)

    def decode_whole(self) -> int:
        return self.recent

    def decode_rank(self, view: Generating) -> Tensor:
        assert view.attention is not None
        recent = view.position > view.newest - view.protected(self.recent).clamp_min(1)
        return view.per_kv_head(view.attention, self.reduce).masked_fill(recent, float("inf"))
