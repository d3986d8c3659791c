"""What attention looks like over a whole prompt, without ever holding it: pooled maps and measures of single queries.

A prompt that has its keys and values is read once more (`Reading`). Of chosen heads every query is looked at, and what
it gives is pooled into blocks of queries and keys. Of all heads some queries are looked at: measures of how they spread
their attention, and a small pooled map. A block of queries of one KV head is held at a time, O(n) memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcli.attention import backends

SINKS = 4
"""First tokens that take attention whatever they are (StreamingLLM, arXiv:2309.17453); KVFundaBench, arXiv:2502.01941,
figure 3b, leaves as many out."""
LOCAL = 32
"""Local attention: a query's own token and those before it, so many together."""
SHARES = (0.90, 0.95)
MEASURES = ("keys_90", "keys_95", "entropy", "entropy_share", "sink_mass", "local_mass")
"""Of one query: the share of the keys it sees that holds 90 and 95 % of its attention, entropy in nats and as a share
of the most it can be (the logarithm of how many keys it sees), what the first SINKS tokens and the LOCAL nearest ones
receive."""
EVERY_ROW, SOME_ROWS = 1024, 256
"""Up to so many queries all are measured; of more, so many evenly spaced ones."""
CURVES = ("with", "without", "without, of all")
"""Cumulative curves: of all keys; without the first SINKS, as a share of what the others receive; and of everything."""
POINTS = 201
"""Of a cumulative curve, from 0 to 100 % of the keys."""
_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Attention of one block of queries."""


@dataclass(frozen=True)
class Look:
    """What is looked at in a prompt of n tokens.

    block: tokens per block of the chosen heads' map; heads: those (layer, head); small: tokens per block of the small
    maps of all heads; rows[name]: positions of the queries that are measured, sorted, one set per name.
    """

    n: int
    block: int
    heads: frozenset[tuple[int, int]]
    small: int
    rows: dict[str, list[int]]

    @property
    def blocks(self) -> int:
        return -(-self.n // self.block)

    @property
    def smalls(self) -> int:
        return -(-self.n // self.small)

    def sampled(self) -> list[int]:
        """All queries of the small maps: those that are measured, and the first ones, which are not."""
        return sorted({*range(min(SINKS, self.n)), *(i for rows in self.rows.values() for i in rows)})


def measured_rows(start: int, n: int) -> list[int]:
    """The queries from `start` on that are measured, the last one among them; none of the first SINKS, whose attention
    can go nowhere else."""
    start = max(start, min(SINKS, n - 1))
    count = n - start
    if count <= EVERY_ROW:
        return list(range(start, n))
    return sorted({start + round((i + 1) * count / SOME_ROWS) - 1 for i in range(SOME_ROWS)})


def attention_rows(query: Tensor, key: Tensor, positions: Tensor, scaling: float) -> Iterator[tuple[Tensor, Tensor]]:
    """(positions [r], p [M, r, S']) of one block of queries after the other, S' the keys up to the block's last query.

    query [M, R, D]: heads that share a KV head; key [S, D]; positions [R] on the CPU, sorted: where each query stands
    among the keys. Float32 at least.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    keys = key.to(exact)
    room = _BLOCK_BYTES.get(query.device.type, 8 << 20)
    step = max(8, room // (query.shape[0] * key.shape[0] * 4))
    for start in range(0, len(positions), step):
        at = positions[start : start + step]
        seen = int(at[-1]) + 1
        scores = (query[:, start : start + step].to(exact) @ keys[:seen].T).mul_(scaling)
        future = torch.arange(seen, device=scores.device) > at.to(scores.device)[:, None]
        yield at, scores.masked_fill_(future, float("-inf")).softmax(-1)


def measure(p: Tensor, positions: Tensor) -> Tensor:
    """[len(MEASURES), M, r] float64 of queries at `positions` [r] with attention p [M, r, S]."""
    at = positions.to(p.device)
    seen = (at + 1).double()
    ranked = p.sort(-1, descending=True).values.double().cumsum(-1)
    shares = [((ranked < share * ranked[..., -1:]).sum(-1) + 1).clamp(max=seen) / seen for share in SHARES]
    keys = torch.arange(p.shape[-1], device=p.device)
    near = keys > at[:, None] - LOCAL  # what lies behind a query is zero
    exact = p.double()
    entropy = torch.special.entr(exact).sum(-1)
    most = seen.log().clamp_min(torch.finfo(torch.double).tiny)  # of one key there is nothing to spread
    return torch.stack([*shares, entropy, entropy / most, exact[..., :SINKS].sum(-1), (exact * near).sum(-1)])


def pooled(p: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Sums and maxima over blocks of keys: [..., S] -> two of [..., ceil(S / block)]."""
    parts = F.pad(p, (0, -p.shape[-1] % block)).unflatten(-1, (-1, block))
    return parts.sum(-1), parts.amax(-1)


def visible_pairs(positions: Tensor, block: int, n: int) -> Tensor:
    """[blocks, blocks] float64: how many pairs of a query at `positions` and a key it sees lie in each block."""
    count = -(-n // block)
    starts = torch.arange(count) * block
    pairs = torch.zeros(count, count, dtype=torch.double)
    for at in positions.split(4096):
        seen = (at[:, None] + 1 - starts).clamp(0, block).double()
        pairs.index_add_(0, at // block, seen)
    return pairs


@dataclass
class Pool:
    """A map in blocks that grows as queries come in: sums and maxima [..., blocks, blocks]."""

    block: int
    sums: Tensor
    most: Tensor | None = None

    @classmethod
    def of(cls, look_n: int, block: int, lead: Sequence[int], device: torch.device, *, maxima: bool) -> Pool:
        count = -(-look_n // block)
        zeros = torch.zeros(*lead, count, count, dtype=torch.double, device=device)
        return cls(block, zeros, zeros.float() if maxima else None)

    def add(self, p: Tensor, positions: Tensor) -> None:
        """p [M, r, S], added up over the heads for a map without leading axes, else kept apart."""
        sums, most = pooled(p, self.block)
        rows, seen = (positions // self.block).to(p.device), sums.shape[-1]
        sums = sums.double()
        if self.sums.dim() == 2:
            sums, most = sums.sum(0), most.amax(0)
        self.sums[..., :seen].index_add_(-2, rows, sums)
        if self.most is not None:
            index = rows[:, None].expand(-1, seen)
            self.most[:, :seen].scatter_reduce_(0, index, most.float(), "amax")


@dataclass
class Reading:
    """Attention state of a prompt that is read again: `keys` and `values` [H_kv, n, D] per layer are those of the whole
    prompt. `start`: where the tokens of the running pass begin; set by the caller.

    Filled meanwhile: `chosen`, the map of the chosen heads; `small[layer][head]` and `measures[set][layer]`
    [len(MEASURES), H], summed over the set's queries.
    """

    look: Look
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    backend: str = "auto"
    start: int = 0
    chosen: Pool | None = None
    small: dict[int, list[Pool]] = field(default_factory=dict)
    measures: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self._look(layer, query[0], scaling)
        before = (self.keys[layer][:, : self.start], self.values[layer][:, : self.start]) if self.start else None
        return backends.prefill(query, key, value, scaling, {}, self.backend, before)[0]

    def _look(self, layer: int, query: Tensor, scaling: float) -> None:
        """query [H, Q, D] of the tokens from `start` on."""
        heads, size = query.shape[:2]
        end = self.start + size
        sampled = torch.tensor([i for i in self.look.sampled() if self.start <= i < end], dtype=torch.long)
        group = heads // self.keys[layer].shape[0]
        for kv_head, key in enumerate(self.keys[layer]):
            mine = range(kv_head * group, (kv_head + 1) * group)
            some = [head for head in mine if (layer, head) in self.look.heads]
            if some:
                every = torch.arange(self.start, end)
                for at, p in attention_rows(query[some], key[:end], every, scaling):
                    self._chosen(p.device).add(p, at)
            if len(sampled):
                rows = query[mine.start : mine.stop, (sampled - self.start).to(query.device)]
                for at, p in attention_rows(rows, key[:end], sampled, scaling):
                    self._sampled(layer, mine, heads, at, p)

    def _chosen(self, device: torch.device) -> Pool:
        if self.chosen is None:
            self.chosen = Pool.of(self.look.n, self.look.block, (), device, maxima=True)
        if self.chosen.sums.device != device:  # layers on several devices
            self.chosen = Pool(self.look.block, self.chosen.sums.to(device), self.chosen.most.to(device))  # type: ignore[union-attr]
        return self.chosen

    def _sampled(self, layer: int, mine: range, heads: int, at: Tensor, p: Tensor) -> None:
        if layer not in self.small:
            self.small[layer] = [
                Pool.of(self.look.n, self.look.small, (len(mine),), p.device, maxima=False)
                for _ in range(heads // len(mine))
            ]
        self.small[layer][mine.start // len(mine)].add(p, at)
        found = measure(p, at)
        for name, rows in self.look.rows.items():
            counted = torch.isin(at, torch.tensor(rows)).to(p.device, torch.double)
            zeros = torch.zeros(len(MEASURES), heads, dtype=torch.double, device=p.device)
            total = self.measures.setdefault(name, {}).setdefault(layer, zeros)
            total[:, mine.start : mine.stop] += (found * counted).sum(-1)

    def map(self) -> tuple[Tensor, Tensor]:
        """(mean, max) [blocks, blocks] of the chosen heads over the pairs that can be: NaN where there are none."""
        if self.chosen is None or self.chosen.most is None:
            raise ValueError("no head was chosen")
        pairs = visible_pairs(torch.arange(self.look.n), self.look.block, self.look.n)
        mean = self.chosen.sums.cpu() / (pairs * len(self.look.heads))
        return mean, self.chosen.most.cpu().double().masked_fill(pairs == 0, float("nan"))

    def small_maps(self) -> Tensor:
        """[L, H, smalls, smalls] float32: each head's mean over the sampled queries, NaN where there is no pair."""
        pairs = visible_pairs(torch.tensor(self.look.sampled()), self.look.small, self.look.n)
        layers = [torch.cat([pool.sums.cpu() for pool in self.small[i]]) for i in sorted(self.small)]
        return (torch.stack(layers) / pairs).float()

    def means(self, name: str) -> Tensor:
        """[len(MEASURES), L, H] float64: over the queries of a set."""
        layers = self.measures[name]
        return torch.stack([layers[i].cpu() for i in sorted(layers)], 1) / len(self.look.rows[name])


def cumulative(received: Tensor) -> Tensor:
    """[len(CURVES), H, POINTS]: share of attention that the X % most attended keys hold, X from 0 to 100.

    received [H, n]: what each key receives, adding up to 1. Between two numbers of keys the curve is a straight line.
    """
    rest = received[:, SINKS:]
    kept = rest.sum(-1, keepdim=True)
    own = rest / kept.clamp_min(torch.finfo(rest.dtype).tiny)
    return torch.stack([_ranked_sums(received), _ranked_sums(own), _ranked_sums(rest)])


def _ranked_sums(received: Tensor) -> Tensor:
    heads, n = received.shape
    if not n:
        return received.new_zeros(heads, POINTS)
    sums = received.sort(-1, descending=True).values.cumsum(-1)
    sums = torch.cat([sums.new_zeros(heads, 1), sums], -1)
    place = torch.linspace(0, n, POINTS, dtype=torch.double, device=received.device)
    low = place.floor().long().clamp(max=n - 1)
    share = (place - low).to(sums.dtype)
    return torch.lerp(sums[:, low], sums[:, low + 1], share)
