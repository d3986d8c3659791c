"""Prunes all linear layers of a model's decoder layers, one decoder layer after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvcli.errors import KvcliError
from kvcli.weights.sparsegpt import Hessian, prune
from kvcli.weights.spec import SparseGPT


@dataclass(frozen=True)
class Report:
    """What pruning did. sparsity: measured share of zeros in the pruned matrices; of_model: those zeros over all of the
    model's parameters; dead: columns whose inputs were always zero."""

    sparsity: float
    of_model: float
    matrices: int
    parameters: int
    dead: int
    texts: int
    tokens: int

    def facts(self) -> dict[str, Any]:
        return asdict(self)


class Stopped(Exception):
    """The command was asked to stop between two layers."""


class _Caught(Exception):
    """Ends a forward pass once the first decoder layer's inputs are known."""


@dataclass
class _Text:
    """One calibration text between two decoder layers: its hidden states [1, n, D], and what else a layer is given."""

    hidden: Tensor
    args: tuple[Any, ...]
    named: dict[str, Any]

    def through(self, layer: nn.Module) -> Tensor:
        out = layer(self.hidden, *self.args, **self.named)
        return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def prune_model(
    hf: Any, sequences: Sequence[Sequence[int]], pruning: SparseGPT, *, given: str,
    between: Callable[[int, int], bool] = lambda done, layers: False,
) -> Report:  # fmt: skip
    """Prunes in place; what a pruned layer gives is what the next one reads. between(done, layers): True to stop.

    Raises Stopped, and KvcliError for a family whose layers cannot be run one by one or hold other matrices.
    """
    layers = _decoder_layers(hf, given)
    for layer in layers:  # all are looked at before the first is changed
        _check_matrices(layer, pruning, hf, given)
    texts = [_first_inputs(hf, layers[0], ids) for ids in sequences]
    _check_replay(hf, layers, sequences[0], given)
    zeros = size = matrices = dead = 0
    for number, layer in enumerate(layers):
        if between(number, len(layers)):
            raise Stopped
        linear = list(_linear(layer))
        hessians = _watched(layer, linear, texts)
        for (name, module), hessian in zip(linear, hessians, strict=True):
            turned = _is_conv1d(module)
            weight = module.weight.T if turned else module.weight
            try:
                done = prune(weight, hessian.value, pruning.share, pruning.pattern, pruning.block, pruning.damp)
            except ValueError as e:
                what = f"layer {number}, {name} cannot be pruned: {e}"
                raise KvcliError(what, given=given, fix="other --calib texts, or a larger damp") from e
            module.weight.copy_(done.weight.T if turned else done.weight)
            zeros, size = zeros + int((module.weight == 0).sum()), size + module.weight.numel()
            matrices, dead = matrices + 1, dead + done.dead
        for text in texts:
            text.hidden = text.through(layer)
    every = sum(p.numel() for p in hf.parameters())
    return Report(round(zeros / size, 8), round(zeros / every, 8), matrices, size, dead, len(texts),
                  sum(map(len, sequences)))  # fmt: skip


def _refused(hf: Any, why: str, given: str) -> KvcliError:
    family = getattr(hf.config, "model_type", type(hf).__name__)
    what = f"models of family '{family}' cannot be pruned: {why}"
    return KvcliError(what, given=given, fix="--weights dense, or a family of plain linear layers: llama, qwen2, ...")


def _decoder_layers(hf: Any, given: str) -> list[nn.Module]:
    count = hf.config.num_hidden_layers
    lists = [
        m for m in hf.modules() if isinstance(m, nn.ModuleList) and len(m) == count and any(True for _ in _linear(m))
    ]
    outer = [m for m in lists if not any(m is not other and m in set(other.modules()) for other in lists)]
    if len(outer) != 1:
        raise _refused(hf, f"its {count} decoder layers do not stand in one list", given)
    return list(outer[0])


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, which keeps its matrix transposed."""
    return type(module).__name__ == "Conv1D"


def _linear(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            yield name, module


def _check_matrices(layer: nn.Module, pruning: SparseGPT, hf: Any, given: str) -> None:
    """Every matrix of a decoder layer must be one that is pruned: else the sparsity would not be what it says."""
    known = {id(module.weight) for _, module in _linear(layer)}
    for name, parameter in layer.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in known:
            raise _refused(hf, f"{name} is not the matrix of a linear layer", given)
    for name, module in _linear(layer):
        columns = module.weight.shape[0 if _is_conv1d(module) else 1]
        if pruning.pattern and columns % pruning.pattern[1]:
            raise _refused(hf, f"{name} has {columns} columns, no whole groups of {pruning.pattern[1]}", given)


def _first_inputs(hf: Any, first: nn.Module, ids: Sequence[int]) -> _Text:
    """What the first decoder layer is called with."""
    caught: list[_Text] = []

    def catch(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        hidden = args[0] if args else named.pop("hidden_states")
        caught.append(_Text(hidden, args[1:], named))
        raise _Caught

    with _hook(first.register_forward_pre_hook(catch, with_kwargs=True)):
        try:
            _whole(hf, ids)
        except _Caught:
            pass
    return caught[0]


def _whole(hf: Any, ids: Sequence[int]) -> None:
    hf(torch.tensor([list(ids)], device=hf.device), use_cache=False)


def _check_replay(hf: Any, layers: Sequence[nn.Module], ids: Sequence[int], given: str) -> None:
    """The layers one by one must give what the whole model's pass has behind its last layer."""
    own: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        own.append(out[0] if isinstance(out, tuple) else out)

    with _hook(layers[-1].register_forward_hook(keep)):
        _whole(hf, ids)
    text = _first_inputs(hf, layers[0], ids)
    for layer in layers:
        text.hidden = text.through(layer)
    room = 1e-5 if text.hidden.dtype.itemsize >= 4 else 1e-2
    if not bool((text.hidden - own[0]).abs().max() <= room * (1 + own[0].abs().max())):
        raise _refused(hf, "its layers give other outputs one by one than in the whole model", given)


def _watched(layer: nn.Module, linear: Sequence[tuple[str, Any]], texts: Sequence[_Text]) -> list[Hessian]:
    """One Hessian per linear layer, over all texts run through the decoder layer as it is."""
    found = [Hessian(m.weight.shape[0 if _is_conv1d(m) else 1], m.weight) for _, m in linear]
    hooks = [
        module.register_forward_pre_hook(lambda module, args, hessian=hessian: hessian.add(args[0]))
        for (_, module), hessian in zip(linear, found, strict=True)
    ]
    try:
        for text in texts:
            text.through(layer)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
