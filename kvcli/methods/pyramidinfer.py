"""PyramidInfer: tokens drop out layer by layer while the prompt is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvcli.methods.base import Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class Pyramid:
    """What is settled before a prompt is read.

    sizes: tokens that enter each layer, and so its KV pairs per head. recent: newest tokens, which stay in all layers.
    weights [recent] float32: how much each of their queries counts.
    """

    sizes: list[int]
    recent: int
    weights: Tensor
    flags: frozenset[str] = frozenset()
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PyramidInfer(Method):
    """Behind each layer the older tokens that the newest ones attend to least leave the prefill.

    The score is the attention of the prompt's newest fifth, averaged over heads, with weights rising from 1 to 1.2
    over these queries; they stay in all layers, and the first 4 tokens before all others. Layer l hands on the share
    p + (1 - p) w(l) of its older tokens, w falling from 1 to 0 as a cosine over the layers, and never fewer than 64.
    A layer caches what entered it, so the first is whole. Source: arXiv:2405.12532 and its code (p = 0.9 for the 7B
    and 8B models: a mean of 0.76 over 32 layers at 900 tokens). Differs: p is solved so that the mean over layers is
    the kept ratio exactly; where p = 0 keeps too much, every layer hands on t times that share, t falling from 1 to 0;
    below that, newest share and 64 shrink together (`fallback`). A ratio below what the whole first layer takes is
    `unreachable` and `over_budget`: the other layers keep the last token. A layer that would fall below 64 is cut to
    64, in the code it hands on all it has.
    """

    name = "pyramidinfer"
    title = "PyramidInfer"
    paper = "arXiv:2405.12532"
    tier = 1
    kind = "in-prefill"
    budget_scope = "model"
    sharing = 3
    protects = "the newest fifth of the prompt"

    recent: float = setting(
        0.2, ge=0.0, le=1.0, help="share of newest tokens, which vote and stay in every layer", paper="0.2"
    )
    context: int = setting(64, ge=0, help="older tokens every layer keeps at least")
    sinks: int = setting(4, ge=0, help="first tokens, which stay before other older ones")
    weight: float = setting(
        1.2, ge=0.0, help="how much the newest query counts; the oldest that votes counts 1", paper="1.2"
    )
    interval: int = setting(
        1,
        ge=1,
        help="layers from one cut to the next; 3 in the authors' 70B models",
        paper="1; 3 in the authors' 70B models",
    )

    def select(self, ctx: Context, budget: Budget) -> Selection:
        raise NotImplementedError("pyramidinfer selects inside a prefill of its own")

    def prefill_start(self, budget: Budget) -> Pyramid:
        """Layer sizes, whose sum is the budget's total, and who votes."""
        import torch

        from kvcli.cache.budget import share_out

        n, layers, total = budget.n, budget.layers, budget.per_head * budget.layers
        recent = 1 + min(int(self.recent * n), n - 1)  # the last token, and the share, as in the authors' code
        least = min(self.context, n - recent)
        floor = n + (layers - 1) * (recent + least)
        flags: frozenset[str] = frozenset()
        notes: dict[str, Any] = {}
        if total < floor and not budget.strict_window:
            flags = frozenset({"fallback"} if total >= n + layers - 1 else {"fallback", "unreachable", "over_budget"})
            total = max(total, n + layers - 1)
            size = max(1.0, (total - n) / max(1, layers - 1))
            recent = 1 + int((recent - 1) * (size - 1) / max(1, recent - 1 + least))
            ideal = [float(n)] + [size] * (layers - 1)
        else:
            flags = frozenset({"over_budget"}) if total < floor else flags
            total = max(total, floor)
            depth = _solved(lambda x: recent * layers + sum(_older(x, n - recent, least, layers, self.interval)), total)
            ideal = [recent + older for older in _older(depth, n - recent, least, layers, self.interval)]
            notes = {"share": round(max(depth, 0.0), 6), "scale": round(1 + min(depth, 0.0), 6)}
        sizes = share_out(ideal, total, [n] * layers)
        return Pyramid(sizes, recent, torch.linspace(1.0, self.weight, recent), flags, {**notes, "recent": recent})

    def prefill_keep(self, layer: int, received: Tensor, positions: Tensor, state: Pyramid) -> Tensor:
        """Sorted indices of the tokens that go on behind a layer; the last one is among them.

        received [H, m] float32: the attention each of the layer's m tokens got from the newest queries, summed with
        `state.weights`. positions [m]: where these tokens stand in the prompt.
        """
        import torch

        from kvcli.cache.select import join, top_positions

        m, going = received.shape[1], state.sizes[layer + 1]
        older = m - state.recent
        score = received[:, :older].mean(0)
        score[: self.sinks] = float("inf")
        return join(top_positions(score, going - state.recent), torch.arange(older, m))


def _older(depth: float, older: int, least: int, layers: int, interval: int) -> list[float]:
    """Older tokens that enter each layer. depth 0..1: the authors' p; -1..0: p = 0 and all shares times 1 + depth."""
    share, scale = max(depth, 0.0), 1 + min(depth, 0.0)
    entering = [float(older)]
    for layer in range(layers - 1):
        wave = (1 + math.cos(math.pi * layer / layers)) / 2
        handed = scale * (share + (1 - share) * wave) if layer % interval == 0 else 1.0
        entering.append(max(float(least), handed * entering[-1]))
    return entering


def _solved(total_of: Callable[[float], float], total: int) -> float:
    """The depth in -1..1 whose total is `total`, or just below it; `total_of` rises with the depth."""
    low, high = -1.0, 1.0
    if total_of(high) <= total:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if total_of(middle) <= total else (low, middle)
    return low
