"""PyramidInfer: tokens drop out layer by layer while the prompt is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvcli.methods.base import Domain, Method, Selection, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating


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

    @property
    def facts(self) -> dict[str, int]:
        return {"recent": self.recent}


@dataclass(frozen=True)
class PyramidInfer(Method):
    """Behind each layer the older tokens that the newest ones attend to least leave the prefill.

    The score is the attention of the prompt's newest fifth, averaged over heads, with weights rising from 1 to 1.2
    over these queries; they stay in all layers, and the first 4 tokens before all others. Layer l hands on the share
    p + (1 - p) w(l) of its older tokens, w falling from 1 to 0 as a cosine over the layers, and never fewer than 64.
    A layer caches what entered it, so the first is whole. While generating, the newest tokens slide on, as many as in
    the prompt, and each layer keeps of the older pairs those that they attend to most, with the same weights; its pool
    begins with its own size. Source: arXiv:2405.12532 and its code (p = 0.9 for the 7B and 8B models: a mean of 0.76
    over 32 layers at 900 tokens). Differs: p is solved so that the mean over layers is the kept ratio exactly; where
    p = 0 keeps too much, every layer hands on t times that share, t falling from 1 to 0; below that, newest share and
    64 shrink together (`fallback`). A ratio below what the whole first layer takes is `unreachable` and `over_budget`:
    the other layers keep the last token. A layer that would fall below 64 is cut to 64, in the code it hands on all it
    has. While generating, all older pairs compete, the first 4 last, and the cap of `--decode-ratio` holds in every
    layer; the code thins out 16 tokens at a time as they leave the newest share, which grows with the text there (0.9
    of them stay in the first layer, 0.1 in the last), and never looks at older pairs again.

    Memory while generating: 4 bytes per pair of a layer and newest token, for all its heads together: at 4,096 tokens
    about 80 % of what an 8B model's pairs take. It is in `alloc_bytes`, not in the bytes of the kept pairs.
    """

    name = "pyramidinfer"
    title = "PyramidInfer"
    paper = "arXiv:2405.12532"
    tier = 1
    phases = ("prefill", "decode")
    kind = "in-prefill"
    budget_scope = "model"
    domain = Domain(floor="(n + layers - 1) / (n layers), the whole first layer and a token in each other one,")
    sharing = 3
    protects = "the newest fifth of the prompt"
    decoding = "unified"
    decode_as_selected = True

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
            flags, lowest = frozenset({"fallback"}), n + layers - 1
            if total < lowest:
                flags |= {"unreachable", "over_budget"}
                notes["nearest_ratio"] = math.ceil(1e4 * -(-lowest // layers) / n) / 1e4
            total = max(total, lowest)
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

    def prefill_state(self, layer: int, recent: Tensor, positions: Tensor, state: Pyramid) -> dict[str, Tensor]:
        """recent [1, m, w]: a ring of what the last w queries gave to each key; query i's place is i mod w.

        recent [w, m]: the attention of the newest queries, averaged over heads; positions [m].
        """
        import torch

        last = int(positions[-1])
        queries = torch.arange(last - len(recent) + 1, last + 1, device=recent.device)
        return {"recent": recent[(queries % len(recent)).argsort()].T[None]}

    def decode_update(self, view: Generating) -> None:
        """The newest query's attention takes the place of the oldest one's."""
        assert view.attention is not None
        ring, size = view.state["recent"], view.facts["recent"][:, :1, None]
        place = (view.newest % size)[..., None].expand(*ring.shape[:3], 1)
        fresh = view.attention.mean(1, keepdim=True).to(ring.dtype)[..., None]
        ring.scatter_(-1, place, fresh.where(view.counts[..., None], ring.gather(-1, place)))

    def decode_rank(self, view: Generating) -> Tensor:
        import torch

        ring, position, size = view.state["recent"], view.position[:, :1], view.facts["recent"][:, :1, None]
        place = torch.arange(ring.shape[-1], device=ring.device)
        step = (size - 1 - (view.newest - place) % size).to(ring.dtype)  # 0: the oldest query that votes
        weights = 1 + (self.weight - 1) * step / (size - 1).clamp_min(1)
        weights = weights.masked_fill(place >= size, 0)  # of a row with fewer voters
        score = (ring @ weights[..., None])[..., 0]
        score = score.masked_fill((position >= 0) & (position < self.sinks), torch.finfo(score.dtype).max)
        return view.all_heads_alike(score.masked_fill(position > view.newest - size, float("inf")))


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
