"""A method in a package of its own: tokens at equal distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcli import Method, Selection, setting


@dataclass(frozen=True)
class EveryOther(Method):
    """The newest tokens and, before them, tokens at equal distances."""

    name = "every_other"
    title = "Every other"

    recent: int = setting(8, ge=1, help="newest tokens, always kept")

    def select(self, ctx: Any, budget: Any) -> Selection:
        import torch

        recent, _, flags = budget.protect(self.recent)
        before = budget.per_head - recent
        spread = torch.arange(before) * (ctx.n - recent) // max(1, before)
        kept = torch.cat([spread, torch.arange(ctx.n - recent, ctx.n)])
        return Selection([kept] * ctx.layers, flags)
