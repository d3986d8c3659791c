"""ShotKV: whole few-shot examples are kept or dropped; generated tokens one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.errors import KvcliError
from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating


@dataclass(frozen=True)
class ShotKV(Method):
    """Shots ranked by the attention their tokens received, averaged over the shot; the best that fit are kept whole.

    The score is the column sum over all prompt queries (`queries=question`: the question's; `queries=window`: the last
    `window`), summed over query heads, per layer. System, question and special tokens are always kept and count.
    Passages compete in sentences or blocks of 16 tokens. Once chosen, the prompt's part stays. Of the generated tokens
    those stay, one set per layer, that the newest query attends to most, summed over query heads, this step only; the
    newest and `recent` more always do. Source: arXiv:2502.01941v4, section 5 and algorithm 1; `scope=all-layers` is the
    v1 reading of the prompt's part (one choice from scores averaged over layers); `fit=stop` ends at the first shot
    that does not fit; `decode=off` is the paper's prefill-only variant. Differs: the paper protects no generated token
    and does not say what happens to tokens outside shots.
    """

    name = "shotkv"
    title = "ShotKV"
    paper = "arXiv:2502.01941"
    tier = 1
    phases = ("prefill", "decode")
    budget_scope = "layer"
    protects = "system, question and special tokens (may exceed the budget)"
    decoding = "separate"
    open_points = (
        ("how shots are found", "prompts are built from lists of examples, whose token spans are known; passages are "
         "cut into sentences, or blocks of 16 tokens where they have none"),
        ("what becomes of tokens outside shots", "system, question and special tokens stay and count in r_p n"),
        ("whose attention is accumulated", "that of all prompt queries; `queries=question` or `queries=window`"),
        ("scores per layer or over all layers", "per layer as in version 4; `scope=all-layers` for version 1"),
        ("the best set of shots, or greedy", "greedy, by falling score"),
        ("a shot that does not fit", "skipped, the next one is tried; `fit=stop` ends there"),
        ("a budget smaller than any shot", "no shot stays, none is cut: flag `fallback`, and the record has the "
         "measured ratio"),
        ("r_d of a cache that is already pruned", "r_d counts all tokens generated so far, evicted ones too; taken "
         "literally the cache would collapse"),
        ("protection of the newest generated tokens", "the newest stays; `recent=N` keeps N more"),
        ("query heads that share a KV head", "scores are summed over all query heads; one set for all KV heads of "
         "a layer"),
        ("positions after eviction", "the true ones"),
        ("examples whose questions and answers stand apart", "a shot is the union of its spans"),
        ("attention weights under flash attention", "column sums from queries, keys and the kernel's logsumexp: exact, "
         "no n x n tensor"),
    )  # fmt: skip

    scope: str = setting(
        "layer", choices=("layer", "all-layers"), help="one choice per layer, or one for all", paper="not said"
    )
    queries: str = setting(
        "all", choices=("all", "question", "window"), help="whose attention counts", paper="not said"
    )
    window: int = setting(32, ge=1, help="how many last queries, for queries=window")
    fit: str = setting(
        "skip", choices=("skip", "stop"), help="at a shot that does not fit: skip it, or stop", paper="not said"
    )
    decode: str = setting("on", choices=("on", "off"), help="whether generated tokens may be compressed", paper="on")
    recent: int = setting(0, ge=0, help="generated tokens always kept besides the newest")

    def __post_init__(self) -> None:
        if self.window != type(self).window and self.queries != "window":
            _unused("window", self.window, "queries=window")
        if self.recent != type(self).recent and self.decode == "off":
            _unused("recent", self.recent, "decode=on")

    def needs(self) -> frozenset[str]:
        names = {"all": "column_sum", "question": "column_sum:question", "window": f"window:{self.window}"}
        return frozenset({names[self.queries]})

    def layers_alike(self) -> int:
        return int(self.scope == "layer")

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.methods._units import keep_units

        scores = [self._unit_scores(ctx, layer) for layer in range(ctx.layers)]
        if self.scope == "all-layers":
            scores = [torch.stack(scores).mean(0)] * ctx.layers
        orders = [torch.sort(s, descending=True, stable=True).indices.tolist() for s in scores]
        return keep_units(ctx, budget, orders, self.fit)

    def _unit_scores(self, ctx: Context, layer: int) -> Tensor:
        """[units]: mean over a unit's tokens of the attention received, summed over heads (eq. 3)."""
        from kvcli.methods._units import unit_index

        key = ("shotkv", layer, self.queries, self.window)
        return ctx.once(key, lambda: unit_index(ctx).means(self._received(ctx, layer).sum(0)))

    def _received(self, ctx: Context, layer: int) -> Tensor:
        """[H, n]: attention each key received from the queries that count."""
        if self.queries == "window":
            return ctx.window_attention(layer, self.window).sum(1)
        return ctx.column_sum(layer, self.queries)

    def decodes(self) -> bool:
        return self.decode == "on"

    def decode_least(self) -> int:
        return 1 + self.recent

    def decode_rank(self, view: Generating) -> Tensor:
        """Eq. 7."""
        assert view.attention is not None
        score = view.all_heads_alike(view.attention.sum(1, keepdim=True))
        return score.masked_fill(view.position >= view.newest - self.recent, float("inf"))


def _unused(name: str, value: object, where: str) -> None:
    what = f"'{name}={value}' has no effect without {where}"
    raise KvcliError(what, given=f"--method shotkv:{name}={value}", fix=f"shotkv:{where},{name}={value}")
