"""CriticalKV: what a key's value does to the layer's output counts beside the attention it gets."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from kvcli.errors import KvcliError
from kvcli.methods._ordered import ranked_once
from kvcli.methods._window import WindowMethod
from kvcli.methods.base import Selection, Wrapper, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class CriticalKV(Wrapper):
    """Half of a head's free budget goes to the base's best scores, the rest to the largest products with the weight.

    A pair's weight is the L1 norm of W_o v: its value sent through the columns of the output projection that belong to
    a query head, mean over the KV head's query heads; the product is (score + 1e-4) * weight. `heads=adaptive` first
    shares the layer's budget out over heads by the base's scores, the best fifth of each head safe, as the authors
    combine it with AdaKV; the total is the layer's then. Source: arXiv:2502.03805, section 4, and the authors' code in
    kvpress. Differs: the base's protected tokens are outside of both halves (kvpress counts the window in the first);
    scores of an observation window are means over its queries, as in the authors' code, so that 1e-4 weighs the same;
    a bias of the projection does not count; a base whose scores can be below zero is refused.
    """

    name = "criticalkv"
    title = "CriticalKV"
    paper = "arXiv:2502.03805"
    tier = 2
    protects = "what its base protects"

    base: str = setting("snapkv", help="whose scores: a method that ranks keys per head by attention")
    first: float = setting(
        0.5, ge=0.0, le=1.0, help="share of the free budget that the base's scores alone decide", paper="0.5"
    )
    eps: float = setting(1e-4, ge=0.0, help="added to the scores before they are multiplied", paper="1e-4")
    heads: str = setting(
        "even",
        choices=("even", "adaptive"),
        help="head budgets: all alike, or by AdaKV's safeguard",
        paper="even, adaptive",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self.inner, "iterative", False):
            what = f"{self.base} evicts in steps with these settings and has no one score per key"
            raise KvcliError(what, given=f"--method criticalkv:base={self.base}", fix="criticalkv")
        if self.inner.signed:
            what = f"scores of {self.base} can be below zero, and criticalkv multiplies them"
            raise KvcliError(what, given=f"--method criticalkv:base={self.base}", fix="a base that ranks by attention")
        if getattr(self.inner, "vnorm", False):
            what = f"scores of {self.base} hold the norms of the values already, and criticalkv weighs them again"
            fix = f"criticalkv:base={self.base},base.vnorm=false"
            raise KvcliError(what, given=f"--method criticalkv:base={self.base}", fix=fix)
        scope = getattr(self.inner, "budget_scope", "head")
        if self.heads == "adaptive" and scope == "head":
            scope = "layer"
        object.__setattr__(self, "budget_scope", scope)

    def needs(self) -> frozenset[str]:
        return super().needs() | {"o_proj"}

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        newest, sinks, flags = self.inner.protected(budget)
        first = Fraction(str(self.first))  # a float would lose a key: int(100 * 0.29) is 28
        always = torch.cat([torch.arange(sinks), torch.arange(ctx.n - newest, ctx.n)])
        kept: list[Tensor | list[Tensor]] = []
        for layer, size in enumerate(self.inner.sizes(budget, newest, sinks)):
            scores = self._scores(ctx, layer, newest, sinks)
            ranked = ranked_once(ctx, self.inner, (layer, newest, sinks), scores)
            counts = ranked.safeguarded(size, 0.2) if self.heads == "adaptive" else [size] * ctx.kv_heads
            # means over the window's queries, which the base sums, so that eps weighs the same for any window
            means = scores / newest if isinstance(self.inner, WindowMethod) else scores
            products = (means + self.eps) * weights(ctx, layer)[:, sinks : ctx.n - newest].to(scores.device)
            best = [
                _two_stages(order.long(), product, count, int(first * count)) + sinks
                for order, product, count in zip(ranked.by_head, products.cpu(), counts, strict=True)
            ]
            heads = [torch.cat([head, always]).sort().values for head in best]
            kept.append(heads if self.heads == "adaptive" else torch.stack(heads))
        return Selection(kept, flags)

    def _scores(self, ctx: Context, layer: int, newest: int, sinks: int) -> Tensor:
        """[H_kv, m]: the base's scores. Raises KvcliError when some are below zero."""
        scores: Tensor = self.inner.scores(ctx, layer, newest, sinks)
        if bool((scores < 0).any()):
            what = f"criticalkv multiplies attention, and some scores of {self.base} are below zero"
            raise KvcliError(what, given=f"--method criticalkv:base={self.base}", fix="criticalkv:base=snapkv")
        return scores


def _two_stages(order: Tensor, product: Tensor, count: int, first: int) -> Tensor:
    """[count] keys: the first of the base's order, then the largest products among the others; ties by position."""
    import torch

    product = product.clone()
    product[order[:first]] = float("inf")
    return torch.sort(product, descending=True, stable=True).indices[:count]


def weights(ctx: Context, layer: int) -> Tensor:
    """[H_kv, n] float32 at least: the L1 norm of W_o v for every value, mean over the KV head's query heads."""
    return ctx.once(("L1 of W_o v", layer), lambda: _weights(ctx, layer))


def _weights(ctx: Context, layer: int) -> Tensor:
    import torch

    if ctx.o_proj is None:
        what = "criticalkv reads the output projection, and this model's family has none that kvcli knows"
        raise KvcliError(what, given="--method criticalkv", fix="another method, or another model")
    values = ctx.values[layer]
    matrix: Any = ctx.o_proj(layer).to(values.device)
    wide = torch.promote_types(values.dtype, matrix.dtype)
    columns = matrix.to(wide).unflatten(1, (ctx.heads, -1))  # [hidden, H, D]
    group = ctx.heads // ctx.kv_heads
    # one head at a time: W_o v of all heads together would be H times a layer's hidden states
    norms = [(values[h // group].to(wide) @ columns[:, h].T).abs().sum(-1) for h in range(ctx.heads)]
    return ctx.per_kv_head(torch.stack(norms))
