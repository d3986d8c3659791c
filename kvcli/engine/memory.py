"""How many rows fit a batch, and what running out of memory looks like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcli.cache.rows import Row


CHUNK = 8192
"""Prompt tokens that run through the model together: longer prompts run in pieces, so that activations stay bounded."""


Layer = tuple[int, int, int]
"""Of one layer of a row: slots, bytes of a slot, and bytes that do not depend on their number."""


@dataclass(frozen=True)
class Room:
    """Limits of one decode batch: bytes of its padded cache and of what its rows hold themselves, and rows; None = no
    limit. figures: the bytes are those of positions, of methods' figures per slot and of rows' own memory too; in
    folders of earlier versions they are those of the cache's pairs alone."""

    bytes: int | None = None
    rows: int | None = None
    figures: bool = True

    def tally(self) -> Tally:
        return Tally(self)

    def halved(self, rows: int) -> Room:
        """After a batch of `rows` rows did not fit."""
        return replace(self, rows=max(1, rows // 2))


def batches(rows: Sequence[tuple[Row, int]], room: Room) -> Iterator[list[int]]:
    """Indices of rows, each with its new tokens, that fit in memory together, in their order."""
    batch: list[int] = []
    tally = room.tally()
    for i, (row, new) in enumerate(rows):
        if batch and not tally.fits(row, new):
            yield batch
            batch, tally = [], room.tally()
        tally.add(row, new)
        batch.append(i)
    if batch:
        yield batch


@dataclass
class Tally:
    """The size of a batch while rows are added: every row is padded to the longest one, layer by layer, and what its
    method keeps per slot to the widest. own: memory of the rows themselves, by its address; rows may share it."""

    room: Room
    rows: int = 0
    layers: list[Layer] = field(default_factory=list)
    own: dict[int, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return self._bytes(self.rows, self.layers) + sum(self.own.values())

    def fits(self, row: Row, new: int) -> bool:
        """Whether the batch stays within its room with this row and its `new` tokens."""
        if self.room.rows is not None and self.rows + 1 > self.room.rows:
            return False
        if self.room.bytes is None:
            return True
        own = {**self.own, **self._own(row)}
        return self._bytes(self.rows + 1, self._with(row, new)) + sum(own.values()) <= self.room.bytes

    def add(self, row: Row, new: int) -> None:
        self.rows, self.layers = self.rows + 1, self._with(row, new)
        self.own |= self._own(row)

    def _own(self, row: Row) -> dict[int, int]:
        return row.own if self.room.figures else {}

    @staticmethod
    def _bytes(rows: int, layers: Sequence[Layer]) -> int:
        return rows * sum(slots * slot + once for slots, slot, once in layers)

    def _with(self, row: Row, new: int) -> list[Layer]:
        own = [self._layer(row, layer, new) for layer in range(row.layers)]
        if not self.layers:
            return own
        return [(max(a, x), max(b, y), max(c, z)) for (a, b, c), (x, y, z) in zip(self.layers, own, strict=True)]

    def _layer(self, row: Row, layer: int, new: int) -> Layer:
        pair = sum(x.shape[0] * x.shape[-1] * x.element_size() for x in (row.keys[layer], row.values[layer]))
        slot, once = row.beside(layer) if self.room.figures else (0, 0)
        return row.most(layer, new), pair + slot, once


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own exception; on a CPU, and in CUDA's libraries, a RuntimeError; Python raises a MemoryError."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
