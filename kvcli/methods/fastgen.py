"""FastGen: every head gets the cheapest rule that still holds most of its attention."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from string import punctuation
from typing import TYPE_CHECKING

from kvcli.methods.base import Domain, Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context

RULES = ("special", "punctuation", "frequent", "local", "full")
"""Each keeps what the one before it keeps, and more."""


@dataclass(frozen=True)
class FastGen(Method):
    """Per KV head the first of five rules whose keys hold at least `recovery` of the attention of the prompt's queries.

    The rules: special tokens; also punctuation; also the `frequent` share of the prompt with the largest column sums
    among the other tokens; also the newest `local` share, which the frequent ones are then chosen outside of;
    everything. What a rule holds is the mean over all queries of the attention to its keys, where a query's own last
    `local` share counts as local. There is no budget: `recovery` is the knob, and the measured ratio is what comes out.
    Source: arXiv:2310.01801, sections 3.3 and 3.4 (both shares 0.3), with sets and thresholds as in
    AnswerDotAI/cold-compress (KVCacheHybrid), because the authors' repository has no code. Differs: query heads that
    share a KV head decide together, by the mean of their attention; special tokens are the prompt's BOS and template
    tokens; the last prompt token always stays, because it is fed again; shares round half up; this is the prompt's
    part alone: generated tokens are all kept, where the paper applies each head's rule to them too.
    """

    name = "fastgen"
    title = "FastGen"
    paper = "arXiv:2310.01801"
    tier = 2
    budget_scope = "model"
    domain = Domain("none")
    sharing = 2
    protects = "special tokens"

    recovery: float = setting(
        0.95, ge=0.0, le=1.0, help="share of a head's attention that its rule must hold", paper="0.95"
    )
    local: float = setting(0.3, ge=0.0, le=1.0, help="share of the prompt that is local", paper="0.3")
    frequent: float = setting(
        0.3, ge=0.0, le=1.0, help="share of the prompt that is kept for its column sums", paper="0.3"
    )

    def needs(self) -> frozenset[str]:
        return frozenset({"column_sum", "bands"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        kept, used = [], Counter[str]()
        for layer in range(ctx.layers):
            sets, held = self._sets(ctx, layer)
            chosen = [next((r for r in range(4) if h[r] >= self.recovery), 4) for h in held.T.tolist()]
            kept.append([sets[rule, head].nonzero()[:, 0] for head, rule in enumerate(chosen)])
            used.update(RULES[rule] for rule in chosen)
        return Selection(kept, notes={"rules": {rule: used[rule] for rule in RULES}})

    def _sets(self, ctx: Context, layer: int) -> tuple[Tensor, Tensor]:
        """sets bool [5, H_kv, n]: what each rule keeps; held float64 [4, H_kv]: the share of the attention that the
        first four hold."""
        return ctx.once((self.name, layer, self.local, self.frequent), lambda: self._made(ctx, layer))

    def _made(self, ctx: Context, layer: int) -> tuple[Tensor, Tensor]:
        import torch

        near, many = max(1, _share(self.local, ctx.n)), _share(self.frequent, ctx.n)
        sums = ctx.per_kv_head(ctx.column_sum(layer)).cpu().double()
        band = ctx.per_kv_head(ctx.band_sum(layer, near)).cpu().double()
        special, marks = ctx.once("special and punctuation", lambda: _marked(ctx))
        newest = torch.arange(ctx.n) >= ctx.n - near
        first, second = special.expand_as(sums), (special | marks).expand_as(sums)
        third = second | _largest(sums, second, many)
        far = second | _largest(sums, second | newest, many)
        held = [(sums * kept).sum(-1) for kept in (first, second, third)]
        held.append(torch.where(far, sums, band).sum(-1))
        sets = [first, second, third, far | newest, torch.ones_like(far)]
        return torch.stack(sets), torch.stack(held) / ctx.n


def _share(part: float, n: int) -> int:
    from kvcli.grammar import round_half_up

    return round_half_up(Decimal(str(part)) * n)


def _marked(ctx: Context) -> tuple[Tensor, Tensor]:
    """bool [n] each: special tokens and the last one; tokens that are nothing but punctuation."""
    import torch

    special, marks = torch.zeros(2, ctx.n, dtype=torch.bool)
    for start, end in ctx.spans("special"):
        special[start:end] = True
    special[-1] = True
    if ctx.token_text is not None:
        marks = torch.tensor([_is_punctuation(ctx.token_text(i)) for i in range(ctx.n)])
    return special, marks


def _is_punctuation(text: str) -> bool:
    bare = text.strip()
    return bool(bare) and all(c in punctuation or unicodedata.category(c).startswith("P") for c in bare)


def _largest(sums: Tensor, taken: Tensor, count: int) -> Tensor:
    """bool [H_kv, n]: the `count` largest sums that are not taken; of equal ones the first."""
    import torch

    order = torch.sort(sums.masked_fill(taken, -1), dim=-1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(sums, dtype=torch.bool).scatter(1, order, True) & ~taken
