"""Caches behind transformers' `Cache`: rows of one batch hold only what was kept, whatever their lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvcli.cache.fill import Fill
from kvcli.cache.rows import Row, place
from kvcli.cache.workspace import Workspace

WASTE = 1 << 20
"""Bytes of empty slots that reading several rows at once may touch: less costs more calls than it saves."""


class Slots(Protocol):
    """Which slots of a layer hold pairs and where new ones go: `Fill` (only grows) or `Pool` (evicts)."""

    @property
    def slots(self) -> int: ...

    def used(self, new: int) -> int: ...

    def segments(self, new: int, waste: int) -> list[tuple[int, int, int]]: ...

    def take(self, new: int) -> Tensor: ...

    def visible(self, new: int) -> Tensor | None: ...

    def advance(self, new: int) -> None: ...

    def release(self, rows: Sequence[int]) -> None: ...

    def reformed(self, keep: Sequence[int], entering: Any) -> Slots: ...


class KeptLayer(CacheLayerMixin):
    """Keys and values [R, H_kv, S, D] of one layer. Slots are filled from the left; `slots` knows how far."""

    is_sliding = False
    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor, slots: Slots) -> None:
        super().__init__()
        self._keys, self._values, self.slots = keys, values, slots
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer is built full."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = key_states.shape[-2]
        index = self.slots.take(new)[..., None]
        for stored, states in ((self._keys, key_states), (self._values, value_states)):
            stored.scatter_(2, index.expand(*states.shape), states)
        used = self.slots.used(new)
        return self._keys[:, :, :used], self._values[:, :, :used]

    def get_seq_length(self) -> int:
        return self.slots.used(0)

    def get_max_length(self) -> int:
        return self._keys.shape[2]

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.used(query_length), 0

    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes


class CompressedCache(Cache):
    """Rows that were compressed differently, decoded in one batch.

    Lengths are physical; positions are given to the model by the caller, so RoPE goes on at the true place.
    """

    @torch.inference_mode()
    def __init__(self, rows: Sequence[Row], room: int | Sequence[int], memory: Workspace | None = None) -> None:
        """room: new tokens that will fit, for all rows or per row. memory: reused by one cache after the other; a cache
        is valid until the next one is made on it."""
        self.memory = memory or Workspace()
        rooms = [room] * len(rows) if isinstance(room, int) else list(room)
        super().__init__(layers=self.built(rows, self.filled(rows, rooms)))

    def built(self, rows: Sequence[Row], slots: Sequence[Slots]) -> list[KeptLayer]:
        """The layers of new rows."""
        layers = []
        for layer, fill in enumerate(slots):
            keys, values = self._tensors(layer, rows[0], len(rows), fill.slots)
            _write(keys, values, layer, rows)
            layers.append(KeptLayer(keys, values, fill))
        return layers

    def filled(self, rows: Sequence[Row], rooms: Sequence[int]) -> Sequence[Slots]:
        """Per layer how full the new rows are; layers of equal lengths share one."""
        made: dict[tuple[tuple[int, ...], ...], Fill] = {}
        fills = []
        for layer in range(rows[0].layers):
            lengths = [row.lengths(layer) for row in rows]
            key = tuple(lengths)
            if key not in made:
                made[key] = Fill.of(lengths, rooms, rows[0].keys[layer].device)
            fills.append(made[key])
        return fills

    reads_attention = False
    """Whether `settle` wants the attention of each new token."""
    newest_texts: Callable[[], list[str]] | None = None
    """Text of the newest token that is fed, row by row."""

    def begin(self, positions: Tensor) -> None:
        """Before a forward pass: the true positions [R, new] of its tokens."""

    def settle(self, layer: int, attention: Tensor | None) -> None:
        """After a layer's attention of one new token: [R, H, used] float32 where `reads_attention`."""

    def segments(self, layer: int, new: int) -> list[tuple[int, int, int]]:
        """(first row, row behind the last, slots to look at) of neighbouring rows that are about equally full."""
        kept = self.layers[layer]
        slot = (kept._keys[0, :, 0].numel() + kept._values[0, :, 0].numel()) * kept.dtype.itemsize
        return kept.slots.segments(new, WASTE // slot)

    def visible(self, layer: int, new: int) -> Tensor | None:
        """bool [R, 1 or H_kv, new, used]: which slots each of the new tokens sees; None: all of them."""
        return self.layers[layer].slots.visible(new)

    def narrowed(self, layer: int, query: Tensor, key: Tensor, visible: Tensor | None) -> Tensor | None:
        """What the new tokens [R, H, Q, D] see out of what is visible, where that depends on them."""
        return visible

    @torch.inference_mode()
    def advance(self, new: int) -> None:
        """After a forward pass of `new` tokens: they stay. A negative number takes the newest back."""
        for slots in {id(layer.slots): layer.slots for layer in self.layers}.values():
            slots.advance(new)

    @torch.inference_mode()
    def release(self, rows: Sequence[int]) -> None:
        """These rows of the batch have ended."""
        for slots in {id(layer.slots): layer.slots for layer in self.layers}.values():
            slots.release(rows)

    def payload(self, row: int) -> int | None:
        """16-bit bytes of what the row holds; None where that is its prompt's part and every generated pair."""
        return None

    def read_per_token(self, row: int) -> float | None:
        """16-bit bytes read per new token, where a method chooses what to read; else None."""
        return None

    def left_out(self, row: int) -> bool:
        """Whether any new token of the row did not read all that is held."""
        return False

    @torch.inference_mode()
    def reform(self, keep: Sequence[int], rows: Sequence[Row], room: Sequence[int]) -> None:
        """The batch becomes the rows of `keep` (ascending) and, behind them, new ones with their room."""
        entering = self.filled(rows, room) if rows else [None] * len(self.layers)
        made: dict[tuple[int, int], Slots] = {}
        for number, (layer, new) in enumerate(zip(self.layers, entering, strict=True)):
            key = (id(layer.slots), id(new))
            if key not in made:
                made[key] = layer.slots.reformed(keep, new)
            self._rebuild(number, layer, keep, rows, made[key])

    def _rebuild(self, number: int, layer: KeptLayer, keep: Sequence[int], rows: Sequence[Row], slots: Slots) -> None:
        old = (layer._keys, layer._values)
        count = min(slots.slots, old[0].shape[2])
        fresh = self._tensors(number, layer, len(keep) + len(rows), slots.slots)
        for target, source in zip(fresh, old, strict=True):
            for to, row in enumerate(keep):
                target[to, :, :count] = source[row, :, :count]
        _write(fresh[0][len(keep) :], fresh[1][len(keep) :], number, rows)
        (layer._keys, layer._values), layer.slots = fresh, slots

    def _tensors(self, number: int, like: Row | KeptLayer, rows: int, slots: int) -> list[Tensor]:
        keys, values = (like._keys[0], like._values[0]) if isinstance(like, KeptLayer) else (
            like.keys[number], like.values[number])  # fmt: skip
        shapes = [(rows, x.shape[0], slots, x.shape[-1]) for x in (keys, values)]
        return self.memory.swap(number, keys, *shapes)

    def nbytes(self) -> int:
        """Bytes really held, padding and room included."""
        return sum(layer.nbytes() for layer in self.layers)


def _write(keys: Tensor, values: Tensor, layer: int, rows: Sequence[Row]) -> None:
    """The kept pairs of each row into keys and values [R, H_kv, S, D]."""
    for r, row in enumerate(rows):
        place(keys[r], row.keys[layer], row.kept[layer])
        place(values[r], row.values[layer], row.kept[layer])
        if row.rotate is not None:
            form = row.kept[layer]
            positions = form[0] if isinstance(form, list) or form.dim() == 2 else form
            part = keys[r, :, : len(positions)]
            part.copy_(row.rotate(layer, part, positions))
