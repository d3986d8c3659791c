"""KeyDiff: the keys that differ most from the mean direction of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.errors import KvcliError
from kvcli.methods._ranked import RankedMethod
from kvcli.methods.base import Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class KeyDiff(RankedMethod):
    """Keys least similar to the anchor stay: the mean of the unit keys of a KV head, similarity being the cosine.

    With `block` the prompt goes through the cache in blocks of so many tokens: after each block in which it outgrows
    the budget, the anchor is taken over what is in the cache, and the keys nearest to it leave for good. Source:
    arXiv:2504.15364, section 3 (score -cos(mean of k / |k|, k); no protected tokens). Differs: by default all keys are
    ranked at once behind the prompt, so that one dense prefill serves all methods; with `block` keys and values come
    from a dense prefill too, in the paper a block already attends to the pruned cache. The newest token always stays.
    Cosines are float32 at least; a zero key has cosine 0.
    """

    name = "keydiff"
    title = "KeyDiff"
    paper = "arXiv:2504.15364"
    tier = 2
    signed = True

    block: int = setting(
        0, ge=0, help="tokens per block of the paper's iterative form; 0 ranks the whole prompt once", paper="blocks"
    )

    @property
    def iterative(self) -> bool:
        """Whether it evicts in steps, so that one score per key does not say what stays."""
        return self.block > 0

    def scores(self, ctx: Context, layer: int, newest: int, sinks: int) -> Tensor:
        if self.iterative:
            what = "keydiff with block= evicts in steps and has no one score per key for another method"
            raise KvcliError(what, given=f"base=keydiff,base.block={self.block}", fix="base=keydiff")
        similar = ctx.once(("similarity to the anchor", layer), lambda: _similarity(_unit(ctx.keys[layer])))
        return -similar[:, sinks : ctx.n - newest]

    def select(self, ctx: Context, budget: Budget) -> Selection:
        if not self.iterative:
            return super().select(ctx, budget)
        return Selection([self._kept(_units(ctx, layer), budget.per_head) for layer in range(ctx.layers)])

    def _kept(self, units: Tensor, size: int) -> Tensor:
        """[H_kv, size] positions; units [H_kv, n, D]: keys of length 1."""
        import torch

        from kvcli.cache.select import top_positions

        heads, n, width = units.shape
        kept = torch.empty(heads, 0, dtype=torch.long)
        for start in range(0, n, self.block):
            end = min(start + self.block, n)
            kept = torch.cat([kept, torch.arange(start, end).expand(heads, -1)], 1)
            if kept.shape[1] > size:
                index = kept.to(units.device)[..., None].expand(-1, -1, width)
                score = -_similarity(units.gather(1, index))
                if end == n:
                    score[:, -1] = float("inf")
                kept = kept.gather(1, top_positions(score, size))
        return kept


def _units(ctx: Context, layer: int) -> Tensor:
    return ctx.once(("unit keys", layer), lambda: _unit(ctx.keys[layer]))


def _unit(keys: Tensor) -> Tensor:
    """Keys of length 1, float32 at least; a zero key stays zero."""
    import torch

    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1)


def _similarity(units: Tensor) -> Tensor:
    """[H_kv, m]: cosine between each unit key and the mean of all m."""
    import torch

    anchor = torch.nn.functional.normalize(units.mean(1), dim=-1)
    return (units @ anchor[..., None]).squeeze(-1)
