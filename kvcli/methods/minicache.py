"""MiniCache: two neighbouring layers share the directions of their keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from kvcli.methods.base import Block, Stored, Transform, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.context import Context


@dataclass(frozen=True)
class MiniCache(Transform):
    """From the layer at `start` (a share of the depth) on, each layer and the next one store one direction per token
    and KV head for their keys, and one for their values: the point at `t` on the arc from the first layer's direction
    to the second's. Each layer adds its own lengths.

    Tokens whose two directions are far apart are stored as they are in both layers: those whose angle lies within the
    share `gamma` of the range between the smallest and the largest angle, from the largest down. The prompt's last pair
    and generated ones are kept whole.

    Source: arXiv:2405.14366, sections 4.1 to 4.3; start at half of the depth as the authors' page has it
    (AkideLiu/MiniCache), gamma 0.05 as a public summary of their table of thresholds has it (neurips.cc/virtual/2024,
    poster 93380; more gamma keeps more tokens), t 0.6 as a public guide to reproducing it has it; the authors published
    no code. Differs: the inequality that picks the unmerged tokens is this project's reading of the abstract's "highly
    distinct" pairs (a public transcription of the formula counts from the smallest angle up, which would keep the most
    similar ones); directions are taken per KV head, each
    with its own range of angles, because heads are read separately; generated pairs are not merged, because a layer's
    pair is read before the next layer's exists; where a method evicted before it, both layers must hold the same
    tokens, so evictors whose layers choose apart are refused.
    """

    name = "minicache"
    title = "MiniCache"
    paper = "arXiv:2405.14366"
    tier = 2
    phases = ("prefill",)
    protects = "the shallow layers, the last token and generated ones, whole"

    start: float = setting(
        0.5, ge=0, le=1, help="depth from which layers are merged in pairs", paper="half of the depth"
    )
    t: float = setting(
        0.6,
        ge=0,
        le=1,
        help="where between the two directions: 0 the first layer's, 1 the second's",
        paper="0.6",
    )
    gamma: float = setting(
        0.05, ge=0, le=1, help="share of the range of angles whose tokens stay unmerged", paper="0.05"
    )

    @property
    def across_layers(self) -> bool:
        """Whether layers are stored together, which then must hold the same tokens."""
        return self.start < 1

    def check(self, ctx: Context, counts: Sequence[Sequence[int]]) -> None:
        for first in self._firsts(len(counts)):
            if list(counts[first]) != list(counts[first + 1]):
                raise _unequal(first)

    def _firsts(self, layers: int) -> range:
        """The first layer of each pair."""
        return range(int(Decimal(str(self.start)) * layers), layers - 1, 2)

    def store(self, ctx: Context, layers: Sequence[Sequence[Block]]) -> list[list[Stored]]:
        import torch

        from kvcli.methods._stores import Whole, counts_of

        self.check(ctx, counts_of(layers))
        stores: list[list[Stored]] = [[] for _ in layers]
        for first in self._firsts(len(layers)):
            for a, b in zip(layers[first], layers[first + 1], strict=True):
                if not torch.equal(a.positions, b.positions):
                    raise _unequal(first)
                for made, store in zip(stores[first : first + 2], self._pair(ctx, a, b), strict=True):
                    made.append(store)
        return [made or [Whole(b.keys, b.values) for b in blocks] for made, blocks in zip(stores, layers, strict=True)]

    def _pair(self, ctx: Context, a: Block, b: Block) -> tuple[Stored, Stored]:
        from kvcli.methods._stores import settled

        part = settled(ctx, a)
        keys = self._merged(a.keys[:, :part], b.keys[:, :part])
        values = self._merged(a.values[:, :part], b.values[:, :part])
        return _Store(a, keys, values, 0), _Store(b, keys, values, 1)

    def _merged(self, a: Tensor, b: Tensor) -> _Merged:
        import torch

        exact = torch.promote_types(a.dtype, torch.float32)
        both = torch.stack([a, b]).to(exact)
        lengths = both.norm(dim=-1)
        one, two = both / lengths.clamp_min(torch.finfo(exact).tiny)[..., None]
        angle = (one * two).sum(-1).clamp(-1, 1).arccos()
        share = angle.new_tensor([1 - self.t, self.t])[:, None, None]
        sine = angle.sin()
        weight = torch.where(sine > 1e-6, (share * angle).sin() / sine.clamp_min(1e-6), share)[..., None]
        directions = weight[0] * one + weight[1] * two
        apart = torch.zeros_like(angle, dtype=torch.bool)
        if angle.shape[1]:
            low, high = angle.amin(1, keepdim=True), angle.amax(1, keepdim=True)
            apart = angle > high - self.gamma * (high - low)
        index = apart.flatten().nonzero()[:, 0]
        rows = torch.stack([a, b]).flatten(1, 2)[:, index]
        return _Merged(directions.to(a.dtype), index.to(torch.int32), lengths.to(a.dtype), rows)


def _unequal(first: int) -> ValueError:
    return ValueError(
        f"minicache merges layers that hold the same tokens: layers {first} and {first + 1} kept different ones"
    )


@dataclass
class _Merged:
    """directions [h, P, D] and index [m] (flat, of the tokens that stay unmerged) belong to both layers; lengths
    [2, h, P] and rows [2, m, D] to one each."""

    directions: Tensor
    index: Tensor
    lengths: Tensor
    rows: Tensor


@dataclass
class _Half:
    """One layer's part of what two layers share."""

    directions: Tensor
    index: Tensor
    lengths: Tensor
    rows: Tensor

    def dense(self) -> Tensor:
        x = self.directions * self.lengths[..., None]
        x.flatten(0, 1).index_copy_(0, self.index.long(), self.rows)
        return x


class _Store:
    """One layer of two. The first one counts what both share."""

    def __init__(self, block: Block, keys: _Merged, values: _Merged, which: int) -> None:
        from kvcli.methods._stores import Whole

        self.halves = [
            _Half(x.directions, x.index, x.lengths[which].clone(), x.rows[which].clone()) for x in (keys, values)
        ]
        self.first = which == 0
        part = keys.directions.shape[1]
        self.rest = Whole(block.keys[:, part:], block.values[:, part:])

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.rest.append(keys, values)

    def dense(self) -> tuple[Tensor, Tensor]:
        import torch

        keys, values = (half.dense() for half in self.halves)
        return torch.cat([keys, self.rest.keys], 1), torch.cat([values, self.rest.values], 1)

    def payload(self) -> int:
        from kvcli.methods._stores import payload_of

        return payload_of(self.tensors())

    def tensors(self) -> list[Tensor]:
        shared = [x for half in self.halves for x in (half.directions, half.index)] if self.first else []
        return shared + [x for half in self.halves for x in (half.lengths, half.rows)] + self.rest.tensors()
