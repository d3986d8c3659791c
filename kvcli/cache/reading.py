"""The cache of rows that hold every pair and read some of them for each new token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import STORED_BYTES, Row
from kvcli.cache.workspace import Workspace

if TYPE_CHECKING:
    from kvcli.methods.base import Reader


class ReadingCache(CompressedCache):
    """Rows of one method that chooses, for each new token, layer and query head, which pairs are read.

    What is read is counted in 16-bit bytes: pairs that any query head of a KV head's group reads, and what the method
    looks at to choose. Takes one token at a time.
    """

    def __init__(self, method: Reader, rows: Sequence[Row], room: Sequence[int], memory: Workspace) -> None:
        self.method = method
        self._bytes = [0.0] * len(rows)
        self._steps = [0] * len(rows)
        self._live = [True] * len(rows)
        self._left_out = [False] * len(rows)
        super().__init__(rows, room, memory)

    def begin(self, positions: Tensor) -> None:
        if positions.shape[1] != 1:
            raise ValueError("a cache that chooses what to read takes one token at a time")
        self._steps = [steps + live for steps, live in zip(self._steps, self._live, strict=True)]

    def narrowed(self, layer: int, query: Tensor, key: Tensor, visible: Tensor | None) -> Tensor | None:
        """query [R, H, 1, D], key [R, H_kv, S, D] -> bool [R, H_kv, G, S]: what each query head reads."""
        rows, kv_heads, slots, _ = key.shape
        everything = torch.ones(rows, 1, slots, dtype=torch.bool, device=key.device)
        filled = (everything if visible is None else visible[:, :, 0]).expand(rows, kv_heads, slots)
        chosen = self.method.read(layer, query[:, :, 0], key, filled)
        grouped = filled[:, :, None] if chosen is None else chosen.unflatten(1, (kv_heads, -1)) & filled[:, :, None]
        all_read = (grouped | ~filled[:, :, None]).flatten(2).all(-1)  # of a row alone, whoever shares the batch
        self._count(layer, grouped.any(2), filled.sum(-1).masked_fill(all_read, 0))
        return visible if chosen is None else grouped

    def _count(self, layer: int, read: Tensor, chosen_from: Tensor) -> None:
        """read bool [R, H_kv, S]; chosen_from [R, H_kv]: pairs of which some were left out, else 0."""
        kept = self.layers[layer]
        key, value = kept._keys.shape[-1], kept._values.shape[-1]
        pairs = read.sum((1, 2)).tolist()
        chose = (chosen_from.sum(1) > 0).tolist()
        beside = self.method.looked_at(chosen_from.double().cpu(), key).sum(1).tolist()
        for row, live in enumerate(self._live):
            if live:
                self._left_out[row] |= chose[row]
                self._bytes[row] += (pairs[row] * (key + value) + beside[row]) * STORED_BYTES

    def read_per_token(self, row: int) -> float | None:
        return self._bytes[row] / self._steps[row] if self._steps[row] else None

    def left_out(self, row: int) -> bool:
        """Whether any new token of the row did not read everything."""
        return self._left_out[row]

    def release(self, rows: Sequence[int]) -> None:
        super().release(rows)
        for row in rows:
            self._live[row] = False

    def reform(self, keep: Sequence[int], rows: Sequence[Row], room: Sequence[int]) -> None:
        parts: list[tuple[list[Any], Any]] = [
            (self._bytes, 0.0),
            (self._steps, 0),
            (self._live, True),
            (self._left_out, False),
        ]
        for values, fresh in parts:
            values[:] = [values[r] for r in keep] + [fresh] * len(rows)
        super().reform(keep, rows, room)
