"""The cache of rows whose pairs a transform stores in another form: quantised, with fewer channels, of low rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcli.cache.kv_cache import CompressedCache, KeptLayer, Slots
from kvcli.cache.rows import Row
from kvcli.cache.workspace import Workspace

if TYPE_CHECKING:
    from kvcli.methods.base import Stored

Layers = list[list[tuple[slice, "Stored"]]]
"""Per layer the stored blocks and which KV heads each holds."""


@dataclass
class StoredRow(Row):
    """A row that a transform stores. make: its stores, made anew for each cache it enters."""

    make: Callable[[], Layers] = field(default=list)


class StoredLayer(KeptLayer):
    """One layer of R rows in their stored form; what attention reads is written out for this layer alone."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        slots: Slots,
        stores: list[list[tuple[slice, Stored]]],
        alive: list[bool],
    ) -> None:
        """keys, values: the buffer of all layers. alive: which rows have not ended, the cache's own list."""
        self.stores, self.alive = stores, alive
        super().__init__(keys, values, slots)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new pairs [R, H_kv, 1, D] and reads all back, into memory that the next layer will use."""
        self.slots.take(1)
        used = self.slots.used(1)
        for row, blocks in enumerate(self.stores):
            if not self.alive[row]:
                continue
            for heads, store in blocks:
                store.append(key_states[row, heads], value_states[row, heads])
                keys, values = store.dense()
                self._keys[row, heads, : keys.shape[1]] = keys
                self._values[row, heads, : values.shape[1]] = values
        return self._keys[:, :, :used], self._values[:, :, :used]


class StoredCache(CompressedCache):
    """Rows that are stored in forms of their own. Takes one token at a time: what is stored depends on their order.

    One buffer of dense pairs serves all layers, one after the other.
    """

    def __init__(self, rows: Sequence[Row], room: int | Sequence[int], memory: Workspace | None = None) -> None:
        self._row_stores: list[Layers] = []
        self._alive: list[bool] = []
        self._shared: list[Tensor] = []
        super().__init__(rows, room, memory)

    def _enter(self, rows: Sequence[Row]) -> None:
        for row in rows:
            assert isinstance(row, StoredRow)
            self._row_stores.append(row.make())
            self._alive.append(True)

    def built(self, rows: Sequence[Row], slots: Sequence[Slots]) -> list[KeptLayer]:
        self._enter(rows)
        return self._layers(rows[0], slots)

    def _layers(self, like: Row | StoredLayer, slots: Sequence[Slots]) -> list[KeptLayer]:
        most = max(s.slots for s in slots)
        layers: list[KeptLayer] = []
        for number, fill in enumerate(slots):
            keys, values = self._buffer(like, number, most)
            stores = [row[number] for row in self._row_stores]
            layers.append(StoredLayer(keys, values, fill, stores, self._alive))
        return layers

    def _buffer(self, like: Row | StoredLayer, layer: int, slots: int) -> list[Tensor]:
        """[R, H_kv, S, D] for keys and for values: the same memory for all layers."""
        keys, values = (like._keys[0], like._values[0]) if isinstance(like, StoredLayer) else (
            like.keys[layer], like.values[layer])  # fmt: skip
        shapes = [(len(self._row_stores), x.shape[0], slots, x.shape[-1]) for x in (keys, values)]
        if layer == 0:
            self._shared = self.memory.swap(0, keys, *shapes)
        if [tuple(x.shape) for x in self._shared] != shapes:
            raise ValueError("layers of different shapes cannot be stored in another form")
        return self._shared

    def begin(self, positions: Tensor) -> None:
        if positions.shape[1] != 1:
            raise ValueError("a cache of stored pairs takes one token at a time")

    def advance(self, new: int) -> None:
        if new < 0:
            raise ValueError("what was stored cannot be taken back")
        super().advance(new)

    def release(self, rows: Sequence[int]) -> None:
        super().release(rows)
        for row in rows:
            self._alive[row] = False

    layers: list[Any]

    @torch.inference_mode()
    def reform(self, keep: Sequence[int], rows: Sequence[Row], room: Sequence[int]) -> None:
        entering = self.filled(rows, room) if rows else [None] * len(self.layers)
        made: dict[tuple[int, int], Slots] = {}
        for layer, new in zip(self.layers, entering, strict=True):
            key = (id(layer.slots), id(new))
            if key not in made:
                made[key] = layer.slots.reformed(keep, new)
        slots = [made[id(x.slots), id(new)] for x, new in zip(self.layers, entering, strict=True)]
        self._row_stores = [self._row_stores[r] for r in keep]
        self._alive = [self._alive[r] for r in keep]
        self._enter(rows)
        self.layers = self._layers(self.layers[0], slots)

    def payload(self, row: int) -> int:
        return sum(store.payload() for blocks in self._row_stores[row] for _, store in blocks)

    def nbytes(self) -> int:
        stored = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for stores in self._row_stores
            for blocks in stores
            for _, store in blocks
            for t in store.tensors()
        }
        return sum(stored.values()) + sum(x.nbytes for x in self._shared)
