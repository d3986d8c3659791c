"""StreamingLLM: a few first tokens (attention sinks) and the most recent ones."""

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
class StreamingLLM(Method):
    """Sinks and recent tokens, the same in every layer and head. Source: arXiv:2309.17453, section 3.2.

    While generating, the sinks stay (at most half of the cap) and the oldest of the others leave. Differs: the paper
    never lets a token see what fell out of its window; after a dense prefill the kept states have already mixed in what
    is dropped, so results are optimistic. `rerotate=true` gives the kept keys the paper's positions inside the cache;
    by default they keep their original ones. Those positions would move at every eviction, so with `rerotate=true`
    generated tokens are not compressed.
    """

    name = "streaming_llm"
    title = "StreamingLLM"
    paper = "arXiv:2309.17453"
    tier = 1
    phases = ("prefill", "decode")
    protects = "sinks, at most half of the budget"
    decoding = "unified"
    decode_reads = False

    sinks: int = setting(4, ge=0, help="first tokens always kept", paper="4")
    rerotate: bool = setting(False, help="positions inside the cache, as in the paper; no decode phase", paper="true")

    def needs(self) -> frozenset[str]:
        return frozenset({"rope"} if self.rerotate else ())

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.cache.select import whole

        keep = budget.per_head
        if budget.everything:
            return Selection([whole(ctx.n)] * ctx.layers)
        if budget.strict_window:
            sinks, flags = min(self.sinks, ctx.n - 1), frozenset({"over_budget"} if self.sinks >= keep else ())
        else:
            sinks = min(self.sinks, keep // 2)
            flags = frozenset({"fallback"} if sinks < self.sinks else ())
        kept = torch.cat([whole(sinks), torch.arange(ctx.n - max(1, keep - sinks), ctx.n)])
        return Selection([kept] * ctx.layers, flags, rerotate=self.rerotate)

    def layers_alike(self) -> int:
        return 0

    def decodes(self) -> bool:
        return not self.rerotate

    def decode_whole(self) -> int:
        return self.sinks + 1

    def decode_rank(self, view: Generating) -> Tensor:
        sinks = view.protected(self.sinks)
        return view.position.float().masked_fill(view.position < sinks, float("inf"))
