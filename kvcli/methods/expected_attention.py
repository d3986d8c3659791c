"""Expected attention: the keys that queries like the prompt's would attend to at the next positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods._ranked import RankedMethod
from kvcli.methods.base import setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class ExpectedAttention(RankedMethod):
    """Per KV head the keys with the largest expected attention from the next positions, times the norm of their values.

    Future queries are taken to be normally distributed, with mean and covariance of the prompt's queries before RoPE
    (without the sinks'), turned by the mean rotation of the next `future` positions. Then the expected weight of a key
    is exp(s mean k + s^2/2 k covariance k), s the model's scaling; a softmax over the keys behind the sinks, the mean
    over the query heads of a group, `epsilon` added and the norm of the value give the score. Source: arXiv:2510.00636,
    section 3, and the authors' code (NVIDIA/kvpress, ExpectedAttentionPress). Differs: the newest token always stays,
    because it is fed again; sinks that half of the budget does not hold compete like other keys; every head has the
    same budget. The authors' own evaluation shares budgets over heads and uses epsilon 0.01:
    `adakv:base=expected_attention,base.epsilon=0.01`.
    """

    name = "expected_attention"
    title = "Expected attention"
    paper = "arXiv:2510.00636"
    tier = 2
    protects = "the first tokens, at most half of the budget"

    future: int = setting(512, ge=1, help="next positions that are looked ahead to", paper="512")
    sinks: int = setting(4, ge=0, help="first tokens kept, and left out of the queries' statistics", paper="4")
    covariance: bool = setting(True, help="whether the spread of the queries counts, not only their mean", paper="true")
    vnorm: bool = setting(True, help="whether scores are multiplied by the norms of the values", paper="true")
    epsilon: float = setting(
        0.0, ge=0.0, help="added before the norms multiply", paper="0; 0.01 in its code's evaluation"
    )

    def needs(self) -> frozenset[str]:
        return frozenset({f"q_moments:{self.sinks}"})

    def protected(self, budget: Budget) -> tuple[int, int, frozenset[str]]:
        return budget.protect(1, self.sinks)

    def scores(self, ctx: Context, layer: int, newest: int, sinks: int) -> Tensor:
        key = (self.name, layer, sinks, *self.settings().items())
        return ctx.once(key, lambda: self._scores(ctx, layer, sinks))[:, : ctx.n - newest - sinks]

    def _scores(self, ctx: Context, layer: int, sinks: int) -> Tensor:
        """[H_kv, n - sinks]"""
        expected = ctx.per_kv_head(self._logits(ctx, layer)[:, sinks:].softmax(-1))
        if self.vnorm:
            values = ctx.values[layer][:, sinks:]
            expected = (expected + self.epsilon) * values.to(expected.dtype).norm(dim=-1)
        return expected

    def _logits(self, ctx: Context, layer: int) -> Tensor:
        """[H, n]: logarithm of each key's expected weight, up to a constant per query head."""
        import torch

        mean, spread = ctx.query_moments(layer, self.sinks)
        turn = ctx.once(("mean rotation", self.future), lambda: _mean_rotation(ctx, self.future, mean))
        turn, scaling = turn.to(mean.device), ctx.scaling[layer]  # layers may lie on several devices
        mean = mean @ turn
        keys = ctx.keys[layer].to(mean.dtype)
        group = ctx.heads // ctx.kv_heads
        logits = (keys @ mean.unflatten(0, (-1, group)).transpose(1, 2)).transpose(1, 2) * scaling
        if self.covariance:
            spread = (turn.T @ spread @ turn).unflatten(0, (-1, group))
            for member in range(group):  # one query head of each group at a time: no copy of the keys for every head
                logits[:, member] += (torch.matmul(keys, spread[:, member]) * keys).sum(-1) * (scaling**2 / 2)
        return logits.flatten(0, 1)


def _mean_rotation(ctx: Context, future: int, like: Tensor) -> Tensor:
    """[D, D], its rows the unit vectors turned by the mean rotation of the next positions: x @ it turns x."""
    import torch

    from kvcli.errors import KvcliError

    if ctx.rope is None:
        what = "this model has no rotary positions of the usual kind to look ahead with"
        raise KvcliError(what, given="--method expected_attention", fix="a model with RoPE, or another method")
    units = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    ahead = ctx.n + torch.arange(future, device=like.device)
    turned = ctx.rope.move(units[:, None].expand(-1, future, -1), torch.zeros_like(ahead), ahead)
    return turned.mean(1)
