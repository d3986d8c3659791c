"""What stores of pairs share: bytes, pairs kept as they are, and which pair is the prompt's last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcli.cache.rows import STORED_BYTES

if TYPE_CHECKING:
    from kvcli.methods.base import Block
    from kvcli.methods.context import Context


def payload_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, with floats of whatever compute dtype counted as 16 bit (those of 8 bit as they are)."""
    return sum(t.numel() * (min(t.itemsize, STORED_BYTES) if t.is_floating_point() else t.itemsize) for t in tensors)


def counts_of(layers: Sequence[Sequence[Block]]) -> list[list[int]]:
    """Pairs per layer and KV head, for `Transform.check`."""
    return [[b.keys.shape[1] for b in blocks for _ in range(b.keys.shape[0])] for blocks in layers]


def settled(ctx: Context, block: Block) -> int:
    """Pairs of a block before the prompt's last one, which may be fed again: what is made of the others must not depend
    on whether it is already there."""
    pairs = block.keys.shape[1]
    return pairs - int(pairs > 0 and bool((block.positions[:, -1] == ctx.n - 1).all()))


class Whole:
    """Pairs kept as they are, [h, K, D]; they grow by one at a time."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys.clone(), values.clone()

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1)

    def dense(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def payload(self) -> int:
        return payload_of(self.tensors())

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]
