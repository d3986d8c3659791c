"""Quest: pages of keys that may matter to the query are read, the others stay where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods.base import Reader, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class Quest(Reader):
    """Each new token reads the `tokens` / `page` pages with the largest upper bound of a key's product with its query.

    A page's bound is the sum over channels of the larger of query times the page's least and query times its greatest
    key value. The first `dense_layers` layers read everything, the others at least `least` pages. Nothing is freed:
    stored bytes stay those of the full cache, flagged `simulated`; what is read per token is recorded, the pages'
    least and greatest values included. Source: arXiv:2406.10774, section 3, and its evaluation code. Differs: query
    heads that share a KV head choose for themselves, as in the code, and a page that any of them reads counts as read;
    where all pages fit, all are read (the code drops a last, unfinished one). The bounds, about 1/`page` of the keys,
    are not counted among the stored bytes.
    """

    name = "quest"
    title = "Quest"
    paper = "arXiv:2406.10774"
    tier = 2
    protects = "every pair (nothing is freed)"

    tokens: int = setting(1024, ge=1, help="pairs read per new token, layer and head")
    page: int = setting(16, ge=1, help="tokens per page", paper="16")
    least: int = setting(3, ge=1, help="pages read at least", paper="3 in its code")
    dense_layers: int = setting(2, ge=0, help="first layers that read everything", paper="2")

    def select(self, ctx: Context, budget: Budget) -> Selection:
        kept = super().select(ctx, budget)
        pages = -(-ctx.n // self.page)
        short = ctx.layers <= self.dense_layers or self._pages(pages) >= pages
        kept.flags = frozenset({"simulated", "noop"} if short else {"simulated"})
        return kept

    def _pages(self, there: int) -> int:
        return min(max(self.least, self.tokens // self.page), there)

    def read(self, layer: int, query: Tensor, keys: Tensor, filled: Tensor) -> Tensor | None:
        import torch
        import torch.nn.functional as F

        most = -(-keys.shape[2] // self.page)
        if layer < self.dense_layers or self._pages(most) >= most:
            return None
        exact = torch.promote_types(keys.dtype, torch.float32)
        slots = keys.shape[2]
        more = -slots % self.page
        keys = F.pad(keys.to(exact), (0, 0, 0, more)).unflatten(2, (-1, self.page))
        there = F.pad(filled, (0, more)).unflatten(2, (-1, self.page))
        low = keys.masked_fill(~there[..., None], float("inf")).amin(3)
        high = keys.masked_fill(~there[..., None], float("-inf")).amax(3)
        empty = ~there.any(-1)
        q = query.to(exact).unflatten(1, (keys.shape[1], -1))  # [R, H_kv, G, D]
        low, high = (x.masked_fill(empty[..., None], 0.0).transpose(2, 3) for x in (low, high))
        bound = (q.clamp_min(0) @ high + q.clamp_max(0) @ low).masked_fill(empty[:, :, None], float("-inf"))
        count = torch.tensor([[self._pages(int(n)) for n in row] for row in (~empty).sum(-1).tolist()])
        order = bound.argsort(dim=-1, descending=True, stable=True)
        taken = torch.arange(order.shape[-1], device=keys.device) < count.to(keys.device)[:, :, None, None]
        pages = torch.zeros_like(bound, dtype=torch.bool).scatter(-1, order, taken.expand_as(order))
        return pages.repeat_interleave(self.page, -1)[..., :slots].flatten(1, 2)

    def looked_at(self, pairs: Tensor, width: int) -> Tensor:
        """The least and the greatest value of each channel of each page."""
        return (pairs / self.page).ceil() * 2 * width
