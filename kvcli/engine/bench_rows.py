"""Rows of a benchmark on their way into the cache that a sweep would decode them from; dense pairs are let go early."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import Row, gathered
from kvcli.cache.stored import StoredRow
from kvcli.cache.workspace import Workspace
from kvcli.engine.pool_rows import PoolRow

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
            row.keys[layer], small = gathered(row.keys[layer], form)  # type: ignore[index]
            row.values[layer], small = gathered(row.values[layer], form)  # type: ignore[index]
            forms.append(small)
        row.kept = forms

    def clone(self) -> Held:
        """A row of its own, for the search for the largest batch."""
        changes: dict[str, Any] = {
            "keys": [_copy(x) for x in self.row.keys], "values": [_copy(x) for x in self.row.values]
        }  # fmt: skip
        if isinstance(self.row, StoredRow):
            layers = copy.deepcopy(self.row.make())  # what its layers share is shared in the copy too
            changes["make"] = lambda: layers
        return dataclasses.replace(self, row=dataclasses.replace(self.row, **changes))


def _copy(x: Tensor) -> Tensor:
    """[H_kv, S, D]; what all heads see is copied once for all of them."""
    return x[:1].clone().expand_as(x) if x.stride(0) == 0 else x.clone()


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
