"""A prefill in which tokens drop out between layers: what left is not computed in deeper layers.

Hooks on the decoder layers take the hidden states, rotations and positions of the tokens that are left; kvcli's
attention sees shorter and shorter sequences. Among these it is causal by order; positions stay true. A layer's cache
holds what entered it. Several such prefills of one prompt share a pass (`pruned_prefills`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import DynamicCache

from kvcli.attention import reference
from kvcli.attention.patch import patched
from kvcli.cache.budget import Budget
from kvcli.errors import KvcliError
from kvcli.models.forks import Fork, Pruner, Pruning, refused

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model


@dataclass
class Pruned:
    """A prompt after such a prefill.

    keys, values: per layer [H_kv, m, D], m falling with depth; positions: per layer [m] on the CPU, true positions;
    logits [V] float32 behind the last token; state: per layer name -> [X, m, ...], what the method begins to generate
    with; facts: numbers it goes on with.
    """

    keys: list[Tensor]
    values: list[Tensor]
    positions: list[Tensor]
    logits: Tensor
    flags: frozenset[str] = frozenset()
    notes: dict[str, Any] = field(default_factory=dict)
    state: list[dict[str, Tensor]] = field(default_factory=list)
    facts: dict[str, int] = field(default_factory=dict)


class Asked(NamedTuple):
    """One prefill of a pass. decode: generated tokens will be compressed too (`Decoding`)."""

    method: Pruner
    budget: Budget
    decode: bool = False


def pruned_prefill(model: Model, ids: Sequence[int], method: Pruner, budget: Budget, decode: bool = False) -> Pruned:
    """Reads one prompt under a method that drops tokens on the way. decode: see `Asked`.

    Raises KvcliError for a family whose layers cannot go on with fewer tokens, ValueError for a method that does not
    keep its contract.
    """
    return pruned_prefills(model, ids, [Asked(method, budget, decode)])[0]


def pruned_prefills(model: Model, ids: Sequence[int], asked: Sequence[Asked | tuple[Pruner, Budget]]) -> list[Pruned]:
    """Reads one prompt under several methods or budgets in one pass; raises what `pruned_prefill` raises.

    All tokens enter the first layer, so it is computed once for all. Behind it the tokens that each keeps stand one
    after the other in one sequence without padding, and attend to their own only.
    """
    if model not in _CHECKED:
        _check_family(model)
        _CHECKED.add(model)
    return _run(model, ids, asked)


@torch.inference_mode()
def _run(model: Model, ids: Sequence[int], asked: Sequence[Asked | tuple[Pruner, Budget]]) -> list[Pruned]:
    wanted = [Asked(*one) for one in asked]
    forks = [Fork(one.method, one.method.prefill_start(one.budget), len(ids), one.decode) for one in wanted]
    state = Pruning(model, len(ids), forks)
    cache = DynamicCache()
    with patched(model.hf, state), state.hooked():
        logits = _logits(model, ids, past_key_values=cache, use_cache=True)
    keys = [_apart(x.keys[0], forks, layer) for layer, x in enumerate(cache.layers)]
    values = [_apart(x.values[0], forks, layer) for layer, x in enumerate(cache.layers)]
    return [
        Pruned([k[i] for k in keys], [v[i] for v in values], fork.positions, logits[i],
               fork.plan.flags, dict(fork.plan.notes), fork.state, dict(getattr(fork.plan, "facts", {})))
        for i, fork in enumerate(forks)
    ]  # fmt: skip


def _apart(x: Tensor, forks: list[Fork], layer: int) -> list[Tensor]:
    """[H_kv, tokens of all forks, D] of a layer -> each fork's own, in memory of its own; the first layer's is one."""
    if layer == 0 or len(forks) == 1:
        return [x] * len(forks)
    return [part.clone() for part in x.split([len(fork.positions[layer]) for fork in forks], 1)]


def _logits(model: Model, ids: Sequence[int], **more: Any) -> Tensor:
    """[forks, V] float32 behind the last token of a whole text."""
    text, last = torch.tensor([list(ids)], device=model.device), torch.tensor([len(ids) - 1], device=model.device)
    positions = torch.arange(len(ids), device=model.device)[None]
    return model.hf(text, position_ids=positions, logits_to_keep=last, **more).logits[:, 0].float()


_CHECKED: WeakSet[Model] = WeakSet()
"""Models known to compute the same with tokens left out as with these tokens masked."""


def _check_family(model: Model) -> None:
    """Drops tokens from a short text and compares with the whole text under masks.

    A family that makes positions or masks from the length of what enters a layer would go wrong without an error.
    Two forks, which drop other tokens: they must not reach each other either.
    """
    from kvcli.models.wrapper import PROBE

    ids = [i % max(2, getattr(model.hf.config, "vocab_size", 2)) for i in PROBE]
    budget = Budget(len(ids), len(ids), model.shapes.layers, 1)
    try:
        short = _run(model, ids, [(_Probe(1), budget), (_Probe(2), budget)])
        whole = [_masked(model, ids, one.positions) for one in short]
    except (KvcliError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # layers that need other arguments can fail in any way
        raise refused(model, f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}") from e
    for one, truth in zip(short, whole, strict=True):
        room = {torch.float64: 1e-4, torch.float32: 1e-3}.get(model.dtype, 0.06) * (1 + truth.abs().max())
        if not bool((one.logits - truth).abs().max() <= room):
            raise refused(model, "without a token they do not compute what they compute with the token masked")


@torch.inference_mode()
def _masked(model: Model, ids: Sequence[int], positions: list[Tensor]) -> Tensor:
    """[V] float32 behind a text whose tokens are all computed, where only these positions of a layer can be seen."""
    with patched(model.hf, _Masked(positions)):
        return _logits(model, ids, use_cache=False)[0]


@dataclass(frozen=True)
class _Settled:
    weights: Tensor
    flags: frozenset[str] = frozenset()
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Probe:
    """Drops the token of this index behind each layer while one is behind it."""

    index: int

    def prefill_start(self, budget: Budget) -> _Settled:
        return _Settled(torch.ones(1))

    def prefill_keep(self, layer: int, received: Tensor, positions: Tensor, state: _Settled) -> Tensor:
        m = len(positions)
        return torch.tensor([i for i in range(m) if i != self.index or m <= self.index + 1])


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
