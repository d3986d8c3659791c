"""Caches behind transformers' `Cache`: rows of one batch hold only what was kept, and know their true positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

STORED_BYTES = 2
"""Payload is counted in 16-bit elements whatever the compute dtype."""

Kept = Sequence[Tensor | list[Tensor]]
"""Per layer: [K], [H_kv, K] or a list of H_kv position tensors."""


@dataclass
class Row:
    """One row to decode: whose keys and values it forks, and which positions of them it keeps.

    keys, values: per layer [H_kv, n, D], views of the dense prefill; nothing is copied before `CompressedCache`.
    rotate: if given, moves kept keys: (layer, keys [H_kv, K, D], old positions, new positions) -> keys.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    kept: Kept
    rotate: Any = None


def head_positions(kept: Tensor | list[Tensor], kv_heads: int) -> list[Tensor]:
    """One position tensor per KV head, whatever form a layer's kept set has."""
    if isinstance(kept, list):
        return kept
    return [kept] * kv_heads if kept.dim() == 1 else list(kept)


def kept_counts(kept: Kept, kv_heads: int) -> list[list[int]]:
    """KV pairs per layer and KV head."""
    return [[len(p) for p in head_positions(layer, kv_heads)] for layer in kept]


def payload_bytes(kept: Kept, dims: Sequence[tuple[int, int]]) -> int:
    """16-bit bytes of the kept pairs; dims: (H_kv, key width + value width) per layer."""
    return sum(
        sum(len(p) for p in head_positions(layer, heads)) * width * STORED_BYTES
        for layer, (heads, width) in zip(kept, dims, strict=True)
    )


class Workspace:
    """Memory for caches that live one after the other, so that none pays for fresh pages.

    A cache built on it is valid until the next one is.
    """

    def __init__(self) -> None:
        self._flat: Tensor | None = None
        self._used = 0

    def start(self, elements: int, like: Tensor) -> None:
        """Begins a new cache of so many elements; what the one before held is given up."""
        flat = self._flat
        if flat is None or flat.numel() < elements or flat.dtype != like.dtype or flat.device != like.device:
            self._flat = None  # freed before the larger one is asked for
            self._flat = like.new_empty(elements + elements // 4)  # the next one may be a little larger
        self._used = 0

    def take(self, *shape: int) -> Tensor:
        """A tensor of this shape; its content is whatever was there, to be written before it is read."""
        assert self._flat is not None
        start, self._used = self._used, self._used + math.prod(shape)
        return self._flat[start : self._used].view(shape)


class KeptLayer(CacheLayerMixin):
    """Keys and values [R, H_kv, slots, D] of one layer, right-aligned, with room for new tokens.

    valid [R, 1 or H_kv, filled at build]: which slots hold a kept pair; None when all do.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor, valid: Tensor | None, used: int, room: int) -> None:
        super().__init__()
        self._keys, self._values = keys, values
        self.valid, self.used, self.room = valid, used, room
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device

    @classmethod
    def gather(cls, rows: Sequence[Row], layer: int, room: int, memory: Workspace) -> KeptLayer:
        first = rows[0].keys[layer]
        kv_heads = first.shape[0]
        kept = [head_positions(row.kept[layer], kv_heads) for row in rows]
        lengths = [[len(p) for p in heads] for heads in kept]
        slots = max(max(row) for row in lengths)
        keys = memory.take(len(rows), kv_heads, slots + room, first.shape[-1])
        values = memory.take(len(rows), kv_heads, slots + room, rows[0].values[layer].shape[-1])
        for r, row in enumerate(rows):
            _place(keys[r], row.keys[layer], row.kept[layer], kept[r], slots)
            _place(values[r], row.values[layer], row.kept[layer], kept[r], slots)
            if row.rotate is not None:
                count = lengths[r][0]
                part = keys[r, :, slots - count : slots]
                part.copy_(row.rotate(layer, part, kept[r][0]))
        return cls(keys, values, _valid(lengths, slots, first.device), slots, room)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer is built full."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = key_states.shape[-2]
        if new > self.room:
            raise RuntimeError("no room left for new tokens in this cache")
        self._keys[:, :, self.used : self.used + new] = key_states
        self._values[:, :, self.used : self.used + new] = value_states
        self.used, self.room = self.used + new, self.room - new
        return self._keys[:, :, : self.used], self._values[:, :, : self.used]

    def get_seq_length(self) -> int:
        return self.used

    def get_max_length(self) -> int:
        return self.used + self.room

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def select_rows(self, rows: Sequence[int]) -> None:
        """Ascending rows move to the front, in place."""
        for stored in (self._keys, self._values):
            for to, row in enumerate(rows):
                if to != row:
                    stored[to, :, : self.used].copy_(stored[row, :, : self.used])
        self._keys, self._values = self._keys[: len(rows)], self._values[: len(rows)]
        self.valid = None if self.valid is None else self.valid[torch.tensor(rows, device=self.device)]

    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes


def _place(out: Tensor, dense: Tensor, form: Tensor | list[Tensor], heads: list[Tensor], slots: int) -> None:
    """Copies kept pairs of [H_kv, n, D] to the right end of out[:, :slots]; zeroes the slots before them."""
    device = dense.device
    for head, positions in enumerate(heads):
        if len(positions) < slots:
            out[head, : slots - len(positions)].zero_()
    if not isinstance(form, list) and form.dim() == 1:
        if len(form) == dense.shape[1]:
            out[:, slots - len(form) : slots] = dense
        else:
            torch.index_select(dense, 1, form.to(device), out=out[:, slots - len(form) : slots])
        return
    for head, positions in enumerate(heads):
        torch.index_select(dense[head], 0, positions.to(device), out=out[head, slots - len(positions) : slots])


def _valid(lengths: list[list[int]], slots: int, device: torch.device) -> Tensor | None:
    if all(count == slots for row in lengths for count in row):
        return None
    same = all(len(set(row)) == 1 for row in lengths)
    counts = torch.tensor([row[:1] if same else row for row in lengths], device=device)
    return torch.arange(slots, device=device) >= slots - counts[:, :, None]


def _elements(rows: Sequence[Row], room: int) -> int:
    """Elements of all layers' padded keys and values."""
    total = 0
    for layer, (keys, values) in enumerate(zip(rows[0].keys, rows[0].values, strict=True)):
        heads = keys.shape[0]
        slots = max(len(p) for row in rows for p in head_positions(row.kept[layer], heads))
        total += len(rows) * heads * (slots + room) * (keys.shape[-1] + values.shape[-1])
    return total


class CompressedCache(Cache):
    """Rows that were compressed differently, decoded in one batch.

    Lengths are physical; positions are given to the model by the caller, so RoPE goes on at the true place.
    """

    def __init__(self, rows: Sequence[Row], room: int, memory: Workspace | None = None) -> None:
        """room: new tokens per row that will fit. memory: reused by one cache after the other."""
        memory = memory or Workspace()
        memory.start(_elements(rows, room), rows[0].keys[0])
        super().__init__(layers=[KeptLayer.gather(rows, layer, room, memory) for layer in range(len(rows[0].keys))])

    def valid(self, layer: int) -> Tensor | None:
        return self.layers[layer].valid

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keeps these rows of the batch, given in ascending order."""
        for layer in self.layers:
            layer.select_rows(rows)

    def nbytes(self) -> int:
        """Bytes really held, padding and room included."""
        return sum(layer.nbytes() for layer in self.layers)
