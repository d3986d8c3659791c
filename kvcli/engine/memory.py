"""How many rows fit a batch, and what running out of memory looks like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcli.cache.rows import Row


CHUNK = 8192
"""Prompt tokens that run through the model together: longer prompts run in pieces, so that activations stay bounded."""


@dataclass(frozen=True)
class Room:
    """Limits of one decode batch: bytes of its padded cache, and rows; None = no limit."""

    bytes: int | None = None
    rows: int | None = None

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
    """The size of a batch while rows are added: every row is padded to the longest one, layer by layer."""

    room: Room
    rows: int = 0
    slots: list[int] = field(default_factory=list)

    def fits(self, row: Row, new: int) -> bool:
        """Whether the batch stays within its room with this row and its `new` tokens."""
        if self.room.rows is not None and self.rows + 1 > self.room.rows:
            return False
        if self.room.bytes is None:
            return True
        return (self.rows + 1) * _row_bytes(row, self._with(row, new)) <= self.room.bytes

    def add(self, row: Row, new: int) -> None:
        self.rows, self.slots = self.rows + 1, self._with(row, new)

    def _with(self, row: Row, new: int) -> list[int]:
        own = [row.most(layer, new) for layer in range(row.layers)]
        return [max(a, b) for a, b in zip(self.slots, own, strict=True)] if self.slots else own


def _row_bytes(row: Row, slots: list[int]) -> int:
    """Bytes of one row padded to so many slots per layer."""
    return sum(
        count * (keys.shape[0] * keys.shape[-1] + values.shape[0] * values.shape[-1]) * keys.element_size()
        for count, keys, values in zip(slots, row.keys, row.values, strict=True)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own exception; on a CPU, and in CUDA's libraries, a RuntimeError; Python raises a MemoryError."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
