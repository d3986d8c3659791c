"""FastGen: every head gets the cheapest rule that still holds most of its attention."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from string import punctuation
from typing import TYPE_CHECKING

from kvcli.methods.base import Domain, Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating

RULES = ("special", "punctuation", "frequent", "local", "full")
"""Each keeps what the one before it keeps, and more."""

_SPECIAL, _MARK = 1, 2
"""Bits of what a token is."""
_FEW = 8
"""So many smallest ones are found sooner one by one than by sorting."""


@dataclass(frozen=True)
class FastGen(Method):
    """Per KV head the first of five rules whose keys hold at least `recovery` of the attention of the prompt's queries.

    The rules: special tokens; also punctuation; also the `frequent` share of the prompt with the largest column sums
    among the other tokens; also the newest `local` share, which the frequent ones are then chosen outside of;
    everything. What a rule holds is the mean over all queries of the attention to its keys, where a query's own last
    `local` share counts as local. There is no budget: `recovery` is the knob, and the measured ratio is what comes out.
    While generating, each head goes on with its rule: punctuation is recognised in what was generated, column sums go
    on accumulating over what is still there, the frequent are a share of the text so far, the local the newest tokens,
    as many as in the prompt. Source: arXiv:2310.01801, sections 3.3 and 3.4 and algorithm 2 (both shares 0.3), with
    sets and thresholds as in AnswerDotAI/cold-compress (KVCacheHybrid), because the authors' repository has no code.
    Differs: query heads that share a KV head decide together, by the mean of their attention; special tokens are the
    prompt's BOS and template tokens, never generated ones; the newest token stays until the next one came, in
    algorithm 2 it can leave at once (the last prompt token is fed again); shares round half up.
    """

    name = "fastgen"
    title = "FastGen"
    paper = "arXiv:2310.01801"
    tier = 2
    phases = ("prefill", "decode")
    budget_scope = "model"
    domain = Domain("none")
    sharing = 2
    protects = "special tokens"
    decoding = "own"

    recovery: float = setting(
        0.95, ge=0.0, le=1.0, help="share of a head's attention that its rule must hold", paper="0.95"
    )
    local: float = setting(0.3, ge=0.0, le=1.0, help="share of the prompt that is local", paper="0.3")
    frequent: float = setting(
        0.3, ge=0.0, le=1.0, help="share of the text that is kept for its column sums", paper="0.3"
    )

    def needs(self) -> frozenset[str]:
        return frozenset({"column_sum", "bands"})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        kept, used, facts = [], Counter[str](), []
        for layer in range(ctx.layers):
            sets, held = self._sets(ctx, layer)
            chosen = [next((r for r in range(4) if h[r] >= self.recovery), 4) for h in held.T.tolist()]
            kept.append([sets[rule, head].nonzero()[:, 0] for head, rule in enumerate(chosen)])
            facts.append({"rule": torch.tensor(chosen)})
            used.update(RULES[rule] for rule in chosen)
        return Selection(kept, notes={"rules": {rule: used[rule] for rule in RULES}}, facts=facts)

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
        special = special | (torch.arange(ctx.n) == ctx.n - 1)
        newest = torch.arange(ctx.n) >= ctx.n - near
        first, second = special.expand_as(sums), (special | marks).expand_as(sums)
        third = second | _largest(sums, second, many)
        far = second | _largest(sums, second | newest, many)
        held = [(sums * kept).sum(-1) for kept in (first, second, third)]
        held.append(torch.where(far, sums, band).sum(-1))
        sets = [first, second, third, far | newest, torch.ones_like(far)]
        return torch.stack(sets), torch.stack(held) / ctx.n

    def decode_start(self, ctx: Context, layer: int) -> dict[str, Tensor]:
        """received [H_kv, n]: column sums; kind [H_kv, n] uint8: bits of what each token is."""
        received = ctx.per_kv_head(ctx.column_sum(layer))
        special, marks = ctx.once("special and punctuation", lambda: _marked(ctx))
        kind = special.byte() * _SPECIAL + marks.byte() * _MARK
        return {"received": received, "kind": kind.to(received.device).expand(ctx.kv_heads, -1)}

    def decode_update(self, view: Generating) -> None:
        import torch

        assert view.attention is not None and view.texts is not None
        view.state["received"] += view.per_kv_head(view.attention) * view.counts
        marks = torch.tensor([_is_punctuation(text) for text in view.texts()], device=view.position.device)
        fresh = (view.position == view.newest) & view.counts & marks[:, None, None]
        view.state["kind"] |= fresh.byte() * _MARK

    def decode_leaves(self, view: Generating) -> Tensor:
        position, kind, rule = view.position, view.state["kind"], view.facts["rule"][..., None]
        near = _shares(self.local, view.n).clamp_min(1)
        kept = (position == view.newest) | (kind & _SPECIAL > 0) | (rule == RULES.index("full"))
        kept |= (kind & _MARK > 0) & (rule >= RULES.index("punctuation"))
        kept |= (position > view.newest - near) & (rule == RULES.index("local"))
        others = (position >= 0) & ~kept
        many = _shares(self.frequent, view.newest + 1) * (rule >= RULES.index("frequent"))
        return _least(view.state["received"], position, others, others.sum(-1, keepdim=True) - many)


def _share(part: float, n: int) -> int:
    from kvcli.grammar import round_half_up

    return round_half_up(Decimal(str(part)) * n)


def _shares(part: float, n: Tensor) -> Tensor:
    """`_share` of each."""
    exact = Fraction(str(part))
    return (2 * exact.numerator * n + exact.denominator) // (2 * exact.denominator)


def _marked(ctx: Context) -> tuple[Tensor, Tensor]:
    """bool [n] each: special tokens; tokens that are nothing but punctuation."""
    import torch

    special, marks = torch.zeros(2, ctx.n, dtype=torch.bool)
    for start, end in ctx.spans("special"):
        special[start:end] = True
    if ctx.token_text is not None:
        marks = torch.tensor([_is_punctuation(ctx.token_text(i)) for i in range(ctx.n)])
    return special, marks


@lru_cache(maxsize=4096)
def _is_punctuation(text: str) -> bool:
    bare = text.strip()
    return bool(bare) and all(c in punctuation or unicodedata.category(c).startswith("P") for c in bare)


def _largest(sums: Tensor, taken: Tensor, count: int) -> Tensor:
    """bool [H_kv, n]: the `count` largest sums that are not taken; of equal ones the first."""
    import torch

    order = torch.sort(sums.masked_fill(taken, -1), dim=-1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(sums, dtype=torch.bool).scatter(1, order, True) & ~taken


def _least(received: Tensor, position: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """bool [R, H_kv, S]: the `count` [R, H_kv, 1] smallest sums of `among`, of equal ones the newest."""
    import torch

    score, gone = received.masked_fill(~among, float("inf")), torch.zeros_like(among)
    most = int(count.max())
    if most > _FEW:
        order = position.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, score.gather(-1, order).argsort(dim=-1, stable=True))
        return gone.scatter(-1, order, torch.arange(among.shape[-1], device=among.device) < count)
    for number in range(most):
        tie = (score == score.amin(-1, keepdim=True)) & among & ~gone
        newest = position.where(tie, -1).amax(-1, keepdim=True)
        pick = tie & (position == newest) & (count > number)
        gone, score = gone | pick, score.masked_fill(pick, float("inf"))
    return gone
