"""TOVA: the tokens that the last query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating


@dataclass(frozen=True)
class TOVA(Method):
    """One set per layer: the keys with the most attention from the last query, mean over all query heads.

    While generating, the same score comes from the newest query, and the lowest leaves; even the newest token competes.
    Source: arXiv:2401.06104 and the authors' code (schwartz-lab-NLP/TOVA, src/tova_cache.py). Differs: the
    last prompt token always stays, because it is fed again through the compressed cache; the prompt is read densely
    before anything leaves, so what is kept has already mixed in what is dropped (optimistic).
    """

    name = "tova"
    title = "TOVA"
    paper = "arXiv:2401.06104"
    tier = 2
    phases = ("prefill", "decode")
    decoding = "unified"

    def needs(self) -> frozenset[str]:
        return frozenset({"window:1"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.cache.select import join, top_positions

        last = torch.tensor([ctx.n - 1])
        kept = []
        for layer in range(ctx.layers):
            kept.append(join(top_positions(self._scores(ctx, layer)[:-1], budget.per_head - 1), last))
        return Selection(kept)

    def _scores(self, ctx: Context, layer: int) -> Tensor:
        """[n]"""
        return ctx.once(("tova", layer), lambda: ctx.window_attention(layer, 1)[:, 0].mean(0))

    def decode_rank(self, view: Generating) -> Tensor:
        assert view.attention is not None
        return view.all_heads_alike(view.attention.mean(1, keepdim=True))
