"""Finds a model's output projections W_o, which some methods weigh values with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""What families call it: Llama and its kin, OPT, GPT-NeoX, GPT-2, InternLM."""


def output_projection(model: nn.Module, width: int) -> Callable[[int], Tensor] | None:
    """layer -> W_o [hidden, H * D], float32 at least; None where any layer has no module of a known kind.

    width: H * D. An attention module is one that has a `layer_idx` and calls itself attention. Weights that are packed,
    as 4-bit ones are, count as unknown.
    """
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if layer is None or "attention" not in type(module).__name__.lower():
            continue
        projection = next((getattr(module, name) for name in NAMES if hasattr(module, name)), None)
        if projection is None or layer in found or not _reads(projection, width):
            return None
        found[layer] = projection
    if not found:
        return None

    def weight(layer: int) -> Tensor:
        matrix = _matrix(found[layer])
        return matrix.double() if matrix.dtype.itemsize == 8 else matrix.float()

    return weight


def _reads(projection: Any, width: int) -> bool:
    """Whether it multiplies `width` values with a plain matrix."""
    weight = getattr(projection, "weight", None)
    if weight is None or weight.dim() != 2 or weight.dtype.itemsize < 2 or not weight.dtype.is_floating_point:
        return False
    return _matrix(projection).shape[1] == width


def _matrix(projection: Any) -> Tensor:
    """[hidden, H * D]."""
    matrix: Tensor = projection.weight.detach()
    return matrix.T if type(projection).__name__ == "Conv1D" else matrix  # GPT-2 keeps its matrices transposed
