"""Merge: what an evictor drops is folded into what it keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcli.errors import KvcliError
from kvcli.methods.base import Merge, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating


_AT_ONCE = 2048
"""Dropped keys compared at a time: all at once would need memory for the square of the prompt."""


class _OnlyWhere:
    """True on the class (it can draw, it can read attention), on an instance where its style does."""

    def __get__(self, instance: Any, owner: Any) -> bool:
        return instance is None or instance.style == "cam"


@dataclass(frozen=True)
class MergeDropped(Merge):
    """`style=d2o`: a dropped pair goes to the kept pair of its KV head whose key has the largest cosine with its own,
    unless that cosine lies below the threshold: the layer's mean of these largest cosines. A kept pair becomes a
    weighted mean of itself and those that came to it, keys and values with the same weights: e for itself, exp(cosine)
    for each of the others (`weights=exp`). While generating, so is done with each pair that leaves, and the threshold
    is a moving average: at each eviction `beta` of the new mean and 1 - beta of what it was.

    `style=cam`: values only. A dropped pair's value, divided by the number of receivers, is added to each kept value
    of the recent `window`, with the probability of its attention from the newest query over the receivers' mean
    attention (at most 1). That query is the prompt's last, and the newest token's while generating. The draws are
    seeded per sample; a token's draw depends on neither ratio nor evictor nor batch.

    The prompt's last pair takes nothing from the prompt: it may be fed again as it is. While generating nothing is fed
    twice, so all pairs take, the newest too.

    Source: d2o: arXiv:2406.13035, token-level merging (equations 9 to 12; weights and threshold as a public reading of
    them has it, beta 0.7 by that and a note in the authors' code), and that code (AIoT-MLSys-Lab/D2O, D2O_LayerKVCache:
    cosine of rotated keys, nearest kept one, threshold from the mean of the largest cosines, moved at each eviction by
    alpha and beta, 0.5 each); cam: openreview LCTmppB165, section 3, and the authors' code
    (zyxxmu/cam, local_cam_mask). Differs: each KV head judges its own dropped pairs (the authors' code averages the
    i-th dropped pair of all heads, which are different tokens); `weights=cosine` is the authors' code (each pair
    multiplied by its cosine, then the plain mean with the kept one, which shortens keys), the default a true weighted
    mean, whose weights sum to one; where several pairs leave a layer at once, their mean cosine moves the threshold;
    cam's code merges a pair as it leaves the recent window into the 32 behind it, here the newest `window` tokens
    receive, whichever pair an evictor drops; its attention is that of the newest query alone (the authors' other script
    adds it up over queries); attention is averaged over the KV head's query heads; d2o's share of the budget per layer
    is the evictor's business.
    """

    name = "merge"
    title = "Merging (D2O, CaM)"
    paper = "arXiv:2406.13035"
    tier = 2
    phases = ("prefill", "decode")
    protects = "the last token"
    seeded = _OnlyWhere()
    decode_reads = _OnlyWhere()

    style: str = setting(
        "d2o", choices=("d2o", "cam"), help="d2o: keys and values by likeness; cam: values by attention"
    )
    weights: str = setting(
        "exp",
        choices=("exp", "cosine"),
        help="d2o: a true weighted mean or the authors' code",
        paper="exp; its code cosine",
    )
    beta: float = setting(
        0.7, ge=0, le=1, help="d2o: how far an eviction moves the threshold while generating", paper="0.7; its code 0.5"
    )
    window: int = setting(32, ge=2, help="cam: the newest tokens that receive", paper="32 in its code")

    def __post_init__(self) -> None:
        for name, style in (("weights", "d2o"), ("beta", "d2o"), ("window", "cam")):
            value = getattr(self, name)
            if value != getattr(type(self), name) and self.style != style:
                what = f"'{name}={value}' has no effect without style={style}"
                fix = f"merge:{name}={value}" if style == "d2o" else f"merge:style=cam,{name}={value}"
                raise KvcliError(what, given=f"--method merge:{name}={value}", fix=fix)

    def needs(self) -> frozenset[str]:
        return frozenset({"window:1"}) if self.style == "cam" else frozenset()

    def fold(self, ctx: Context, layer: int, kept: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        kept = [p.to(ctx.keys[layer].device) for p in kept]
        return self._cam(ctx, layer, kept) if self.style == "cam" else self._d2o(ctx, layer, kept)

    def _d2o(self, ctx: Context, layer: int, kept: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        links, threshold = _links(ctx, layer, kept)
        ctx.once(_key(layer, kept), lambda: threshold)
        out = []
        for h, (source, likeness, target) in enumerate(links):
            near = likeness >= threshold
            source, likeness, target = source[near], likeness[near], target[near]
            keys, values = (
                self._mean(x[h][kept[h]], x[h][source], likeness, target) for x in (ctx.keys[layer], ctx.values[layer])
            )
            out.append((keys, values))
        return out

    def _mean(self, own: Tensor, others: Tensor, likeness: Tensor, target: Tensor) -> Tensor:
        """own [K, D] with others [m, D] folded in at target [m]."""
        import torch

        count = likeness.new_zeros(len(own)).index_add_(0, target, torch.ones_like(likeness))
        weight, first = (likeness.exp(), torch.e) if self.weights == "exp" else (likeness, 1.0)
        total = count if self.weights == "cosine" else torch.zeros_like(count).index_add_(0, target, weight)
        added = (weight[:, None] * others).to(likeness.dtype)
        summed = (own.to(likeness.dtype) * first).index_add_(0, target, added)
        mean = (summed / (first + total)[:, None]).to(own.dtype)
        return torch.where((count > 0)[:, None], mean, own)

    def _cam(self, ctx: Context, layer: int, kept: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        import torch

        keys, values = ctx.keys[layer], ctx.values[layer]
        exact = torch.promote_types(values.dtype, torch.float32)
        attention = ctx.per_kv_head(ctx.window_attention(layer, 1)[:, 0])
        draw = torch.rand(ctx.kv_heads, ctx.n, generator=ctx.generator("merge", layer)).to(attention.device)
        out = []
        for h, positions in enumerate(kept):
            dropped = _dropped(positions, ctx.n)
            takes = positions >= ctx.n - self.window
            takes[-1] = False
            receivers = positions[takes]
            chance = attention[h, dropped] / attention[h, receivers].mean()  # without receivers NaN: nothing is drawn
            merged = dropped[draw[h, dropped] < chance]
            share = values[h, merged].to(exact).sum(0) / max(1, len(receivers))
            own = values[h, positions]
            out.append((keys[h, positions], torch.where(takes[:, None], (own + share).to(own.dtype), own)))
        return out

    def decodes(self) -> bool:
        return True

    def decode_facts(self, ctx: Context, layer: int, kept: Sequence[Tensor]) -> dict[str, Tensor]:
        """merge_key [H_kv] int64: what a head's draws are made of. merge_threshold [H_kv] float64: the layer's, the
        same in all its heads; NaN before its first eviction."""
        import torch

        if self.style == "cam":
            generator = ctx.generator("merge while generating", layer)
            return {"merge_key": torch.randint(1 << 62, (ctx.kv_heads,), generator=generator)}
        kept = [p.to(ctx.keys[layer].device) for p in kept]
        threshold = ctx.once(_key(layer, kept), lambda: _links(ctx, layer, kept)[1])
        return {"merge_threshold": torch.full((ctx.kv_heads,), threshold, dtype=torch.float64)}

    def decode_fold(self, view: Generating, gone: Tensor) -> None:
        from kvcli.methods import _folding

        leaving = gone.nonzero(as_tuple=True)
        if not len(leaving[0]):
            return
        if self.style == "cam":
            _folding.spread(view, gone, leaving, self.window)
        else:
            _folding.fold(view, gone, leaving, self.beta, self._mean)


Links = list[tuple["Tensor", "Tensor", "Tensor"]]
"""Per KV head of each dropped pair: its position, the cosine to its nearest kept key, and which kept pair that is."""


def _links(ctx: Context, layer: int, kept: Sequence[Tensor]) -> tuple[Links, float]:
    """Links, and the layer's mean of their cosines, NaN without any."""
    import torch

    keys = ctx.keys[layer]
    ways = torch.nn.functional.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    links = []
    for h, positions in enumerate(kept):
        dropped = _dropped(positions, ctx.n)
        links.append((dropped, *_nearest(ways[h], positions[:-1], dropped)))
    every = torch.cat([likeness for _, likeness, _ in links])
    mean = every.double().mean().clamp_max(every.max()) if len(every) else every.mean()
    return links, float(mean)


def _key(layer: int, kept: Sequence[Tensor]) -> tuple[str, int, str]:
    """Names the links of a layer: they depend on what is kept and on nothing else of the cell."""
    digest = hashlib.sha256()
    for positions in kept:
        digest.update(repr(positions.tolist()).encode())
    return "merge threshold", layer, digest.hexdigest()


def _dropped(positions: Tensor, n: int) -> Tensor:
    """Positions of the prompt that are not among these; none where only the last pair is there, which takes nothing."""
    import torch

    left = torch.full((n,), len(positions) > 1, dtype=torch.bool, device=positions.device)
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
