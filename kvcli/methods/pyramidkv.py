"""PyramidKV: SnapKV's choice with more room in low layers than in high ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.methods._window import WindowMethod
from kvcli.methods.base import setting

if TYPE_CHECKING:
    from kvcli.cache.budget import Budget


@dataclass(frozen=True)
class PyramidKV(WindowMethod):
    """SnapKV scores under layer budgets that fall linearly; their sum is exactly the model's budget.

    With f = budget - window per layer, the last layer keeps f / beta and the first 2f - f / beta beyond the window;
    where that is more than the prompt has, the first keeps all and the last the rest. Source: arXiv:2406.02069,
    section 4.2. Differs: largest remainders instead of integer division, which inflates or loses tokens in public code.
    """

    name = "pyramidkv"
    title = "PyramidKV"
    paper = "arXiv:2406.02069"
    tier = 1
    budget_scope = "model"
    protects = "the observation window, at most half of the mean budget"

    window: int = setting(8, ge=1, help="last queries that vote, always kept", paper="8")
    beta: float = setting(20.0, ge=1.0, help="how much smaller the last layer's budget is than the mean", paper="20")

    def sizes(self, budget: Budget, newest: int, sinks: int) -> list[int]:
        """Keys kept beyond the window in each layer; the sum is layers * (budget - window)."""
        from kvcli.cache.budget import share_out

        free, most, layers = max(0, budget.per_head - newest), budget.n - newest, budget.layers
        last = free / self.beta
        first = 2 * free - last
        if first > most:
            first, last = most, 2 * free - most
        step = (first - last) / (layers - 1) if layers > 1 else 0.0
        ideal = [first - i * step for i in range(layers)] if layers > 1 else [float(free)]
        return share_out(ideal, free * layers, [most] * layers)
