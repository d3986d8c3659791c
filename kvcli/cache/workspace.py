"""Memory that caches use one after the other, so that none pays for fresh pages.

Slots that hold no pair are read with weight zero, so whatever lies in them must be a number.
"""

from __future__ import annotations

import math

from torch import Tensor

SPARE = 16
"""A buffer is made 1/SPARE larger than asked for: the next cache may be a little larger."""


class Workspace:
    """One buffer per layer and one more: a layer is rebuilt from its old buffer into the spare one, and its old one is
    the next layer's spare."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}
        self._spare: Tensor | None = None
        self._soiled: Tensor | None = None

    def swap(self, layer: int, like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Tensors of these shapes for a layer; they hold zeros or what earlier caches left.

        The tensors the layer had stay readable until `swap` is called for another layer.
        """
        if self._soiled is not None and bool(self._soiled):
            self.discard()
        self._soiled = None
        sizes = [math.prod(shape) for shape in shapes]
        flat = self._spare
        if flat is None or flat.numel() < sum(sizes) or flat.dtype != like.dtype or flat.device != like.device:
            self._spare = flat = None  # freed before the larger one is asked for
            flat = like.new_zeros(sum(sizes) + sum(sizes) // SPARE)
        self._spare = self._held.pop(layer, None)
        self._held[layer] = flat
        parts = flat[: sum(sizes)].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def discard(self) -> None:
        """Gives all buffers up."""
        self._held.clear()
        self._spare = None

    def watch(self, logits: Tensor) -> None:
        """Where a model gives NaN, its caches may hold NaN too, which must not reach the next ones: the buffers are not
        used again. Looked at when the next cache is built, so that no step waits for it."""
        found = logits.isnan().any()
        self._soiled = found if self._soiled is None else self._soiled | found

    def nbytes(self) -> int:
        """Bytes held, the spare buffer included."""
        return sum(b.nbytes for b in (*self._held.values(), self._spare) if b is not None)
