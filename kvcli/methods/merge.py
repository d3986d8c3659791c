"""Merge: what an evictor drops is folded into what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcli.methods.base import Merge, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.context import Context


_AT_ONCE = 2048
"""Dropped keys compared at a time: all at once would need memory for the square of the prompt."""


class _OnlyWhere:
    """True on the class (it can be seeded), on an instance where its style draws."""

    def __get__(self, instance: Any, owner: Any) -> bool:
        return instance is None or instance.style == "cam"


@dataclass(frozen=True)
class MergeDropped(Merge):
    """`style=d2o`: a dropped pair goes to the kept pair of its KV head whose key has the largest cosine with its own,
    unless that cosine lies below the threshold: the layer's mean of these largest cosines. A kept pair becomes a
    weighted mean of itself and those that came to it, keys and values with the same weights: e for itself, exp(cosine)
    for each of the others (`weights=exp`).

    `style=cam`: values only. A dropped pair's value, divided by the number of receivers, is added to each kept value
    of the recent `window`, with the probability of its attention from the prompt's last query over the receivers' mean
    attention (at most 1). The draws are seeded per sample; a token's draw depends on neither ratio nor evictor.

    The last kept pair takes nothing: it is fed again as it is. Nothing is merged while generating.

    Source: d2o: arXiv:2406.13035, section 3.3, and the authors' code (AIoT-MLSys-Lab/D2O, D2O_LayerKVCache: cosine of
    rotated keys, nearest kept one, threshold from the mean of the largest cosines); cam: openreview LCTmppB165, section
    3, and the authors' code (zyxxmu/cam, local_cam_mask). Differs: nothing is merged while generating, so d2o's
    threshold is its first value and its moving average has no further steps; each KV head judges its own dropped pairs
    (the authors' code averages the i-th dropped pair of all heads, which are different tokens); `weights=cosine` is the
    authors' code (each pair multiplied by its cosine, then the plain mean with the kept one, which shortens keys), the
    default a true weighted mean, whose weights sum to one; cam's code merges a pair as it leaves the recent window into
    those behind it, here all dropped pairs leave at once, into the prompt's last ones; attention is averaged over the
    KV head's query heads; d2o's share of the budget per layer is the evictor's business.
    """

    name = "merge"
    title = "Merging (D2O, CaM)"
    paper = "arXiv:2406.13035"
    tier = 2
    phases = ("prefill",)
    protects = "the last token"
    seeded = _OnlyWhere()

    style: str = setting(
        "d2o", choices=("d2o", "cam"), help="d2o: keys and values by likeness; cam: values by attention"
    )
    weights: str = setting(
        "exp",
        choices=("exp", "cosine"),
        help="d2o: a true weighted mean or the authors' code",
        paper="exp; not confirmed; its code cosine",
    )
    window: int = setting(32, ge=2, help="cam: the newest prompt tokens that receive")

    def needs(self) -> frozenset[str]:
        return frozenset({"window:1"}) if self.style == "cam" else frozenset()

    def fold(self, ctx: Context, layer: int, kept: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        kept = [p.to(ctx.keys[layer].device) for p in kept]
        gone = [_others(p, ctx.n) if len(p) > 1 else p[:0] for p in kept]  # the last one alone takes nothing
        style = self._cam if self.style == "cam" else self._d2o
        return style(ctx, layer, kept, gone)

    def _d2o(
        self, ctx: Context, layer: int, kept: Sequence[Tensor], gone: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        import torch

        keys, values = ctx.keys[layer], ctx.values[layer]
        exact = torch.promote_types(keys.dtype, torch.float32)
        ways = torch.nn.functional.normalize(keys.to(exact), dim=-1)
        nearest = [_nearest(ways[h], p[:-1], g) for h, (p, g) in enumerate(zip(kept, gone, strict=True))]
        every = torch.cat([likeness for likeness, _ in nearest])
        threshold = every.double().mean().clamp_max(every.max()) if len(every) else every.sum()
        out = []
        for h, (likeness, target) in enumerate(nearest):
            near = likeness >= threshold
            source, likeness, target = gone[h][near], likeness[near], target[near]
            out.append(tuple(self._mean(x[h][kept[h]], x[h][source], likeness, target) for x in (keys, values)))
        return out  # type: ignore[return-value]

    def _mean(self, own: Tensor, others: Tensor, likeness: Tensor, target: Tensor) -> Tensor:
        """own [K, D] with others [m, D] folded in at target [m]."""
        import torch

        count = likeness.new_zeros(len(own)).index_add_(0, target, torch.ones_like(likeness))
        weight, first = (likeness.exp(), torch.e) if self.weights == "exp" else (likeness, 1.0)
        total = count if self.weights == "cosine" else torch.zeros_like(count).index_add_(0, target, weight)
        added = (weight[:, None] * others).to(likeness.dtype)
        summed = (own * first).to(likeness.dtype).index_add_(0, target, added)
        mean = (summed / (first + total)[:, None]).to(own.dtype)
        return torch.where((count > 0)[:, None], mean, own)

    def _cam(
        self, ctx: Context, layer: int, kept: Sequence[Tensor], gone: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        import torch

        keys, values = ctx.keys[layer], ctx.values[layer]
        exact = torch.promote_types(values.dtype, torch.float32)
        attention = ctx.per_kv_head(ctx.window_attention(layer, 1)[:, 0])
        draw = torch.rand(ctx.kv_heads, ctx.n, generator=ctx.generator("merge", layer)).to(attention.device)
        out = []
        for h, (positions, dropped) in enumerate(zip(kept, gone, strict=True)):
            takes = positions >= ctx.n - self.window
            takes[-1] = False
            receivers = positions[takes]
            chance = attention[h, dropped] / attention[h, receivers].mean()  # without receivers NaN: nothing is drawn
            merged = dropped[draw[h, dropped] < chance]
            share = values[h, merged].to(exact).sum(0) / max(1, len(receivers))
            own = values[h, positions]
            out.append((keys[h, positions], torch.where(takes[:, None], (own + share).to(own.dtype), own)))
        return out


def _others(positions: Tensor, n: int) -> Tensor:
    """Positions of the prompt that are not among these."""
    import torch

    left = torch.ones(n, dtype=torch.bool, device=positions.device)
    left[positions] = False
    return left.nonzero()[:, 0]


def _nearest(ways: Tensor, survivors: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """([m] cosines, [m] indices into survivors): each dropped one's nearest survivor. ways
    [n, D] of length one."""
    import torch

    if not len(gone):
        return ways.new_zeros(0), gone.new_zeros(0)
    found = [(ways[some] @ ways[survivors].T).max(-1) for some in gone.split(_AT_ONCE)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
