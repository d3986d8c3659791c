"""Kept ratio or size -> KV pairs per head, layer and model; and the one rule for protected tokens."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from kvcli.grammar import round_half_up


@dataclass(frozen=True)
class Budget:
    """How many KV pairs of an n-token prompt may stay. Totals bind at the method's declared scope.

    per_head: KV pairs per KV head and layer (the mean where a scope is wider than a head), 1 <= per_head <= n.
    """

    n: int
    per_head: int
    layers: int
    kv_heads: int
    strict_window: bool = False
    ratio: Decimal | None = None
    """The kept ratio asked for; None where --budget was."""

    @classmethod
    def of_ratio(cls, ratio: Decimal, n: int, layers: int, kv_heads: int, strict_window: bool = False) -> Budget:
        """round_half_up(ratio * n) on exact decimals, at least one."""
        size = max(1, round_half_up(ratio * n))
        return cls(n, min(n, size), layers, kv_heads, strict_window, ratio)

    @classmethod
    def of_size(cls, size: int, n: int, layers: int, kv_heads: int, strict_window: bool = False) -> Budget:
        return cls(n, min(n, max(1, size)), layers, kv_heads, strict_window)

    @property
    def layer_total(self) -> int:
        return self.per_head * self.kv_heads

    @property
    def model_total(self) -> int:
        return self.layer_total * self.layers

    def total(self, scope: str) -> int:
        """The number that binds: per head, per layer (all its KV heads) or per model."""
        return {"head": self.per_head, "layer": self.layer_total, "model": self.model_total}[scope]

    @property
    def requested_all(self) -> bool:
        """Whether the request itself was to keep everything, so that keeping all is no `noop`."""
        return self.ratio == 1

    @property
    def everything(self) -> bool:
        return self.per_head >= self.n

    def protect(self, window: int, sinks: int = 0) -> tuple[int, int, frozenset[str]]:
        """(window, sinks, flags): protected tokens take at most half of a head's budget, the window first.

        The newest token is always protected. A cut is flagged `fallback`; with strict_window nothing is cut and a
        set above the budget is flagged `over_budget`.
        """
        window, sinks = max(1, min(window, self.n)), min(sinks, max(0, self.n - window))
        if self.everything:
            return window, sinks, frozenset()
        if self.strict_window:
            over = window + sinks > self.per_head
            return window, sinks, frozenset({"over_budget"}) if over else frozenset()
        half = max(1, self.per_head // 2)
        fitted = min(window, half)
        few = min(sinks, max(0, half - fitted))
        cut = fitted < window or few < sinks
        return fitted, few, frozenset({"fallback"}) if cut else frozenset()


def share_out(weights: list[float], total: int, limits: list[int]) -> list[int]:
    """Whole numbers that add up to exactly min(total, sum(limits)), near the weights, none above its limit.

    Floors first, then the largest remainders (ties: the first); what a limit cuts off goes to the others.
    """
    total = min(total, sum(limits))
    parts = [min(max(0, int(w)), limit) for w, limit in zip(weights, limits, strict=True)]
    order = sorted(range(len(weights)), key=lambda i: (-(weights[i] - int(weights[i])), i))
    while sum(parts) < total:
        for i in order:
            if sum(parts) < total and parts[i] < limits[i]:
                parts[i] += 1
    while sum(parts) > total:
        for i in reversed(order):
            if sum(parts) > total and parts[i] > 0:
                parts[i] -= 1
    return parts
