"""Which cache a method's rows decode from: the storage kinds. Knows no torch before a cache is built."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from kvcli.methods.base import Method, Reader
from kvcli.methods.composed import transform_of

if TYPE_CHECKING:
    from kvcli.engine.generate import Build

STORAGE = {
    "pairs": "kept as they are",
    "stored": "in another form, of which one layer at a time is written out for attention",
    "read": "all held, of which each new token reads some",
    "pool": "evicted on while generating",
}
"""What a decode cache does with its pairs."""


def storage_of(method: Method, decode: dict[str, Any] | None) -> str:
    """Which of STORAGE a method's rows decode from. decode: the cell's settings for generated tokens."""
    if isinstance(method, Reader):
        return "read"
    if decode is not None:
        return "pool"
    return "stored" if transform_of(method) is not None else "pairs"


def build_of(storage: str, method: Method, heads: int) -> Build:
    """How a cache of rows of this kind is made. heads: query heads of the model."""
    from kvcli.cache.kv_cache import CompressedCache
    from kvcli.cache.reading import ReadingCache
    from kvcli.cache.stored import StoredCache
    from kvcli.engine.pool import PoolCache

    if storage == "read":
        return partial(ReadingCache, method)  # type: ignore[arg-type]
    if storage == "pool":
        return partial(PoolCache, method, heads)
    return StoredCache if storage == "stored" else CompressedCache
