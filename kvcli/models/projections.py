"""Finds a model's output projections W_o, which some methods weigh values with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""What families call it: Llama and its kin, OPT, GPT-NeoX, GPT-2, InternLM."""


def output_projection(model: nn.Module, width: int) -> Callable[[int], Tensor] | None:
    """layer -> W_o [hidden, H * D], float32 at least; None where no module of this kind is known.

    width: H * D. An attention module is one that has a `layer_idx` and calls itself attention.
    """
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if layer is None or "attention" not in type(module).__name__.lower():
            continue
        projection = next((getattr(module, name) for name in NAMES if hasattr(module, name)), None)
        if projection is None or layer in found:
            return None
        found[layer] = projection
    if not found:
        return None

    def weight(layer: int) -> Tensor:
        projection: Any = found[layer]
        matrix: Tensor = projection.weight.detach()
        if type(projection).__name__ == "Conv1D":  # GPT-2 keeps its matrices transposed
            matrix = matrix.T
        if matrix.shape[-1] != width:
            raise ValueError(f"layer {layer}: the output projection reads {matrix.shape[-1]} values, not {width}")
        return matrix.double() if matrix.dtype.itemsize == 8 else matrix.float()

    return weight
