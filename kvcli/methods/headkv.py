"""HeadKV: SnapKV's choice with more room for the heads that retrieve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcli.methods._heads import kv_scores, profile_need
from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class HeadKV(Method):
    """SnapKV scores under head budgets that follow how much each head retrieves; their sum is the model's budget.

    With f = budget - window per head, every head keeps the window and f - f / beta others; the f / beta of all heads
    are one pool, shared out over all layers and heads by score^temp, and what a head cannot hold goes to the others by
    the same shares. The scores come from `kvcli profile-heads` (HeadKV-R2: attention to the needle while the model
    answers from it), or from the file `profile=`. Source: arXiv:2410.19258, section 3, and the authors' code
    (FYYFU/HeadKV, snapkv_utils.py and retrieval_head_detection_r2.py). Differs: one set per KV head, with the mean
    score of its query heads (`head_reduce=max`: the largest), the code keeps one per query head; shares are exact, with
    largest remainders, instead of integer division and rounding; the window, inside the budget as in the code, is cut
    to half of it; the authors ship scores for two models, made from prompts that need a reasoning step.
    """

    name = "headkv"
    title = "HeadKV"
    paper = "arXiv:2410.19258"
    tier = 2
    budget_scope = "model"
    protects = "the observation window, at most half of the mean budget"

    window: int = setting(32, ge=1, help="last queries that vote, always kept")
    kernel: int = setting(7, ge=1, odd=True, help="pooling width")
    pool: str = setting("max", choices=("max", "avg"), help="pooling over neighbours")
    reduce: str = setting("mean", choices=("mean", "max"), help="how query heads of a KV head share one score of a key")
    beta: float = setting(
        1.005, ge=1.0, help="a head's own part is f - f / beta; the rest is shared out", paper="1.005 in its scripts"
    )
    temp: float = setting(1.0, ge=0.0, help="sharpness of the shares; 0 shares evenly", paper="1 in its scripts")
    head_reduce: str = setting("mean", choices=("mean", "max"), help="a KV head's profile score from its query heads'")
    profile: str = setting("", help="file of kvcli profile-heads, instead of the model's own")

    def needs(self) -> frozenset[str]:
        return frozenset({f"window:{self.window}", profile_need(self.profile)})

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        from kvcli.cache.budget import share_out

        window, _, flags = budget.protect(self.window)
        count, most = ctx.layers * ctx.kv_heads, ctx.n - window
        free = max(0, budget.per_head - window)
        scores = kv_scores(ctx.extra(profile_need(self.profile)), ctx, self.head_reduce)
        ideal = head_sizes([x for row in scores for x in row], free, most, self.beta, self.temp)
        sizes = share_out(ideal, free * count, [most] * count)
        newest = torch.arange(most, ctx.n)
        kept = []
        for layer in range(ctx.layers):
            mine = sizes[layer * ctx.kv_heads : (layer + 1) * ctx.kv_heads]
            orders = zip(self._order(ctx, layer, window), mine, strict=True)
            kept.append([torch.cat([order[:size].sort().values, newest]) for order, size in orders])
        return Selection(kept, flags)

    def _order(self, ctx: Context, layer: int, window: int) -> Tensor:
        """[H_kv, n - window] positions, the best first; of equal ones the first."""
        from kvcli.methods._window import snap_scores

        def make() -> Tensor:
            import torch

            scores = snap_scores(ctx, layer, window, self.kernel, self.pool, self.reduce)
            return torch.sort(scores, dim=-1, descending=True, stable=True).indices.cpu()

        key: Any = ("headkv order", layer, window, self.kernel, self.pool, self.reduce)
        return ctx.once(key, make)


def head_sizes(scores: Sequence[float], free: int, most: int, beta: float, temp: float) -> list[float]:
    """Keys beyond the window for each head, not yet whole numbers: their sum is free * heads, none is above `most`.

    The largest score is taken as 1 first, so that no power overflows. Rounded to 9 places, so that equal shares tie.
    """
    count, top = len(scores), max(scores)
    weights = [(x / top) ** temp if top > 0 else 1.0 for x in scores]
    own, pool = free - free / beta, free / beta * count
    sizes = [own] * count
    open_heads = list(range(count))
    while open_heads and pool > 0:
        whole = sum(weights[i] for i in open_heads)
        share = {i: pool * weights[i] / whole if whole > 0 else pool / len(open_heads) for i in open_heads}
        full = [i for i in open_heads if sizes[i] + share[i] >= most]
        if not full:
            sizes = [size + share.get(i, 0.0) for i, size in enumerate(sizes)]
            break
        for i in full:
            pool -= most - sizes[i]
            sizes[i] = float(most)
        open_heads = [i for i in open_heads if i not in full]
    return [round(size, 9) for size in sizes]
