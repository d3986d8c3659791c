"""A prefill in which tokens drop out between layers: what left is not computed in deeper layers.

Hooks on the decoder layers take the hidden states, rotations and positions of the tokens that are left; kvcli's
attention sees shorter and shorter sequences. Among these it is causal by order; positions stay true. A layer's cache
holds what entered it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvcli.attention import backends, reference
from kvcli.attention.patch import patched
from kvcli.attention.received import summed_received
from kvcli.cache.budget import Budget
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model

PER_TOKEN = ("position_embeddings", "position_ids", "cache_position")
"""Arguments of decoder layers that hold something for each token of the text."""


class Plan(Protocol):
    """What a method settles for one prompt before its prefill. weights [w]: how much the newest w queries count."""

    @property
    def weights(self) -> Tensor: ...
    @property
    def flags(self) -> frozenset[str]: ...
    @property
    def notes(self) -> dict[str, Any]: ...


class Pruner(Protocol):
    """A method that drops tokens while the prompt is read (`kind = "in-prefill"`)."""

    def prefill_start(self, budget: Budget) -> Any:
        """A `Plan`; also what `prefill_keep` is given as state."""

    def prefill_keep(self, layer: int, received: Tensor, positions: Tensor, state: Any) -> Tensor:
        """Sorted indices (int64) of the tokens that go on behind a layer, the last one among them.

        received [H, m] float32 at least: the attention that each token still there received in this layer, summed over
        the newest queries with the plan's weights. positions [m]: where they stand in the prompt.
        """


@dataclass
class Pruned:
    """A prompt after such a prefill.

    keys, values: per layer [H_kv, m, D], m falling with depth; positions: per layer [m] on the CPU, true positions;
    logits [V] float32 behind the last token.
    """

    keys: list[Tensor]
    values: list[Tensor]
    positions: list[Tensor]
    logits: Tensor
    flags: frozenset[str] = frozenset()
    notes: dict[str, Any] = field(default_factory=dict)


def pruned_prefill(model: Model, ids: Sequence[int], method: Pruner, budget: Budget) -> Pruned:
    """Reads one prompt under a method that drops tokens on the way.

    Raises KvcliError for a family whose layers cannot go on with fewer tokens, ValueError for a method that does not
    keep its contract.
    """
    if model not in _CHECKED:
        _check_family(model)
        _CHECKED.add(model)
    return _run(model, ids, method, budget)


@torch.inference_mode()
def _run(model: Model, ids: Sequence[int], method: Pruner, budget: Budget) -> Pruned:
    plan = method.prefill_start(budget)
    state = _Pruning(model, len(ids), method, plan)
    cache = DynamicCache()
    with patched(model.hf, state), state.hooked():
        logits = _logits(model, ids, past_key_values=cache, use_cache=True)
    keys, values = [x.keys[0] for x in cache.layers], [x.values[0] for x in cache.layers]
    return Pruned(keys, values, state.positions, logits, plan.flags, dict(plan.notes))


def _logits(model: Model, ids: Sequence[int], **more: Any) -> Tensor:
    """[V] float32 behind the last token of a whole text."""
    text, last = torch.tensor([list(ids)], device=model.device), torch.tensor([len(ids) - 1], device=model.device)
    positions = torch.arange(len(ids), device=model.device)[None]
    return model.hf(text, position_ids=positions, logits_to_keep=last, **more).logits[0, 0].float()


class _Pruning:
    """Attention state of the prefill, and the hooks that shorten what enters the layers."""

    def __init__(self, model: Model, n: int, method: Pruner, plan: Plan) -> None:
        self.model, self.n, self.method, self.plan = model, n, method, plan
        self.layers = decoder_layers(model)
        self.positions = [torch.arange(n)]
        self.going = torch.arange(n)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        out, _ = backends.prefill(query, key, value, scaling, {}, self.model.attn)
        if layer + 1 < len(self.layers):
            weights = self.plan.weights
            if len(weights) > query.shape[2]:
                raise ValueError(f"layer {layer}: {len(weights)} weights for {query.shape[2]} tokens")
            received = summed_received(query[0, :, query.shape[2] - len(weights) :], key[0], weights, scaling)
            self.going = self.method.prefill_keep(layer, received, self.positions[layer], self.plan)
            _check(self.going, layer, query.shape[2])
        return out

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks are on the model for the length of the block, and off again after an error too."""
        handles = [x.register_forward_pre_hook(self._enter, with_kwargs=True) for x in self.layers[1:]]
        handles.append(self.layers[-1].register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """A layer's arguments with the tokens that go on: hidden states hold those left, all others the whole text."""
        named = {"hidden_states": args[0], **kwargs} if args else dict(kwargs)
        hidden = named.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != (1, len(self.positions[-1])):
            raise _refused(self.model, "their layers do not take hidden states [1, tokens, width]")
        for name, value in [*named.items(), *enumerate(args[1:], 1)]:
            if isinstance(value, Tensor) and name not in ("hidden_states", *PER_TOKEN) and self.n in value.shape:
                raise _refused(self.model, f"argument {name} of their layers holds something for each token")
        hidden = hidden.index_select(1, self.going.to(hidden.device))
        self.positions.append(self.positions[-1][self.going])
        taken = {name: self._of_tokens(kwargs[name], name) for name in PER_TOKEN if kwargs.get(name) is not None}
        if args:
            return (hidden, *args[1:]), {**kwargs, **taken}
        return args, {**kwargs, **taken, "hidden_states": hidden}

    def _of_tokens(self, value: Any, name: str) -> Any:
        """The part of a per-token argument that belongs to the tokens that are left."""
        if isinstance(value, tuple):
            return tuple(self._of_tokens(part, name) for part in value)
        axis = 1 if value.dim() > 1 else 0
        if value.shape[axis] != self.n:
            raise _refused(self.model, f"argument {name} of their layers has shape {list(value.shape)}")
        return value.index_select(axis, self.positions[-1].to(value.device))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The whole length again, zeros for tokens that left: what follows the layers reads the last token only."""
        hidden = output[0] if isinstance(output, tuple) else output
        whole = hidden.new_zeros(1, self.n, hidden.shape[-1])
        whole[:, self.positions[-1].to(hidden.device)] = hidden
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def decoder_layers(model: Model) -> list[nn.Module]:
    """The model's layers in order: the list whose i-th member holds the attention with `layer_idx` i."""
    for modules in model.hf.modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == model.shapes.layers:
            owned = [{getattr(part, "layer_idx", None) for part in layer.modules()} - {None} for layer in modules]
            if owned == [{i} for i in range(len(modules))]:
                return list(modules)
    raise _refused(model, "their decoder layers were not found")


def _check(going: Tensor, layer: int, m: int) -> None:
    """Raises ValueError unless the indices are sorted, unique, within the layer's m tokens and hold the last one."""
    if going.dtype != torch.long or going.dim() != 1 or not len(going) or int(going[-1]) != m - 1 or int(going[0]) < 0:
        raise ValueError(f"layer {layer}: prefill_keep must return int64 indices in 0..{m - 1}, {m - 1} among them")
    if not bool((going[1:] > going[:-1]).all()):
        raise ValueError(f"layer {layer}: the indices of prefill_keep are not sorted or repeat")


def _refused(model: Model, why: str) -> KvcliError:
    family = getattr(model.hf.config, "model_type", type(model.hf).__name__)
    what = f"models of family '{family}' cannot drop tokens while they read: {why}"
    return KvcliError(what, given=f"--model {model.name}", fix="a method that selects after the prefill: pyramidkv")


_CHECKED: WeakSet[Model] = WeakSet()
"""Models known to compute the same with tokens left out as with these tokens masked."""


def _check_family(model: Model) -> None:
    """Drops tokens from a short text and compares with the whole text under masks.

    A family that makes positions or masks from the length of what enters a layer would go wrong without an error.
    """
    from kvcli.models.wrapper import PROBE

    ids = [i % max(2, getattr(model.hf.config, "vocab_size", 2)) for i in PROBE]
    try:
        short = _run(model, ids, _Probe(), Budget(len(ids), len(ids), model.shapes.layers, 1))
        with torch.inference_mode(), patched(model.hf, _Masked(short.positions)):
            whole = _logits(model, ids, use_cache=False)
    except (KvcliError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # layers that need other arguments can fail in any way
        raise _refused(model, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}") from e
    room = {torch.float64: 1e-4, torch.float32: 1e-3}.get(model.dtype, 0.06) * (1 + whole.abs().max())
    if not bool((short.logits - whole).abs().max() <= room):
        raise _refused(model, "without a token they do not compute what they compute with the token masked")


@dataclass(frozen=True)
class _Settled:
    weights: Tensor
    flags: frozenset[str] = frozenset()
    notes: dict[str, Any] = field(default_factory=dict)


class _Probe:
    """Drops the second token behind each layer while more than two are left."""

    def prefill_start(self, budget: Budget) -> _Settled:
        return _Settled(torch.ones(1))

    def prefill_keep(self, layer: int, received: Tensor, positions: Tensor, state: _Settled) -> Tensor:
        m = len(positions)
        return torch.tensor([i for i in range(m) if i != 1 or m <= 2])


class _Masked:
    """Attention of all tokens in all layers, where only the given positions of a layer are keys for others."""

    def __init__(self, positions: list[Tensor]) -> None:
        self.positions = positions

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        n = query.shape[2]
        visible = torch.eye(n, dtype=torch.bool)  # a token that left sees itself: finite, and read by nobody
        visible[:, self.positions[layer]] = True
        p = reference.probabilities(query, key, scaling, (visible & reference.causal(n, n)).to(query.device))
        values = value.to(p.dtype).repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (p @ values).to(query.dtype)
