"""KIVI: keys quantised per channel, values per token, the newest pairs whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.errors import KvcliError
from kvcli.methods.base import Block, Stored, Transform, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.context import Context


@dataclass(frozen=True)
class Kivi(Transform):
    """Keys are quantised per channel in groups of tokens, values per token in groups of channels, both asymmetrically:
    a group stores its smallest element, a step, and one code of 2 or 4 bits per element.

    Keys wait whole until `residual` of them are together and are quantised then, all at once; of the values the newest
    `residual` stay whole, and an older one is quantised as it leaves them. Generated pairs are treated alike. 2 bits in
    groups of 32 take 0.1875 of 16 bit, 4 bits 0.3125, to which the whole pairs come.

    Source: arXiv:2402.02750, section 3.3 and algorithm 1; the authors' code (jy-yuan/KIVI, models/llama_kivi.py).
    Differs: a block of keys and a leaving value are quantised before the newest query reads them, in the authors' code
    after it, one step later. Scales and smallest elements have the model's dtype, as in the authors' code. Heads
    narrower than a group are one group. The residual is the group's size, the smallest that the rule allows; the
    authors' long-context tables keep 128.
    """

    name = "kivi"
    title = "KIVI"
    paper = "arXiv:2402.02750"
    tier = 2
    phases = ("prefill", "decode")
    protects = "the newest pairs, whole"

    bits: int = setting(2, choices=(2, 4), help="bits per element", paper="2 and 4")  # type: ignore[arg-type]
    group: int = setting(32, ge=1, help="elements that share a scale: tokens for keys, channels for values", paper="32")
    residual: int = setting(
        32, ge=1, help="newest pairs kept whole, a multiple of the group", paper="128 in the tables, 32 in the examples"
    )

    def __post_init__(self) -> None:
        if self.residual % self.group:
            what = f"residual={self.residual} is no multiple of group={self.group}"
            raise KvcliError(
                what, given="--method kivi", fix=f"residual={-(-self.residual // self.group) * self.group}"
            )

    def store(self, ctx: Context, layers: Sequence[Sequence[Block]]) -> list[list[Stored]]:
        return [[_Store(b.keys, b.values, self.bits, self.group, self.residual) for b in blocks] for blocks in layers]


class _Store:
    """keys, values: quantised ones; behind them, whole, up to residual - 1 keys and up to `residual` values."""

    def __init__(self, keys: Tensor, values: Tensor, bits: int, group: int, residual: int) -> None:
        from kvcli.methods._quantise import Groups

        self.residual = residual
        ready, left = keys.shape[1] // residual * residual, max(0, values.shape[1] - residual)
        self.keys = Groups.of(keys[:, :ready], bits, group, channels=True)
        self.values = Groups.of(values[:, :left], bits, group)
        self.new_keys, self.new_values = keys[:, ready:].clone(), values[:, left:].clone()

    def append(self, keys: Tensor, values: Tensor) -> None:
        import torch

        self.new_keys, self.new_values = torch.cat([self.new_keys, keys], 1), torch.cat([self.new_values, values], 1)
        if self.new_keys.shape[1] == self.residual:
            self.keys.extend(self.new_keys)
            self.new_keys = self.new_keys[:, :0].clone()
        if self.new_values.shape[1] > self.residual:
            self.values.extend(self.new_values[:, :1])
            self.new_values = self.new_values[:, 1:].clone()

    def dense(self) -> tuple[Tensor, Tensor]:
        import torch

        return torch.cat([self.keys.dense(), self.new_keys], 1), torch.cat([self.values.dense(), self.new_values], 1)

    def payload(self) -> int:
        from kvcli.methods._stores import payload_of

        return payload_of(self.tensors())

    def tensors(self) -> list[Tensor]:
        return [*self.keys.tensors(), *self.values.tensors(), self.new_keys, self.new_values]
