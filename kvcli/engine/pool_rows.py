"""Rows that go on being compressed while they generate: what may stay of each, and the clock of a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvcli.cache.budget import Budget
from kvcli.cache.rows import Kept, Row
from kvcli.grammar import round_half_up
from kvcli.methods.base import Method

State = dict[str, Tensor]

NO_CAP = 1 << 40
"""More pairs than any row will have: where a method's own rule says what leaves."""


POSITION_BYTES = 8
"""Of a slot's position in one KV head."""


@dataclass(frozen=True)
class Cap:
    """How many pairs of a KV head may stay after t generated tokens (docs/architecture.md).

    prompt: pairs of the prompt per KV head as an exact number (r_p n, or the --budget); ratio r_d or size N: what is
    kept of the generated tokens; fixed: the pool does not grow. least: never fewer generated ones (`separate`).
    own: the method's rule alone decides. strict: what is protected stays whole, `whole` pairs at least.
    """

    separate: bool
    prompt: Decimal
    ratio: Decimal | None = None
    size: int | None = None
    fixed: bool = False
    least: int = 1
    own: bool = False
    strict: bool = False
    whole: int = 0

    @classmethod
    def of(cls, decode: dict[str, Any], budget: Budget, method: Method) -> Cap:
        """decode: a cell's settings."""
        prompt = Decimal(budget.per_head) if budget.ratio is None else budget.ratio * budget.n
        ratio = Decimal(decode["ratio"]) if "ratio" in decode else None
        separate = method.decoding == "separate"
        fixed, own = decode.get("cap") == "fixed", method.decoding == "own"
        strict = budget.strict_window
        kept = method.decode_whole() if strict else 0
        return cls(separate, prompt, ratio, decode.get("budget"), fixed, method.decode_least(), own, strict, kept)

    def at(self, t: int) -> int:
        """Of the whole pool (unified) or of the generated tokens (separate)."""
        return NO_CAP if self.own else max(self.whole, self.asked(t))

    def asked(self, t: int) -> int:
        """The same by the settings alone."""
        if self.separate:
            size = self.size if self.size is not None else round_half_up((self.ratio or Decimal(0)) * t)
            return max(self.least, size)
        if self.fixed:
            return max(1, round_half_up(self.prompt))
        if self.size is not None:
            return max(1, round_half_up(self.prompt)) + min(t, self.size)
        return max(1, round_half_up(self.prompt + (self.ratio or 0) * t))

    @lru_cache(maxsize=256)  # noqa: B019  (rows of one batch have few different caps)
    def upto(self, tokens: int) -> list[int]:
        """at(0), ..., at(tokens)."""
        return [self.at(t) for t in range(tokens + 1)]


@dataclass
class PoolRow(Row):
    """A row that evicts while it generates. n: prompt tokens; state: per layer what `decode_start` gave; interval:
    tokens between two evictions; true: positions of the kept pairs in the prompt, where `kept` counts other ones;
    facts: per layer figures [H_kv] of whole heads; beyond: per layer [H_kv], how many pairs more than `cap` the pool of
    each head may hold; places: where `state` has the figures of the kept pairs, if not at their positions."""

    n: int = 0
    cap: Cap | None = None
    state: Sequence[State] = field(default_factory=tuple)
    interval: int = 1
    true: Kept | None = None
    facts: Sequence[State] = field(default_factory=tuple)
    beyond: Sequence[Tensor] = field(default_factory=tuple)
    places: Kept | None = None

    def most(self, layer: int, room: int) -> int:
        assert self.cap is not None
        beyond = int(self.beyond[layer].max()) if len(self.beyond) else 0
        again = max(self.lengths(layer)) + 1  # the last one may be fed again
        return _most(self.cap, again, self.interval, room, beyond)

    def beside(self, layer: int) -> tuple[int, int]:
        """A slot's position in each KV head and the method's figures; those of the last prompt token once more."""
        figures = sum(x[:, :1].numel() * x.element_size() for x in self.state[layer].values())
        return self.keys[layer].shape[0] * POSITION_BYTES + figures, figures


@lru_cache(maxsize=4096)
def _most(cap: Cap, start: int, interval: int, room: int, beyond: int = 0) -> int:
    """Pairs that a head of `start` pairs ever holds over `room` generated tokens."""
    frozen = start if cap.separate else beyond
    free = min(interval, room)  # tokens before the first eviction
    later = cap.upto(room)[free:]
    return max(start + free, *(min(start + t, frozen + size + interval) for t, size in enumerate(later, free)))


class Clock:
    """What all layers of a batch share: whose prompt is how long, how many tokens were generated, what may stay.

    n, newest, due [R, 1]; caps [R, T + 1].
    """

    def __init__(self, n: Tensor, interval: Tensor, caps: Tensor, strict: bool = False) -> None:
        self.n, self.interval, self.caps, self.strict = n, interval, caps, strict
        self.newest = self.t = torch.zeros_like(n)
        self.alive = torch.ones_like(n, dtype=torch.bool)
        self.due, self.anything_due = self.alive, False
        self._next: tuple[object, Clock] | None = None

    @classmethod
    def of(cls, rows: Sequence[PoolRow], rooms: Sequence[int]) -> Clock:
        device = rows[0].keys[0].device
        caps = [row.cap.upto(room) for row, room in zip(rows, rooms, strict=True) if row.cap is not None]
        long = max(map(len, caps))
        table = torch.tensor([c + c[-1:] * (long - len(c)) for c in caps], device=device)
        n, interval = (torch.tensor([[x] for x in xs], device=device) for xs in zip(
            *((row.n, row.interval) for row in rows), strict=True))  # fmt: skip
        return cls(n, interval, table, any(row.cap.strict for row in rows if row.cap is not None))

    def tick(self, positions: Tensor) -> None:
        """positions [R, 1]: of the tokens that are fed now."""
        self.newest, self.t = positions, (positions - self.n + 1).clamp(0, self.caps.shape[1] - 1)
        self.due = (self.t > 0) & (self.t % self.interval == 0) & self.alive
        self.anything_due = bool(self.due.any())

    @property
    def cap(self) -> Tensor:
        """[R, 1]: pairs that may stay now."""
        return self.caps.gather(1, self.t)

    def next(self, keep: Sequence[int], entering: Clock | None) -> Clock:
        """The clock of the reformed batch; the same one for all its layers."""
        key = (tuple(keep), id(entering))
        if self._next is None or self._next[0] != key:
            self._next = key, self._reformed(torch.tensor(keep, dtype=torch.long, device=self.n.device), entering)
        return self._next[1]

    def _reformed(self, keep: Tensor, entering: Clock | None) -> Clock:
        parts = [(self.n[keep], self.interval[keep], self.caps[keep])]
        if entering is not None:
            parts.append((entering.n, entering.interval, entering.caps))
        long = max(caps.shape[1] for _, _, caps in parts)
        wide = [torch.cat([c, c[:, -1:].expand(-1, long - c.shape[1])], 1) for _, _, c in parts]
        return Clock(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat(wide), self.strict)
