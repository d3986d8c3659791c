"""Finds a model's output projections W_o, which some methods weigh values with, and its key and value projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model

NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""What families call it: Llama and its kin, OPT, GPT-NeoX, GPT-2, InternLM."""
FUSED = ("qkv_proj", "query_key_value", "Wqkv", "wqkv")
"""What families call one matrix for queries, keys and values: Phi-3, GPT-NeoX, MPT, InternLM."""
UNKNOWN = "key and value projections that are known"
CHANGED = "keys that are what their projection gives, rotated (here a norm, a scale or no rotation comes between)"


def output_projection(model: nn.Module, width: int) -> Callable[[int], Tensor] | None:
    """layer -> W_o [hidden, H * D], float32 at least; None where any layer has no module of a known kind.

    width: H * D. An attention module is one that has a `layer_idx` and calls itself attention. Weights that are packed,
    as 4-bit ones are, count as unknown.
    """
    found: dict[int, nn.Module] = {}
    for layer, module in _attentions(model):
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


@dataclass(frozen=True)
class Rows:
    """Chosen rows of a projection: keys or values before RoPE of all KV heads side by side. at: their numbers."""

    projection: Any
    at: Tensor

    @property
    def rows(self) -> int:
        return len(self.at)

    def part(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Some of them, float64 on the CPU: weight [W, hidden] and bias [W], None without one."""
        at = self.at[rows]
        weight, bias = (None if x is None else x.detach().cpu()[at].double()
                        for x in (_matrix(self.projection), getattr(self.projection, "bias", None)))  # fmt: skip
        assert weight is not None
        return weight, None if bias is None or not bool(bias.any()) else bias

    def of(self, states: Tensor) -> Tensor:
        """What they give for states [n, hidden]."""
        weight, bias = self.part(slice(None))
        given = states.cpu().double() @ weight.T
        return given if bias is None else given + bias


Pair = tuple[Rows, Rows]
"""Of keys and of values."""


def key_value_projections(model: Model) -> list[Pair]:
    """Per layer. Each is held against the keys (turned back) and values that the model gives for a short text.

    Raises ValueError with what the model lacks: modules of a known kind, or keys that nothing changes between their
    projection and their rotation.
    """
    from kvcli.attention.capture import Needs
    from kvcli.models.wrapper import PROBE

    rope, attentions = model.rope, dict(_attentions(model.hf))
    candidates = {layer: list(_candidates(module, model, layer)) for layer, module in attentions.items()}
    if rope is None or sorted(candidates) != list(range(model.shapes.layers)) or not all(candidates.values()):
        raise ValueError(UNKNOWN)
    modules = {layer: pairs[0][1].projection for layer, pairs in candidates.items()}
    ids = [i % model.vocabulary for i in PROBE]
    with _inputs(modules) as states:
        dense = model.prefill([ids], Needs(), [len(ids)]).dense(0)
    at = torch.arange(len(ids), device=dense.keys[0].device)
    found = []
    for layer in range(model.shapes.layers):
        before = rope.move(dense.keys[layer], at, torch.zeros_like(at))
        known = [p for p in candidates[layer] if _gives(p[1], states[layer], dense.values[layer])]
        fit = [p for p in known if _gives(p[0], states[layer], before)]
        if not fit:
            raise ValueError(CHANGED if known else UNKNOWN)
        found.append(fit[0])
    return found


def _attentions(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Modules that have a `layer_idx` and call themselves attention, by layer."""
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if layer is not None and "attention" in type(module).__name__.lower():
            yield layer, module


def _candidates(module: nn.Module, model: Model, layer: int) -> Iterator[Pair]:
    """Where the rows of keys and of values may lie: in matrices of their own; in a fused one, behind all queries or,
    head by head, behind each head's query."""
    heads, kv_heads = model.shapes.heads, model.shapes.kv_heads[layer]
    value = kv_heads * model.shapes.value_width
    key = kv_heads * (model.shapes.widths[layer] - model.shapes.value_width)
    own = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
    if all(_plain(p) for p in own):
        if [len(_matrix(p)) for p in own] == [key, value]:
            yield Rows(own[0], torch.arange(key)), Rows(own[1], torch.arange(value))
        return
    fused = next((p for p in (getattr(module, name, None) for name in FUSED) if _plain(p)), None)
    if fused is None:
        return
    total, queries = len(_matrix(fused)), heads * (key // kv_heads)
    if total == queries + key + value:
        yield Rows(fused, torch.arange(queries, queries + key)), Rows(fused, torch.arange(queries + key, total))
        if heads == kv_heads and key == value:
            _, keys, values = torch.arange(total).view(heads, 3, -1).unbind(1)
            yield Rows(fused, keys.flatten()), Rows(fused, values.flatten())


def _gives(rows: Rows, states: Tensor, found: Tensor) -> bool:
    """Whether these rows make of states [n, hidden] what was found, [H_kv, n, D]."""
    wanted = found.transpose(0, 1).flatten(1).cpu().double()
    room = {torch.float64: 1e-5, torch.float32: 1e-4}.get(found.dtype, 0.02)  # of bfloat16 twice the rounding, and more
    return bool((rows.of(states) - wanted).norm() <= room * wanted.norm())


@contextmanager
def _inputs(modules: dict[int, Any]) -> Iterator[dict[int, Tensor]]:
    """What each module reads [n, hidden], of one row, once the model has run."""
    states: dict[int, Tensor] = {}

    def noted(layer: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda module, args: states.update({layer: args[0][0].detach()})

    hooks = [module.register_forward_pre_hook(noted(layer)) for layer, module in modules.items()]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _reads(projection: Any, width: int) -> bool:
    """Whether it multiplies `width` values with a plain matrix."""
    return _plain(projection) and _matrix(projection).shape[1] == width


def _plain(projection: Any) -> bool:
    """Whether it is a matrix of numbers that are not packed."""
    weight = getattr(projection, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype.itemsize >= 2 and (
        weight.dtype.is_floating_point)  # fmt: skip


def _matrix(projection: Any) -> Tensor:
    """[hidden, H * D]."""
    matrix: Tensor = projection.weight.detach()
    return matrix.T if type(projection).__name__ == "Conv1D" else matrix  # GPT-2 keeps its matrices transposed
