"""Stored forms of low rank: factors made of one prompt, or coefficients of directions that belong to the model."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcli.methods._stores import Whole, payload_of

if TYPE_CHECKING:
    from kvcli.methods.base import Block
    from kvcli.models.rope import RopeHandle

Factors = tuple[Tensor, Tensor]
"""[K, r] and [r, W]: their product stands for a group's keys or values [K, W]."""


def rank_of(share: float, width: int) -> int:
    """A share of the width, .5 upwards on exact decimals."""
    return int((Decimal(str(share)) * width).to_integral_value(ROUND_HALF_UP))


def turned(rope: RopeHandle, keys: Tensor, by: Tensor) -> Tensor:
    """keys [h, K, D] rotated further by so many positions, [1, K] or [h, K]."""
    flat = by.expand(keys.shape[0], -1).flatten()
    return rope.move(keys.flatten(0, 1)[None], flat.new_zeros(len(flat)), flat)[0].view(keys.shape)


def side_by_side(pairs: Tensor, group: int) -> list[Tensor]:
    """[h, K, D] -> [K, group * D] for each group of neighbouring heads."""
    return [part.transpose(0, 1).flatten(1) for part in pairs.split(group)]


def apart(groups: list[Tensor], width: int) -> Tensor:
    """The opposite: [h, K, D]."""
    return torch.cat([x.unflatten(-1, (-1, width)).transpose(0, 1) for x in groups])


def factors_of(x: Tensor, share: float) -> Factors:
    """The best approximation of x [K, W] of rank r, a share of W."""
    rank = min(rank_of(share, x.shape[1]), *x.shape)
    exact = torch.promote_types(x.dtype, torch.float32)
    u, s, v = torch.linalg.svd(x.to(exact), full_matrices=False)
    return (u[:, :rank] * s[:rank]).to(x.dtype).clone(), v[:rank].to(x.dtype).clone()


def table_of(places: Tensor) -> Tensor | None:
    """Where keys are rotated to [1 or h, K], as it is stored; None for 0, 1, 2, ..."""
    in_order = bool((places == torch.arange(places.shape[1], device=places.device)).all())
    return None if in_order else places.to(torch.int32)


def places_of(table: Tensor | None, count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)[None] if table is None else table.long()


class Factored:
    """Factors of the prompt's keys before rotation and of its values; other pairs behind, whole. places: where the keys
    are rotated to."""

    def __init__(
        self, rope: RopeHandle, places: Tensor, keys: list[Factors], values: list[Factors], block: Block
    ) -> None:
        self.rope, self.keys, self.values = rope, keys, values
        self.part, self.widths = places.shape[1], (block.keys.shape[-1], block.values.shape[-1])
        self.places = table_of(places)
        self.rest = Whole(block.keys[:, self.part :], block.values[:, self.part :])

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.rest.append(keys, values)

    def dense(self) -> tuple[Tensor, Tensor]:
        keys, values = (
            apart([a @ b for a, b in factors], width)
            for factors, width in zip((self.keys, self.values), self.widths, strict=True)
        )
        keys = turned(self.rope, keys, places_of(self.places, self.part, keys.device))
        return torch.cat([keys, self.rest.keys], 1), torch.cat([values, self.rest.values], 1)

    def payload(self) -> int:
        return payload_of(self.tensors())

    def tensors(self) -> list[Tensor]:
        factors = [x for pair in (*self.keys, *self.values) for x in pair]
        return factors + ([] if self.places is None else [self.places]) + self.rest.tensors()


class Projected:
    """Coefficients of all pairs, new ones too. bases: of keys and of values, `kvcli.models.directions.Basis` for each
    group of heads: the model's, not stored here. places: where the first keys are rotated to; those behind them are the
    tokens `last`, last + 1, ..."""

    def __init__(
        self, rope: RopeHandle, places: Tensor, last: int, bases: tuple[list[Any], list[Any]], block: Block
    ) -> None:
        self.rope, self.last, self.bases = rope, last, bases
        self.part, self.widths = places.shape[1], (block.keys.shape[-1], block.values.shape[-1])
        self.places = table_of(places)
        self.keys, self.values = self._coefficients(block.keys[:, :0], block.values[:, :0], places[:, :0])
        behind = torch.arange(last, last + block.keys.shape[1] - self.part, device=places.device)
        self._add(block.keys, block.values, torch.cat([places, behind.expand(places.shape[0], -1)], 1))

    def append(self, keys: Tensor, values: Tensor) -> None:
        place = self.last + self.keys[0].shape[0] - self.part
        self._add(keys, values, torch.full((1, 1), place, device=keys.device))

    def dense(self) -> tuple[Tensor, Tensor]:
        keys, values = (
            apart([_read(x, basis) for x, basis in zip(stored, bases, strict=True)], width)
            for stored, bases, width in zip((self.keys, self.values), self.bases, self.widths, strict=True)
        )
        first = places_of(self.places, self.part, keys.device)
        behind = torch.arange(self.last, self.last + keys.shape[1] - self.part, device=keys.device)
        places = torch.cat([first, behind.expand(first.shape[0], -1)], 1)
        return turned(self.rope, keys, places), values

    def payload(self) -> int:
        return payload_of(self.tensors())

    def tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values, *([] if self.places is None else [self.places])]

    def _add(self, keys: Tensor, values: Tensor, places: Tensor) -> None:
        new = self._coefficients(keys, values, places)
        self.keys, self.values = (
            [torch.cat(pair) for pair in zip(old, more, strict=True)]
            for old, more in zip((self.keys, self.values), new, strict=True)
        )

    def _coefficients(self, keys: Tensor, values: Tensor, places: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        before = turned(self.rope, keys, -places)
        return _projected(before, self.bases[0]), _projected(values, self.bases[1])


def _projected(pairs: Tensor, bases: list[Any]) -> list[Tensor]:
    """[K, r] for each group of heads."""
    sizes = [basis.directions.shape[0] // pairs.shape[-1] for basis in bases]
    groups = [part.transpose(0, 1).flatten(1) for part in pairs.split(sizes)]
    return [_coefficients(x, basis) for x, basis in zip(groups, bases, strict=True)]


def _coefficients(x: Tensor, basis: Any) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    away = x.to(exact) if basis.offset is None else x.to(exact) - basis.offset.to(exact)
    return (away @ basis.directions.to(exact)).to(x.dtype)


def _read(coefficients: Tensor, basis: Any) -> Tensor:
    """[K, W]."""
    whole: Tensor = coefficients @ basis.directions.T
    return whole if basis.offset is None else whole + basis.offset
