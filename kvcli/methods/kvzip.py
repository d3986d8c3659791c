"""KVzip: the pairs that the model reads when it repeats the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class KVzip(Method):
    """One budget for all layers and heads goes to the pairs with the largest attention while the context is repeated.

    An extra pass asks the model to repeat its context in chunks of 2000 tokens, teacher-forced; a pair's score is the
    most attention that any token of the pass, in any query head of its group, gives it. The question is not read: it
    stays, as template and system text and the first `sinks` tokens do. Source: arXiv:2505.23416, section 3, and its
    code, where system text and question are never evicted. Differs: what stays counts in the budget and takes at most
    half of it, the newest first; scores are float32; ties by position, then layer and head; the total is exact (the
    code keeps what lies above a threshold); a prompt that is only a question is repeated itself. A tokenizer without
    the request's words repeats behind an end token (note `worded`: false).
    """

    name = "kvzip"
    title = "KVzip"
    paper = "arXiv:2505.23416"
    tier = 2
    budget_scope = "model"
    sharing = 2
    protects = "question, template and system text, the first tokens; at most half of the budget"

    sinks: int = setting(4, ge=0, help="first tokens kept at least, system text or not")

    def needs(self) -> frozenset[str]:
        return frozenset({"reconstruction"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        repeated = ctx.extra("reconstruction")
        newest, sinks, flags = budget.protect(ctx.n - repeated.end, max(repeated.start, self.sinks))
        heads = ctx.layers * ctx.kv_heads
        order = ctx.once("kvzip order", lambda: _order(repeated.scores))
        position = order // heads
        contest = order[(position >= sinks) & (position < ctx.n - newest)]
        keep = torch.zeros(ctx.n * heads, dtype=torch.bool)
        keep[contest[: max(0, budget.model_total - heads * (sinks + newest))]] = True
        by_position = keep.view(ctx.n, heads)
        by_position[:sinks] = by_position[ctx.n - newest :] = True
        kept = list(by_position.T.nonzero()[:, 1].split(by_position.sum(0).tolist()))
        layers = [kept[i : i + ctx.kv_heads] for i in range(0, heads, ctx.kv_heads)]
        return Selection(layers, flags, notes={"chunks": repeated.chunks, "worded": repeated.worded})


def _order(scores: list[Tensor]) -> Tensor:
    """[n * L * H_kv] indices (position, layer, head) of all pairs, the best first; of equal ones the first stays."""
    import torch

    flat = torch.stack([s.T.cpu() for s in scores], 1).flatten()
    return torch.sort(flat, descending=True, stable=True).indices
