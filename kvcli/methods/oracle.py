"""Oracle: the keys that the full cache's own answer will attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods._ranked import RankedMethod

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.context import Context
    from kvcli.models.answering import Answered


@dataclass(frozen=True)
class Oracle(RankedMethod):
    """Per KV head the keys with the most attention from the answer that the full cache gives; the newest token stays.

    Not a method to use: it knows the answer before it selects. With `random` it brackets what any choice by attention
    can reach at a budget. An extra pass answers greedily with the full cache under the run's stop rules, at most 256
    tokens, and sums over its queries (the last prompt token and the answer's) the attention each prompt key receives;
    query heads that share a KV head are averaged. Source: this project. Differs: attention mass is not the same as
    influence on the output, so it is an upper bound for methods that rank by attention, not for all; its answer is
    greedy also where --temperature asks for samples.
    """

    name = "oracle"
    title = "Oracle"
    tier = 2
    sharing = 2

    def needs(self) -> frozenset[str]:
        return frozenset({"answer"})

    def scores(self, ctx: Context, layer: int, newest: int, sinks: int) -> Tensor:
        answer: Answered = ctx.extra("answer")
        received = ctx.once((self.name, layer), lambda: ctx.per_kv_head(answer.sums[layer]))
        return received[:, sinks : ctx.n - newest]
