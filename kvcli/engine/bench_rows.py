"""Rows of a benchmark on their way into the cache that a sweep would decode them from; dense pairs are let go early."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import Kept, Row
from kvcli.cache.stored import StoredRow
from kvcli.cache.workspace import Workspace
from kvcli.engine.pool import PoolRow

if TYPE_CHECKING:
    from kvcli.engine.generate import Build


@dataclass
class Held:
    """One compressed prompt on its way into the batch.

    row: its pairs, in lists whose layers can be let go one by one. first [1]: the prefill's own next token, which is
    fed at position `end`. payload: 16-bit bytes of what was kept, in the form in which it is stored.
    """

    row: Row
    first: Tensor
    end: int
    payload: int
    flags: frozenset[str]

    def store(self) -> None:
        """A transform's form is made now, once, and the pairs it was made of are let go; other rows stay."""
        row = self.row
        if not isinstance(row, StoredRow):
            return
        layers = row.make()
        row.make = lambda: layers
        row.keys, row.values = ([x.new_empty(x.shape[0], 0, x.shape[-1]) for x in xs] for xs in (row.keys, row.values))
        self.payload = sum(store.payload() for blocks in layers for _, store in blocks)

    def shrink(self) -> None:
        """Nothing but the kept pairs stays in memory; a layer that is kept whole stays as it is."""
        row, forms = self.row, []
        if isinstance(row, StoredRow):
            return
        for layer, form in enumerate(row.kept):
            small, row.keys[layer] = _gather(row.keys[layer], form)  # type: ignore[index]
            small, row.values[layer] = _gather(row.values[layer], form)  # type: ignore[index]
            forms.append(small)
        if row.rotate is not None:
            row.rotate = partial(_rotated, row.rotate, row.kept)
        row.kept = forms

    def clone(self) -> Held:
        """A row of its own, for the search for the largest batch."""
        changes: dict[str, Any] = {
            "keys": [x.clone() for x in self.row.keys], "values": [x.clone() for x in self.row.values]
        }  # fmt: skip
        if isinstance(self.row, StoredRow):
            layers = copy.deepcopy(self.row.make())  # what its layers share is shared in the copy too
            changes["make"] = lambda: layers
        return dataclasses.replace(self, row=dataclasses.replace(self.row, **changes))


def _rotated(
    rotate: Callable[[int, Tensor, Tensor], Tensor], kept: Kept, layer: int, keys: Tensor, _: Tensor
) -> Tensor:
    """What `rotate` makes of keys whose row has forgotten where they stood."""
    form = kept[layer]
    return rotate(layer, keys, form if isinstance(form, Tensor) and form.dim() == 1 else form[0])


def _gather(x: Tensor, form: Tensor | list[Tensor]) -> tuple[Tensor | list[Tensor], Tensor]:
    """Which positions of the result are kept, and the kept pairs of [H_kv, n, D] as a tensor of their own."""
    if isinstance(form, list):
        out = x.new_zeros(len(form), max(len(p) for p in form), x.shape[-1])
        for head, positions in enumerate(form):
            out[head, : len(positions)] = x[head, positions.to(x.device)]
        return [torch.arange(len(p)) for p in form], out
    everything = torch.arange(form.shape[-1])
    if form.dim() == 1:
        return everything, x if len(form) == x.shape[1] else x[:, form.to(x.device)]
    return everything, x.gather(1, form.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))


class Draining(Workspace):
    """Buffers of exactly the size asked for; each layer's sources are let go when the next layer asks for its own.

    So building a cache never holds more than one layer twice. Else `full`, which copies everything into its decode
    cache, would seem to need twice its memory, and every method to save as much.
    """

    def __init__(self, rows: Sequence[Row], settle: Callable[[], object]) -> None:
        """settle: called when something was let go."""
        super().__init__()
        self._rows, self._settle = list(rows), settle
        uneven = any(isinstance(row, (PoolRow, StoredRow)) for row in rows)
        self._gaps = [uneven or len(_lengths(rows, layer)) > 1 for layer in range(rows[0].layers)]

    def swap(self, layer: int, like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
        if layer:
            self._let_go(layer - 1)
        # slots that are looked at before they hold a pair have weight zero, so what lies in them must be a number
        make = like.new_zeros if self._gaps[layer] else like.new_empty
        return [make(shape) for shape in shapes]

    def _let_go(self, layer: int) -> None:
        for row in self._rows:
            row.keys[layer] = row.values[layer] = None  # type: ignore[index]
        self._settle()

    def finish(self) -> None:
        self._let_go(-1)
        self._rows.clear()


def _lengths(rows: Sequence[Row], layer: int) -> set[int]:
    return {length for row in rows for length in row.lengths(layer)}


def joined(
    rows: Sequence[Row], room: int, build: Build = CompressedCache, settle: Callable[[], object] = lambda: None
) -> CompressedCache:
    """The cache of a batch; the rows have given up their keys and values."""
    memory = Draining(rows, settle)
    cache = build(rows, [room] * len(rows), memory)
    memory.finish()
    return cache
