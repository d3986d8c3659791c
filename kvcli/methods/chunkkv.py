"""ChunkKV: fixed chunks of neighbouring tokens are kept or dropped together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods._units import UnitIndex
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class ChunkKV(Method):
    """Chunks of `chunk` tokens ranked by the mean attention of the last queries, summed over all heads of a layer.

    Whole chunks are taken from the best down while they fit; the window is kept. `reuse=n` lets n neighbouring layers
    share the first one's choice. Source: arXiv:2502.00299, section 3. Differs: a last short chunk is ranked by its own
    length; with room for less than a chunk only the window stays, flagged `fallback`.
    """

    name = "chunkkv"
    title = "ChunkKV"
    paper = "arXiv:2502.00299"
    tier = 1
    budget_scope = "layer"
    protects = "the observation window, at most half of the budget"

    chunk: int = setting(10, ge=1, help="tokens per chunk", paper="10")
    window: int = setting(32, ge=1, help="last queries that vote, always kept")
    reuse: int = setting(1, ge=1, help="layers that share one choice", paper="1, or more layers")

    def needs(self) -> frozenset[str]:
        return frozenset({f"window:{self.window}"})

    def layers_alike(self) -> int:
        return self.reuse

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.methods._units import UnitIndex, positions, take

        window, _, flags = budget.protect(self.window)
        end = ctx.n - window
        chunks = [[(a, min(a + self.chunk, end))] for a in range(0, end, self.chunk)]
        index = UnitIndex.of(chunks)
        kept: list[torch.Tensor] = []
        for layer in range(ctx.layers):
            if layer % self.reuse:
                kept.append(kept[-1])
                continue
            taken: list[int] = []
            if chunks:
                means = ctx.once(
                    ("chunkkv", layer, window, self.chunk), partial(self._means, ctx, layer, window, index)
                )
                order = torch.sort(means, descending=True, stable=True).indices.tolist()
                taken = take(order, index.sizes, budget.per_head - window, fit="skip")
            if chunks and not taken and budget.per_head > window:
                flags |= {"fallback"}
            whole = [i for t in sorted(taken) for i in positions(chunks[t])]
            kept.append(torch.tensor([*whole, *range(end, ctx.n)], dtype=torch.long))
        return Selection(kept, flags)

    @staticmethod
    def _means(ctx: Context, layer: int, window: int, index: UnitIndex) -> Tensor:
        """[chunks]: mean over a chunk's tokens of the window's attention, summed over all heads."""
        from kvcli.methods._window import received

        return index.means(received(ctx, layer, window).sum(0))
