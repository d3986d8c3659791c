"""Affine quantisation of groups to a few bits, and codes packed into bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


def affine(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 like x, scale, low): x is about low + scale * code, each group (all of `dim`) between its smallest
    and its largest element. scale and low have x's dtype; the codes are rounded against them as they are stored."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    exact = torch.promote_types(x.dtype, torch.float32)
    scale = ((high.to(exact) - low.to(exact)) / (2**bits - 1)).to(x.dtype)
    step = scale.to(exact)
    codes = (x.to(exact) - low.to(exact)) / torch.where(step > 0, step, 1.0)
    return codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8), scale, low


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., W] -> uint8 [..., ceil(W * bits / 8)]: neighbouring codes share a byte, the first in its low bits."""
    if bits == 8:
        return codes
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each))
    parts = padded.unflatten(-1, (padded.shape[-1] // each, each)).unbind(-1)
    packed = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        packed |= part << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`: [..., width], fresh memory."""
    if bits == 8:
        return packed.to(dtype)
    return _looked_up(packed, _codes(bits, dtype, packed.device))[..., :width]


def _looked_up(packed: Tensor, table: Tensor) -> Tensor:
    """[..., bytes] -> [..., bytes * E] by a table [256, E], or [256] for E = 1; faster than shifts and conversions."""
    found = table.index_select(0, packed.flatten().int())
    return found.view(*packed.shape[:-1], packed.shape[-1] * table.numel() // 256)


@cache
def _codes(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8 / bits]: the codes in each byte."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((torch.arange(256, dtype=torch.uint8)[:, None] >> shifts) & (2**bits - 1)).to(device, dtype)


@cache
def _numbers(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256]: the e4m3 number of each byte."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype).to(device)


@dataclass
class Groups:
    """Quantised numbers [h, T, D]. Each group has one scale and one low: `per` neighbouring channels of one token
    (`channels` false) or `per` neighbouring tokens of one channel (`channels` true; T is a multiple of it).

    packed uint8 [h, T, bytes]; scale, low [h, T, G], or [h, T / per, D] per channel.
    """

    packed: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    per: int
    channels: bool
    width: int

    @classmethod
    def of(cls, x: Tensor, bits: int, per: int, *, channels: bool = False) -> Groups:
        width = x.shape[-1]
        if channels:
            codes, scale, low = affine(x.unflatten(1, (x.shape[1] // per, per)), bits, 2)
            codes, scale, low = codes.flatten(1, 2), scale[:, :, 0], low[:, :, 0]
        else:
            per = min(per, width)
            codes, scale, low = affine(_grouped(x, per), bits, 3)
            codes, scale, low = codes.flatten(2)[..., :width], scale[..., 0], low[..., 0]
        return cls(pack(codes, bits).contiguous(), scale.contiguous(), low.contiguous(), bits, per, channels, width)

    def extend(self, x: Tensor) -> None:
        """More numbers [h, T, D] behind."""
        more = Groups.of(x, self.bits, self.per, channels=self.channels)
        self.packed = torch.cat([self.packed, more.packed], 1)
        self.scale, self.low = torch.cat([self.scale, more.scale], 1), torch.cat([self.low, more.low], 1)

    def dense(self) -> Tensor:
        exact = torch.promote_types(self.scale.dtype, torch.float32)
        codes = unpack(self.packed, self.bits, self.width, exact)
        scale, low = self.scale.to(exact), self.low.to(exact)
        if self.channels:
            split = codes.unflatten(1, (scale.shape[1], self.per))
            read = split.mul_(scale[:, :, None]).add_(low[:, :, None]).flatten(1, 2)
        else:
            read = _grouped(codes, self.per).mul_(scale[..., None]).add_(low[..., None]).flatten(2)[..., : self.width]
        return read.to(self.scale.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.packed, self.scale, self.low]


def _grouped(x: Tensor, per: int) -> Tensor:
    """[h, T, D] -> [h, T, ceil(D / per), per]; a last group that is too short is filled up with its last element,
    which changes neither its smallest nor its largest one."""
    short = -x.shape[-1] % per
    if short:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], -1)
    return x.unflatten(-1, (x.shape[-1] // per, per))


@dataclass
class Floats:
    """Numbers [h, T, D] as 8-bit floats (e4m3), one scale per token: the largest element becomes the largest number."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Floats:
        most = torch.finfo(torch.float8_e4m3fn).max
        exact = torch.promote_types(x.dtype, torch.float32)
        scale = (x.to(exact).abs().amax(-1, keepdim=True) / most).to(x.dtype)
        step = scale.to(exact)
        codes = (x.to(exact) / torch.where(step > 0, step, 1.0)).clamp(-most, most).to(torch.float8_e4m3fn)
        return cls(codes, scale)

    def extend(self, x: Tensor) -> None:
        more = Floats.of(x)
        codes = torch.cat([self.codes.view(torch.uint8), more.codes.view(torch.uint8)], 1)
        self.codes, self.scale = codes.view(torch.float8_e4m3fn), torch.cat([self.scale, more.scale], 1)

    def dense(self) -> Tensor:
        exact = torch.promote_types(self.scale.dtype, torch.float32)
        numbers = _looked_up(self.codes.view(torch.uint8), _numbers(exact, self.codes.device))
        return numbers.mul_(self.scale).to(self.scale.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scale]
