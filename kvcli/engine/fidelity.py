"""How far a compressed cache moves the model's predictions, on the answer that `full` itself gave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.workspace import Workspace
from kvcli.engine.generate import Ask, Build

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model

MOST_TOKENS = 256
"""Of full's answer so many tokens are compared; later ones follow from the same caches and would cost more memory."""
WIDE = 1 << 16
"""As many tokens at a time as there are."""
_LOGITS = 1 << 24
"""Logits computed at a time."""


@dataclass
class Reference:
    """Full's own answer to one prompt: its token ids, and the logits [T, V] that `full` predicts them with;
    `given`: all of them but the first, which came from the prefill."""

    ids: list[int]
    logits: Tensor
    given: bool

    def logits_for(self, ask: Ask) -> Tensor:
        """The predictions that this row makes too."""
        return self.logits if self.given or ask.start.given is None else self.logits[1:]


@dataclass(frozen=True)
class Distance:
    """Means over `tokens` teacher-forced tokens. kl: KL(full || compressed) in nats; top1: share of equal most likely
    tokens; nll: by how many nats per token full's answer became less likely."""

    kl: float
    top1: float
    nll: float
    tokens: int


def same(tokens: int) -> Distance | None:
    """Of `full` from itself."""
    return Distance(0.0, 1.0, 0.0, tokens) if tokens else None


@dataclass(frozen=True)
class Forced:
    """Tokens to feed from a row's start on: those behind the first `skip` predict the tokens `right`, one each."""

    fed: list[int]
    right: list[int]
    skip: int = 0


def forced(ask: Ask, ids: Sequence[int]) -> Forced:
    """An answer's tokens fed to a row that predicts them; all but the first where that came from the prefill."""
    ids, start = list(ids[:MOST_TOKENS]), ask.start
    if start.given is not None:
        return Forced(ids[:-1], ids[1:])
    return Forced([start.token, *start.follow, *ids[:-1]], ids, len(start.follow))


@torch.inference_mode()
def reference(model: Model, ask: Ask, ids: list[int], memory: Workspace) -> Reference:
    """Full's predictions on its own answer `ids`. ask: a row of `full`."""
    given = forced(ask, ids)
    parts = []
    if given.fed:
        cache = CompressedCache([ask.row], [len(given.fed)], memory)
        parts = [logits[0] for _, logits in passes(model, cache, [ask.start.position], [given.fed], WIDE)]
    logits = torch.cat(parts)[given.skip :] if parts else torch.empty(0, model.vocabulary)
    return Reference(list(ids), logits, ask.start.given is not None)


@torch.inference_mode()
def distances(
    model: Model, asks: Sequence[Ask], answers: Sequence[Reference], memory: Workspace, build: Build, *, one: bool
) -> list[Distance | None]:
    """Teacher-forced on full's answers through the caches of `asks`, all rows together; None for answers of one token
    that was taken from the prefill. one: the caches take one token at a time."""
    given = [forced(ask, ref.ids) for ask, ref in zip(asks, answers, strict=True)]
    sums = torch.zeros(len(asks), 3, dtype=torch.double, device=model.device)
    longest = max(len(g.fed) for g in given)
    if longest:
        cache = build([ask.row for ask in asks], [longest] * len(asks), memory)
        begins = [ask.start.position for ask in asks]
        for first, logits in passes(model, cache, begins, [g.fed for g in given], 1 if one else WIDE):
            for r, (ref, g) in enumerate(zip(answers, given, strict=True)):
                begin, end = max(first, g.skip), min(first + logits.shape[1], len(g.fed))
                if begin < end:
                    mine = slice(begin - g.skip, end - g.skip)
                    seen = logits[r, begin - first : end - first]
                    sums[r] += _compare(ref.logits_for(asks[r])[mine], seen, g.right[mine])
    return [_mean(sums[r], len(g.right)) if g.right else None for r, g in enumerate(given)]


def _mean(sums: Tensor, tokens: int) -> Distance:
    kl, top1, nll = (sums / tokens).tolist()
    return Distance(kl, top1, nll, tokens)


def with_first(distance: Distance | None, full: Tensor, other: Tensor, first: int) -> Distance:
    """The figures with the answer's first token among them, for a row whose own prefill predicted it: logits [V]."""
    kl, top1, nll = _compare(full[None], other[None], [first]).tolist()
    if distance is None:
        return Distance(kl, top1, nll, 1)
    n = distance.tokens
    mean = [(a * n + b) / (n + 1) for a, b in ((distance.kl, kl), (distance.top1, top1), (distance.nll, nll))]
    return Distance(mean[0], mean[1], mean[2], n + 1)


def passes(
    model: Model, cache: CompressedCache, begins: Sequence[int], fed: Sequence[list[int]], width: int
) -> Iterator[tuple[int, Tensor]]:
    """Feeds tokens to the rows of a cache, row r from position begins[r] on; rows that end early see padding.

    Yields (index of the first token, logits [R, up to width, V]) pass by pass.
    """
    longest = max(map(len, fed))
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in fed])
    begin = torch.tensor([[at] for at in begins])
    width = max(1, min(width, _LOGITS // (len(fed) * model.vocabulary)))
    for first in range(0, longest, width):
        part = tokens[:, first : first + width]
        yield first, model.step(part, begin + torch.arange(first, first + part.shape[1]), cache)


def _compare(full: Tensor, other: Tensor, right: list[int]) -> Tensor:
    """[3] sums over tokens of KL, agreement and rise in NLL. full, other [T, V] logits."""
    a, b = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (full, other))
    kl = (a.exp() * (a - b)).sum(-1).clamp_min(0)  # rounding may leave a divergence of -1e-8
    index = torch.tensor(right, device=a.device)[:, None]
    nll = (a.gather(1, index) - b.gather(1, index))[:, 0]
    return torch.stack([kl.sum(), (a.argmax(-1) == b.argmax(-1)).sum(), nll.sum()]).double()
