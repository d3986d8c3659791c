"""Hooks that shorten what enters a model's layers, for one or several prefills of the same prompt.

The first layer is computed once for all. Behind it the tokens that each fork keeps stand one after the other in one
sequence without padding, and attend to their own only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from kvcli.attention import backends
from kvcli.attention.received import summed_received
from kvcli.attention.reference import causal
from kvcli.errors import KvcliError

if TYPE_CHECKING:
    from kvcli.cache.budget import Budget
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


class Decoding(Protocol):
    """What a `Pruner` that also compresses generated tokens has beside it. Its plan has `facts`: name -> number, for
    `Generating.facts`."""

    def prefill_state(self, layer: int, recent: Tensor, positions: Tensor, state: Any) -> dict[str, Tensor]:
        """Its figures for the m tokens that a layer caches, as generation begins: name -> [X, m, ...].

        recent [w, m] float32 at least: attention of each of the newest w queries in this layer, averaged over heads.
        """


class Pruner(Protocol):
    """A method that drops tokens while the prompt is read (`kind = "in-prefill"`)."""

    def prefill_start(self, budget: Budget) -> Any:
        """A `Plan`; also what `prefill_keep` is given as state."""

    def prefill_keep(self, layer: int, received: Tensor, positions: Tensor, state: Any) -> Tensor:
        """Sorted indices (int64) of the tokens that go on behind a layer, the last one among them.

        received [H, m] float32 at least: the attention that each token still there received in this layer, summed over
        the newest queries with the plan's weights. positions [m]: where they stand in the prompt.
        """


class Fork:
    """One of the prefills of a pass. positions: per layer so far those that entered it; at: where the newest of these
    stand in the sequence of all forks; going: which of them go on; state: per layer what its method begins to generate
    with, where it compresses generated tokens (`decode`)."""

    def __init__(self, method: Pruner, plan: Plan, n: int, decode: bool = False) -> None:
        self.method, self.plan = method, plan
        self.decoding: Decoding | None = method if decode else None  # type: ignore[assignment]
        self.positions = [torch.arange(n)]
        self.state: list[dict[str, Tensor]] = []
        self.at = slice(0, n)
        self.going = torch.arange(n)

    def look(self, layer: int, query: Tensor, key: Tensor, scaling: float, last: bool) -> None:
        """Asks the method who goes on, and what it begins to generate with. query [H, m, D] and key [H_kv, m, D]: its
        own tokens; last: no layer is behind this one."""
        if not last:
            self.choose(layer, query, key, scaling)
        if self.decoding is not None:
            newest = max(0, query.shape[1] - len(self.plan.weights))
            recent = averaged(query[:, newest:], key, scaling)
            self.state.append(self.decoding.prefill_state(layer, recent, self.positions[layer], self.plan))

    def choose(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        weights, m = self.plan.weights, query.shape[1]
        if len(weights) > m:
            raise ValueError(f"layer {layer}: {len(weights)} weights for {m} tokens")
        received = summed_received(query[:, m - len(weights) :], key, weights, scaling)
        self.going = self.method.prefill_keep(layer, received, self.positions[layer], self.plan)
        _check(self.going, layer, m)

    def enter(self, begin: int) -> None:
        """Those that go on enter the next layer, from this place in the sequence of all forks on."""
        self.positions.append(self.positions[-1][self.going])
        self.at = slice(begin, begin + len(self.going))


class Pruning:
    """Attention state of the pass, and its hooks."""

    def __init__(self, model: Model, n: int, forks: list[Fork]) -> None:
        self.model, self.n, self.forks = model, n, forks
        self.layers = decoder_layers(model)
        self.entered = n
        """Tokens of all forks in the newest layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        out: list[Tensor] = []
        for fork in self.forks:
            q, k, v = (x[:, :, fork.at] for x in (query, key, value))
            if layer or not out:
                out.append(backends.prefill(q, k, v, scaling, {}, self.model.attn)[0])
            fork.look(layer, q[0], k[0], scaling, layer + 1 == len(self.layers))
        return torch.cat(out, 2) if len(out) > 1 else out[0]

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
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != (1, self.entered):
            raise refused(self.model, "their layers do not take hidden states [1, tokens, width]")
        for name, value in [*named.items(), *enumerate(args[1:], 1)]:
            if isinstance(value, Tensor) and name not in ("hidden_states", *PER_TOKEN) and self.n in value.shape:
                raise refused(self.model, f"argument {name} of their layers holds something for each token")
        going = torch.cat([fork.at.start + fork.going for fork in self.forks])
        hidden = hidden.index_select(1, going.to(hidden.device))
        self.entered = 0
        for fork in self.forks:
            fork.enter(self.entered)
            self.entered = fork.at.stop
        taken = {name: self._of_tokens(kwargs[name], name) for name in PER_TOKEN if kwargs.get(name) is not None}
        if args:
            return (hidden, *args[1:]), {**kwargs, **taken}
        return args, {**kwargs, **taken, "hidden_states": hidden}

    def _of_tokens(self, value: Any, name: str) -> Any:
        """The parts of a per-token argument that belong to the tokens that are left."""
        if isinstance(value, tuple):
            return tuple(self._of_tokens(part, name) for part in value)
        axis = 1 if value.dim() > 1 else 0
        if value.shape[axis] != self.n:
            raise refused(self.model, f"argument {name} of their layers has shape {list(value.shape)}")
        left = torch.cat([fork.positions[-1] for fork in self.forks])
        return value.index_select(axis, left.to(value.device))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The whole length again, a row for each fork: what follows the layers reads the last token only."""
        hidden = output[0] if isinstance(output, tuple) else output
        whole = hidden.new_zeros(len(self.forks), self.n, hidden.shape[-1])
        whole[:, -1] = hidden[0, [fork.at.stop - 1 for fork in self.forks]]
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def averaged(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[Q, S] float32 at least: attention of the last Q of S tokens, averaged over heads, one head at a time.

    query [H, Q, D]; key [H_kv, S, D], seen causally.
    """
    heads, new = query.shape[:2]
    keys = key.to(torch.promote_types(key.dtype, torch.float32))
    future = ~causal(new, key.shape[1]).to(key.device)
    total = keys.new_zeros(future.shape)
    for h in range(heads):
        scores = query[h].to(keys.dtype) @ keys[h * len(keys) // heads].T * scaling
        total += scores.masked_fill_(future, float("-inf")).softmax(-1)
    return total / heads


def decoder_layers(model: Model) -> list[nn.Module]:
    """The model's layers in order: the list whose i-th member holds the attention with `layer_idx` i."""
    for modules in model.hf.modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == model.shapes.layers:
            owned = [{getattr(part, "layer_idx", None) for part in layer.modules()} - {None} for layer in modules]
            if owned == [{i} for i in range(len(modules))]:
                return list(modules)
    raise refused(model, "their decoder layers were not found")


def _check(going: Tensor, layer: int, m: int) -> None:
    """Raises ValueError unless the indices are sorted, unique, within the layer's m tokens and hold the last one."""
    if going.dtype != torch.long or going.dim() != 1 or not len(going) or int(going[-1]) != m - 1 or int(going[0]) < 0:
        raise ValueError(f"layer {layer}: prefill_keep must return int64 indices in 0..{m - 1}, {m - 1} among them")
    if not bool((going[1:] > going[:-1]).all()):
        raise ValueError(f"layer {layer}: the indices of prefill_keep are not sorted or repeat")


def refused(model: Model, why: str) -> KvcliError:
    family = getattr(model.hf.config, "model_type", type(model.hf).__name__)
    what = f"models of family '{family}' cannot drop tokens while they read: {why}"
    return KvcliError(what, given=f"--model {model.name}", fix="a method that selects after the prefill: pyramidkv")
