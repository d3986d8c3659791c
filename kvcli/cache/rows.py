"""Rows to decode, the forms a kept set may have, and what it weighs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

STORED_BYTES = 2
"""Payload is counted in 16-bit elements whatever the compute dtype."""

Kept = Sequence[Tensor | list[Tensor]]
"""Per layer: [K], [H_kv, K] or a list of H_kv position tensors."""

Pairs = tuple[Sequence[Tensor], Sequence[Tensor], Kept]
"""Keys and values [H_kv, S, D] per layer, and where in them the kept ones are."""


@dataclass
class Row:
    """One row to decode: whose keys and values it forks, and which positions of them it keeps.

    keys, values: per layer [H_kv, n, D], views of the dense prefill; nothing is copied before `CompressedCache`.
    rotate: if given, moves kept keys: (layer, keys [H_kv, K, D], old positions) -> keys.
    own: bytes of the memory that is not the shared prefill's, by its address (`storages`).
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    kept: Kept
    rotate: Any = None
    own: dict[int, int] = field(default_factory=dict, kw_only=True)

    @property
    def layers(self) -> int:
        return len(self.keys)

    def most(self, layer: int, room: int) -> int:
        """Pairs its longest head will ever hold in this layer, with `room` new tokens."""
        return max(self.lengths(layer)) + room

    def beside(self, layer: int) -> tuple[int, int]:
        """Bytes that a cache holds of this layer beside the pairs: per slot, and once."""
        return 0, 0

    def lengths(self, layer: int) -> tuple[int, ...]:
        """Kept pairs per KV head; one number where all heads of the layer keep equally many."""
        return self._lengths[layer]

    @cached_property
    def _lengths(self) -> list[tuple[int, ...]]:
        return [tuple(map(len, form)) if isinstance(form, list) else (form.shape[-1],) for form in self.kept]


def head_positions(kept: Tensor | list[Tensor], kv_heads: int) -> list[Tensor]:
    """One position tensor per KV head, whatever form a layer's kept set has."""
    if isinstance(kept, list):
        return kept
    return [kept] * kv_heads if kept.dim() == 1 else list(kept)


def kept_counts(kept: Kept, kv_heads: int) -> list[list[int]]:
    """KV pairs per layer and KV head."""
    return [[len(p) for p in form] if isinstance(form, list) else [form.shape[-1]] * kv_heads for form in kept]


def payload_bytes(kept: Kept, dims: Sequence[tuple[int, int]]) -> int:
    """16-bit bytes of the kept pairs; dims: (H_kv, key width + value width) per layer."""
    return sum(
        sum(kept_counts([form], heads)[0]) * width * STORED_BYTES
        for form, (heads, width) in zip(kept, dims, strict=True)
    )


def place(out: Tensor, dense: Tensor, form: Tensor | list[Tensor]) -> None:
    """Copies the kept pairs of [H_kv, n, D] to the left end of out [H_kv, S, D]; the rest stays what it was."""
    device = dense.device
    if not isinstance(form, list) and form.dim() == 1 and len(form) == dense.shape[1]:
        out[:, : len(form)] = dense
    elif isinstance(form, list) or device.type == "cpu":  # on a CPU a target in one piece is worth a call per head
        for head, positions in enumerate(head_positions(form, dense.shape[0])):
            torch.index_select(dense[head], 0, positions.to(device), out=out[head, : len(positions)])
    elif form.dim() == 1:
        torch.index_select(dense, 1, form.to(device), out=out[:, : len(form)])
    else:
        out[:, : form.shape[1]] = dense.gather(1, form.to(device)[..., None].expand(-1, -1, dense.shape[-1]))


def packed(heads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Pairs [K, D] of each head in one piece of memory, as [H_kv, S, D], and where each head's stand in it.

    Heads of different lengths lie one behind the other in a view that every head sees whole: padding would hold as much
    for each head as for the longest.
    """
    ends = list(accumulate(map(len, heads)))
    if len(set(map(len, heads))) == 1:
        return torch.stack(list(heads)), [torch.arange(ends[0])] * len(heads)
    places = [torch.arange(end - len(x), end) for x, end in zip(heads, ends, strict=True)]
    return torch.cat(list(heads)).expand(len(heads), -1, -1), places


def gathered(dense: Tensor, form: Tensor | list[Tensor]) -> tuple[Tensor, Tensor | list[Tensor]]:
    """The kept pairs of [H_kv, n, D] in memory of their own, and where they stand in it; what is kept whole stays."""
    device = dense.device
    if isinstance(form, list):
        return packed([x[positions.to(device)] for x, positions in zip(dense, form, strict=True)])
    places = torch.arange(form.shape[-1])
    if form.dim() == 1:
        return (dense if len(form) == dense.shape[1] else dense[:, form.to(device)]), places
    return dense.gather(1, form.to(device)[..., None].expand(-1, -1, dense.shape[-1])), places


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the memory behind these tensors, by its address: views of one piece count it once, and whole."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
