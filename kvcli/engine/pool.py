"""Caches whose rows go on being compressed while they generate: a freed slot takes the next token's pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvcli.cache.budget import Budget
from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import STORED_BYTES, Kept, Row, head_positions
from kvcli.cache.workspace import Workspace
from kvcli.grammar import round_half_up
from kvcli.methods.base import Method
from kvcli.methods.composed import merge_of
from kvcli.methods.generating import Generating

State = dict[str, Tensor]

NO_CAP = 1 << 40
"""More pairs than any row will have: where a method's own rule says what leaves."""


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


@lru_cache(maxsize=4096)
def _most(cap: Cap, start: int, interval: int, room: int, beyond: int = 0) -> int:
    """Pairs that a head of `start` pairs ever holds over `room` generated tokens."""
    frozen = start if cap.separate else beyond
    free = min(interval, room)  # tokens before the first eviction
    later = cap.upto(room)[free:]
    return max(start + free, *(min(start + t, frozen + size + interval) for t, size in enumerate(later, free)))


class PoolCache(CompressedCache):
    """Rows of one method with one set of settings, compressed after every `interval` generated tokens."""

    def __init__(self, method: Method, heads: int, rows: Sequence[PoolRow], room: Sequence[int], memory: Workspace):
        self.method, self.heads, self.merge = method, heads, merge_of(method)
        self.reads_attention = method.decode_reads
        super().__init__(rows, room, memory)

    def filled(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Pool]:
        clock = Clock.of(rows, rooms)  # type: ignore[arg-type]
        return [Pool.of(clock, layer, rows, rooms) for layer in range(rows[0].layers)]  # type: ignore[arg-type]

    def begin(self, positions: Tensor) -> None:
        if positions.shape[1] != 1:
            raise ValueError("a cache that evicts while generating takes one token at a time")
        self.layers[0].slots.clock.tick(positions)
        self._texts: list[str] | None = None

    def texts(self) -> list[str]:
        """Of the tokens that are fed now, row by row."""
        if self._texts is None:
            assert self.newest_texts is not None
            self._texts = self.newest_texts()
        return self._texts

    def settle(self, layer: int, attention: Tensor | None) -> None:
        pool: Pool = self.layers[layer].slots
        view = pool.view(layer, self.heads, attention)
        used = view.position.shape[2]
        view.keys, view.values = self.layers[layer]._keys[:, :, :used], self.layers[layer]._values[:, :, :used]
        view.texts = self.texts
        self.method.decode_update(view)
        if pool.clock.anything_due:
            gone = self._leaving(view, pool.clock.due)
            if self.merge is not None:
                self.merge.decode_fold(view, gone)
            pool.free(gone)

    def _leaving(self, view: Generating, due: Tensor) -> Tensor:
        """[R, H_kv, S] bool. due [R, 1]"""
        if self.method.decoding == "own":
            return self.method.decode_leaves(view) & (view.position >= 0) & due[..., None]
        over = (view.competing.sum(-1) - view.cap[:, :, 0]).clamp_min(0) * due
        return lowest(self.method.decode_rank(view), view.position, view.competing, over)

    def payload(self, row: int) -> int:
        return sum(
            int((layer.slots.position[row] >= 0).sum())
            * (layer._keys.shape[-1] + layer._values.shape[-1])
            * STORED_BYTES
            for layer in self.layers
        )


def lowest(rank: Tensor, position: Tensor, competing: Tensor, count: Tensor) -> Tensor:
    """bool [R, H_kv, S]: the `count` [R, H_kv] lowest-ranked competing pairs, of equal ones the newest; +inf last.

    count: at most as many as compete.
    """
    rank = rank.nan_to_num(float("-inf"), float("inf"), float("-inf")).masked_fill(~competing, float("inf"))
    if int(count.max()) <= 1:
        tie = (rank == rank.amin(-1, keepdim=True)) & competing
        newest = position.where(tie, -1).amax(-1, keepdim=True)
        return tie & (position == newest) & (count[..., None] > 0)
    order = position.argsort(dim=-1, descending=True, stable=True)
    for key in (rank, (~competing).to(torch.uint8)):  # the last sort decides first
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))
    first = torch.arange(rank.shape[-1], device=rank.device) < count[..., None]
    return torch.zeros_like(competing).scatter(-1, order, first)


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


class Pool:
    """Which slots of one layer hold which positions, and the method's figures for them.

    position [R, H_kv, S] int64, -1 where empty; state[name] [R, X, S, ...]; last[name] [R, X, ...]: the figures of the
    last prompt token, for rows that feed it again; facts[name] [R, H_kv]: of whole heads; beyond [R, H_kv]: pairs that
    a head may hold above the cap; None where no row has such. The first free slot is taken first.
    """

    def __init__(self, clock: Clock, separate: bool, position: Tensor, state: State, last: State, facts: State,
                 beyond: Tensor | None, longest: list[int], most: list[int]) -> None:  # fmt: skip
        self.clock, self.separate, self.position, self.state, self.last = clock, separate, position, state, last
        self.facts, self.beyond, self.longest, self.most = facts, beyond, longest, most

    @classmethod
    def of(cls, clock: Clock, layer: int, rows: Sequence[PoolRow], rooms: Sequence[int]) -> Pool:
        heads, device = rows[0].keys[layer].shape[0], rows[0].keys[layer].device
        longest = [max(row.lengths(layer)) for row in rows]
        most = [row.most(layer, room) for row, room in zip(rows, rooms, strict=True)]
        position = torch.full((len(rows), heads, max(most)), -1, device=device)
        state: State = {}
        last: State = {}
        for name, first in rows[0].state[layer].items():
            given = [row.state[layer][name] for row in rows]
            wide = _widest([x.shape[2:] for x in given])
            state[name] = first.new_zeros(len(rows), first.shape[0], max(most), *wide)
            last[name] = torch.stack([_sized(x[:, -1], (x.shape[0], *wide)) for x in given])
        for r, row in enumerate(rows):
            true = row.kept if row.true is None else row.true
            places = true if row.places is None else row.places
            pairs = zip(head_positions(true[layer], heads), head_positions(places[layer], heads), strict=True)
            for head, (kept, at) in enumerate(pairs):
                position[r, head, : len(kept)] = kept.to(device)
                for name, target in state.items():
                    for x in _heads_of(head, heads, target.shape[1]):
                        figures = row.state[layer][name][x, at.to(device)]
                        target[r, x][tuple(map(slice, figures.shape))] = figures
        separate = rows[0].cap is not None and rows[0].cap.separate
        names = rows[0].facts[layer] if len(rows[0].facts) else {}
        facts = {name: torch.stack([row.facts[layer][name].to(device) for row in rows]) for name in names}
        beyond = torch.stack([row.beyond[layer].to(device) for row in rows]) if len(rows[0].beyond) else None
        return cls(clock, separate, position, state, last, facts, beyond, longest, most)

    @property
    def slots(self) -> int:
        return max(self.position.shape[2], 1)

    def used(self, new: int) -> int:
        return max(min(have + new, most) for have, most in zip(self.longest, self.most, strict=True))

    def segments(self, new: int, waste: int) -> list[tuple[int, int, int]]:
        return [(0, len(self.most), self.used(new))]

    def take(self, new: int) -> Tensor:
        """[R, H_kv, 1]: the first free slot of each head, which is the newest token's from now on."""
        slot = (self.position < 0).to(torch.uint8).argmax(-1, keepdim=True)
        self.position.scatter_(2, slot, self.clock.newest[:, :, None].expand_as(slot))
        again = self.clock.t == 0
        for name, target in self.state.items():
            figures = self.last[name]
            index = _spread(slot, target.shape[1])
            index = index.view(*index.shape, *[1] * (target.dim() - 3)).expand(*index.shape, *target.shape[3:])
            fresh = figures * again.view(-1, *[1] * (figures.dim() - 1))
            target.scatter_(2, index, fresh.unsqueeze(2).to(target.dtype))
        return slot

    def visible(self, new: int) -> Tensor:
        return (self.position[:, :, : self.used(new)] >= 0)[:, :, None]

    def view(self, layer: int, heads: int, attention: Tensor | None) -> Generating:
        used, clock = self.used(1), self.clock
        position = self.position[:, :, :used]
        competing = position >= (clock.n[:, :, None] if self.separate else 0)
        cap = clock.cap if self.beyond is None else (clock.cap + self.beyond).clamp_min(1)
        return Generating(
            layer, heads, position, competing, attention, clock.n[:, :, None], clock.newest[:, :, None],
            cap[:, :, None], (clock.t > 0)[:, :, None], {k: v[:, :, :used] for k, v in self.state.items()},
            facts=self.facts, strict=clock.strict,
        )  # fmt: skip

    def free(self, gone: Tensor) -> None:
        """gone bool [R, H_kv, used]."""
        used = gone.shape[2]
        self.position[:, :, :used].masked_fill_(gone, -1)
        for target in self.state.values():
            mask = _spread(gone, target.shape[1])
            target[:, :, :used].masked_fill_(mask.view(*mask.shape, *[1] * (target.dim() - 3)), 0)

    def advance(self, new: int) -> None:
        self.longest = [min(have + new, most) for have, most in zip(self.longest, self.most, strict=True)]

    def release(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.position.device)
        self.position.index_fill_(0, index, -1)
        self.clock.alive.index_fill_(0, index, False)
        for row in rows:
            self.longest[row] = self.most[row] = 0

    def reformed(self, keep: Sequence[int], entering: Pool | None) -> Pool:
        index = torch.tensor(keep, dtype=torch.long, device=self.position.device)
        longest, most = [self.longest[r] for r in keep], [self.most[r] for r in keep]
        pools = [(self.position[index], {k: v[index] for k, v in self.state.items()},
                  {k: v[index] for k, v in self.last.items()})]  # fmt: skip
        facts = {k: v[index] for k, v in self.facts.items()}
        beyond = None if self.beyond is None else self.beyond[index]
        clock = self.clock.next(keep, None if entering is None else entering.clock)
        if entering is not None:
            longest, most = longest + entering.longest, most + entering.most
            pools.append((entering.position, entering.state, entering.last))
            facts = {k: torch.cat([v, entering.facts[k]]) for k, v in facts.items()}
            if beyond is not None and entering.beyond is not None:
                beyond = torch.cat([beyond, entering.beyond])
        slots = max(most)
        position = torch.cat([_sized(p, (*p.shape[:2], slots), -1) for p, _, _ in pools])
        state: State = {}
        last: State = {}
        for k in self.state:
            wide = _widest([s[k].shape[3:] for _, s, _ in pools])
            state[k] = torch.cat([_sized(s[k], (*s[k].shape[:2], slots, *wide)) for _, s, _ in pools])
            last[k] = torch.cat([_sized(x[k], (*x[k].shape[:2], *wide)) for _, _, x in pools])
        return Pool(clock, self.separate, position, state, last, facts, beyond, longest, most)


def _heads_of(kv_head: int, kv_heads: int, figures: int) -> range:
    """Which of X heads of figures belong to a KV head."""
    group = max(1, figures // kv_heads)
    return range(kv_head * group, (kv_head + 1) * group) if figures >= kv_heads else range(1)


def _spread(x: Tensor, figures: int) -> Tensor:
    """[R, H_kv, ...] -> [R, X, ...] for figures of X heads: each query head has its KV head's."""
    kv_heads = x.shape[1]
    return x.repeat_interleave(figures // kv_heads, 1) if figures >= kv_heads else x[:, :figures]


def _widest(shapes: Sequence[Sequence[int]]) -> list[int]:
    """The largest of each dimension."""
    return [max(sizes) for sizes in zip(*shapes, strict=True)]


def _sized(x: Tensor, shape: Sequence[int], fill: int = 0) -> Tensor:
    """x cut or filled up at the end of each dimension; what is cut off is empty."""
    common = x[tuple(map(slice, shape))]
    if common.shape == torch.Size(shape):
        return common
    out = x.new_full(tuple(shape), fill)
    out[tuple(map(slice, common.shape))] = common
    return out
