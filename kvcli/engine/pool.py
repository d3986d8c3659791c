"""Caches whose rows go on being compressed while they generate: a freed slot takes the next token's pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import STORED_BYTES, Row, head_positions
from kvcli.cache.workspace import Workspace
from kvcli.engine.pool_rows import Clock, PoolRow, State
from kvcli.methods.base import Method
from kvcli.methods.composed import merge_of
from kvcli.methods.generating import Generating


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

    def nbytes(self) -> int:
        return super().nbytes() + sum(layer.slots.nbytes() for layer in self.layers)

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


class Pool:
    """Which slots of one layer hold which positions, and the method's figures for them.

    position [R, H_kv, S] int64, -1 where empty; state[name] [R, X, S, ...]; last[name] [R, X, ...]: the figures of the
    last prompt token, for rows that feed it again; facts[name] [R, H_kv]: of whole heads; beyond [R, H_kv]: pairs that
    a head may hold above the cap; None where no row has such. The first free slot is taken first.
    """

    def __init__(self, clock: Clock, separate: bool, position: Tensor, state: State, last: State, facts: State,
                 beyond: Tensor | None, longest: list[int], most: list[int],
                 wide: list[dict[str, torch.Size]]) -> None:  # fmt: skip
        self.clock, self.separate, self.position, self.state, self.last = clock, separate, position, state, last
        self.facts, self.beyond, self.longest, self.most, self.wide = facts, beyond, longest, most, wide

    @classmethod
    def of(cls, clock: Clock, layer: int, rows: Sequence[PoolRow], rooms: Sequence[int]) -> Pool:
        heads, device = rows[0].keys[layer].shape[0], rows[0].keys[layer].device
        longest = [max(row.lengths(layer)) for row in rows]
        most = [row.most(layer, room) for row, room in zip(rows, rooms, strict=True)]
        position = torch.full((len(rows), heads, max(most)), -1, device=device)
        sizes = [{name: x.shape[2:] for name, x in row.state[layer].items()} for row in rows]
        state: State = {}
        last: State = {}
        for name, first in rows[0].state[layer].items():
            given = [row.state[layer][name] for row in rows]
            wide = _widest([each[name] for each in sizes])
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
        return cls(clock, separate, position, state, last, facts, beyond, longest, most, sizes)

    @property
    def slots(self) -> int:
        return max(self.position.shape[2], 1)

    def nbytes(self) -> int:
        """Bytes of the positions and of the method's figures."""
        return sum(x.nbytes for x in (self.position, *self.state.values(), *self.last.values()))

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
        sizes = [self.wide[r] for r in keep]
        pools = [(self.position[index], {k: v[index] for k, v in self.state.items()},
                  {k: v[index] for k, v in self.last.items()})]  # fmt: skip
        facts = {k: v[index] for k, v in self.facts.items()}
        beyond = None if self.beyond is None else self.beyond[index]
        clock = self.clock.next(keep, None if entering is None else entering.clock)
        if entering is not None:
            longest, most, sizes = longest + entering.longest, most + entering.most, sizes + entering.wide
            pools.append((entering.position, entering.state, entering.last))
            facts = {k: torch.cat([v, entering.facts[k]]) for k, v in facts.items()}
            if beyond is not None and entering.beyond is not None:
                beyond = torch.cat([beyond, entering.beyond])
        slots = max(most)
        position = torch.cat([_sized(p, (*p.shape[:2], slots), -1) for p, _, _ in pools])
        state: State = {}
        last: State = {}
        for k in self.state:
            wide = _widest([each[k] for each in sizes])
            state[k] = torch.cat([_sized(s[k], (*s[k].shape[:2], slots, *wide)) for _, s, _ in pools])
            last[k] = torch.cat([_sized(x[k], (*x[k].shape[:2], *wide)) for _, _, x in pools])
        return Pool(clock, self.separate, position, state, last, facts, beyond, longest, most, sizes)


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
