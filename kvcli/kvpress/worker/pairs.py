"""Which of a prompt's KV pairs a press left: what the layers wrote in the prefill, and where the rest stands in it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvcli.kvpress.worker import Refused


@dataclass
class Seen:
    """What one attention layer was given in a prefill, and the keys and values [1, H_kv, n, D] it wrote."""

    module: Any
    kwargs: dict[str, Any]
    keys: Any
    values: Any
    versions: tuple[int, int]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.kwargs["hidden_states"]))

    def kept(self, keys: Any, values: Any) -> list[Any]:
        """Per KV head the positions, ascending, of the pairs a press left. Raises Refused where these are not the
        prompt's own pairs."""
        name = f"layer {self.module.layer_idx}"
        if (self.keys._version, self.values._version) != self.versions:
            raise Refused(f"{name}: the press writes into the prompt's keys or values; kvcli takes only what it keeps")
        masked = getattr(self.module, "masked_key_indices", None)
        if masked is not None:
            self._check_whole(keys, values, masked, name)
            return not_masked(masked, self.keys.shape)
        return positions(self.keys[0], self.values[0], keys[0], values[0], name)

    def _check_whole(self, keys: Any, values: Any, masked: Any, name: str) -> None:
        """Raises Refused where a press that masks does not leave the prompt's pairs as they were. Pairs behind them
        are an extra pass's, which KVComposePress does not take back: they are not the prompt's, and not kept."""
        torch = importlib.import_module("torch")
        n = self.keys.shape[2]
        whole = torch.equal(keys[:, :, :n], self.keys) and torch.equal(values[:, :, :n], self.values)
        if not whole or (masked[2] >= n).any():
            raise Refused(f"{name}: the press masks, and what it leaves is not the prompt's whole cache")


def prefill(model: Any, ids: list[int]) -> Any:
    """kvpress's own call, without the output layer."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    cache = transformers.DynamicCache()
    model.model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache)
    return cache


@contextmanager
def watched(model: Any) -> Iterator[list[Seen]]:
    """Notes the first call of every attention layer, before any hook of a press acts on it."""
    seen: list[Seen] = []
    done: set[int] = set()

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if module.layer_idx in done:
            return
        done.add(module.layer_idx)
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        rest = {k: v for k, v in kwargs.items() if k != "past_key_values"}
        versions = (layer.keys._version, layer.values._version)
        seen.append(Seen(module, rest, layer.keys, layer.values, versions))

    hooks = [layer.self_attn.register_forward_hook(note, with_kwargs=True) for layer in layers(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def unmasked(model: Any) -> Iterator[None]:
    """No mask of an earlier prompt or press is left in a layer."""

    def clear() -> None:
        for layer in layers(model):
            layer.self_attn.masked_key_indices = None

    clear()
    try:
        yield
    finally:
        clear()


def layers(model: Any) -> Any:
    inner = model.model.language_model if hasattr(model.model, "language_model") else model.model
    return inner.layers


def not_masked(masked: Any, shape: Any) -> list[Any]:
    """Positions per head that kvpress's fake keys do not hide. masked: (batch, head, position) of each hidden pair."""
    torch = importlib.import_module("torch")
    stays = torch.ones(shape[1], shape[2], dtype=torch.bool)
    stays[masked[1].cpu(), masked[2].cpu()] = False
    return [head.nonzero()[:, 0] for head in stays]


def positions(keys: Any, values: Any, kept_keys: Any, kept_values: Any, name: str) -> list[Any]:
    """Where the kept rows stand among the prompt's, per head, ascending; compared bit by bit.

    keys, values [H, n, D]; kept ones [H, K, D], in any order. Of equal pairs (key and value) the first are taken.
    Raises Refused for a kept pair that is none of the prompt's.
    """
    torch = importlib.import_module("torch")
    heads, n = keys.shape[:2]
    if kept_keys.shape == keys.shape and torch.equal(kept_keys, keys) and torch.equal(kept_values, values):
        return [torch.arange(n)] * heads
    if kept_keys.shape[0] != heads or kept_keys.shape[1] > n or kept_keys.shape[:2] != kept_values.shape[:2]:
        raise Refused(f"{name}: the press returns {kept_keys.shape[1]} pairs for a prompt of {n}")
    dense, rest = _bits(keys, values), _bits(kept_keys, kept_values)
    ranks = torch.randint(-(2**62), 2**62, (dense.shape[-1],), generator=torch.Generator().manual_seed(0))
    ranks = ranks.to(dense.device) | 1
    marks, order = (dense * ranks).sum(-1).sort(dim=-1, stable=True)
    mine, which = (rest * ranks).sum(-1).sort(dim=-1, stable=True)
    again = torch.arange(mine.shape[1], device=mine.device) - torch.searchsorted(mine, mine)
    at = (torch.searchsorted(marks, mine) + again).clamp(max=n - 1)
    found = order.gather(1, at)
    width = dense.shape[-1]
    theirs = dense.gather(1, found.unsqueeze(-1).expand(-1, -1, width))
    ours = rest.gather(1, which.unsqueeze(-1).expand(-1, -1, width))
    if not torch.equal(theirs, ours):
        raise Refused(
            f"{name}: the press returns keys or values that are not the prompt's; kvcli takes only what it keeps"
        )
    return list(found.sort(-1).values.cpu())


def _bits(keys: Any, values: Any) -> Any:
    """[H, n, D_k + D_v] int64: the bits of each pair."""
    torch = importlib.import_module("torch")
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[keys.element_size()]
    return torch.cat([t.detach().contiguous().view(whole) for t in (keys, values)], -1).long()
