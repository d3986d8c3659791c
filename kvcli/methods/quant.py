"""Quantised pairs in 8 or 4 bits, with or without a library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

from kvcli.errors import Exit, KvcliError
from kvcli.methods.base import Block, Stored, Transform, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.context import Context

_LIBRARIES = {"quanto": "optimum.quanto", "hqq": "hqq"}
_PACKAGES = {"quanto": "optimum-quanto>=0.2.5", "hqq": "hqq>=0.2.1"}


@dataclass(frozen=True)
class Quant(Transform):
    """Every pair is quantised as it comes, keys and values alike, prompt and generated ones.

    int8, int4: `group` neighbouring channels of a token share a smallest element and a step (asymmetric, nothing kept
    whole). fp8: e4m3 numbers, one scale per token and KV head (its largest element becomes 448).

    Source: what public libraries offer as a quantised cache; no paper. `backend=quanto` (int4) and `backend=hqq` (int8,
    int4) are transformers' `QuantizedCache` with its own rule: the newest `residual` pairs stay whole, and when so many
    are together everything is quantised anew. Differs: transformers' fp8 cache has one scale per layer, fixed by the
    prompt, and clips what is larger later; here each token has its own.
    """

    name = "quant"
    title = "Quantised cache"
    tier = 2
    phases = ("prefill", "decode")
    protects = "nothing; with a library the newest pairs, whole"

    dtype: str = setting("int8", choices=("int8", "int4", "fp8"), help="what an element is stored as")
    backend: str = setting("own", choices=("own", "quanto", "hqq"), help="who quantises; a library must be installed")
    group: int = setting(64, ge=1, help="channels that share a scale (int8, int4)")
    residual: int = setting(128, ge=1, help="newest pairs kept whole (backend quanto or hqq)")

    def __post_init__(self) -> None:
        if self.backend == "own":
            return
        given = f"--method quant:backend={self.backend},dtype={self.dtype}"
        if self.dtype == "fp8":
            raise KvcliError(f"{self.backend} has no fp8 cache", given=given, fix="backend=own")
        if self.backend == "quanto" and self.dtype == "int8":
            raise KvcliError("quanto's cache has 2 and 4 bits only", given=given, fix="dtype=int4")
        if not _installed(_LIBRARIES[self.backend]):
            fix = f"pip install '{_PACKAGES[self.backend]}'"
            raise KvcliError(f"{self.backend} is not installed", given=given, fix=fix, code=Exit.ENVIRONMENT)

    def store(self, ctx: Context, layers: Sequence[Sequence[Block]]) -> list[list[Stored]]:
        return [[self._store(block) for block in blocks] for blocks in layers]

    def _store(self, block: Block) -> Stored:
        if self.backend != "own":
            return _LibraryStore(self, block.keys, block.values)
        make = _floats if self.dtype == "fp8" else self._groups
        return _Store(make(block.keys), make(block.values))

    def _groups(self, x: Tensor) -> Any:
        from kvcli.methods._quantise import Groups

        return Groups.of(x, 8 if self.dtype == "int8" else 4, self.group)


def _floats(x: Tensor) -> Any:
    from kvcli.methods._quantise import Floats

    return Floats.of(x)


def _installed(module: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@dataclass
class _Store:
    """keys, values: quantised numbers that grow (`Groups` or `Floats`)."""

    keys: Any
    values: Any

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys.extend(keys)
        self.values.extend(values)

    def dense(self) -> tuple[Tensor, Tensor]:
        return self.keys.dense(), self.values.dense()

    def payload(self) -> int:
        from kvcli.methods._stores import payload_of

        return payload_of(self.tensors())

    def tensors(self) -> list[Tensor]:
        return [*self.keys.tensors(), *self.values.tensors()]


class _LibraryStore:
    """One layer of transformers' quantised cache."""

    def __init__(self, settings: Quant, keys: Tensor, values: Tensor) -> None:
        from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

        kind: Any = QuantoQuantizedLayer if settings.backend == "quanto" else HQQQuantizedLayer
        axis = 0 if settings.backend == "quanto" else 1  # the library's names for groups along a token's channels
        widths = [keys.shape[-1], values.shape[-1]]
        if settings.backend == "hqq" and settings.dtype == "int4":  # it packs groups in twos and loses an odd one
            widths = [width // 2 for width in widths]
        self.layer = kind(
            nbits=8 if settings.dtype == "int8" else 4,
            axis_key=axis,
            axis_value=axis,
            q_group_size=gcd(settings.group, *widths),
            residual_length=settings.residual,
        )
        self.empty = keys[:, :0].clone(), values[:, :0].clone()
        if keys.shape[1]:
            self.append(keys, values)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.layer.update(keys[None], values[None])

    def dense(self) -> tuple[Tensor, Tensor]:
        import torch

        if not self.layer.is_initialized:
            return self.empty
        old = (self.layer._dequantize(x) for x in (self.layer._quantized_keys, self.layer._quantized_values))
        new = (self.layer.keys, self.layer.values)
        keys, values = (torch.cat([a, b], 2) if b.dim() == 4 else a for a, b in zip(old, new, strict=True))
        return keys[0], values[0]

    def payload(self) -> int:
        from kvcli.methods._stores import payload_of

        return payload_of(self.tensors())

    def tensors(self) -> list[Tensor]:
        layer = self.layer
        if not layer.is_initialized:
            return list(self.empty)
        return [*_plain(layer._quantized_keys), *_plain(layer._quantized_values), layer.keys, layer.values]


def _plain(held: Any) -> list[Tensor]:
    """The tensors inside what a library made of one: codes, scales and zero points."""
    import torch

    if isinstance(held, tuple):  # hqq: codes and a dict of what belongs to them
        return [held[0], *(x for x in held[1].values() if isinstance(x, torch.Tensor))]
    if hasattr(held, "__tensor_flatten__"):  # quanto: a tensor of tensors
        return [x for name in held.__tensor_flatten__()[0] for x in _plain(getattr(held, name))]
    return [held]
