"""Compression while generating: caps, each paper's rule in plain loops, and a model that masks what has left.

Nothing here imports kvcli. A rule sees the attention of one query after the other and, where more pairs compete than
the cap allows, says which of them stay; of equal ones the earlier position does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import torch

from tests.oracles.prompts import Array
from tests.oracles.scissorhands import unimportant

Row = list[dict[int, float]]
"""One query's attention: per query head position -> weight, over the positions it saw."""
Heads = list[list[int]]
"""Per KV head: positions."""


def half_up(value: Decimal) -> int:
    return int(value.quantize(Decimal(1), rounding=ROUND_HALF_UP))


def cap(
    t: int,
    n: int,
    separate: bool,
    *,
    ratio: str | None = None,
    budget: int | None = None,
    decode_ratio: str | None = None,
    decode_budget: int | None = None,
    fixed: bool = False,
    least: int = 1,
) -> int:
    """Competing pairs per KV head that may stay after t generated tokens (DESIGN.md, Cap while generating).

    One of ratio (r_p) and budget, one of decode_ratio (r_d), decode_budget and fixed. least: `separate` only.
    """
    if separate:
        return decode_budget if decode_budget is not None else max(least, half_up(Decimal(decode_ratio or 0) * t))
    exact = Decimal(ratio) * n if ratio is not None else Decimal(min(budget or 0, n))
    prompt = max(1, half_up(exact))
    if fixed:
        return prompt
    if decode_budget is not None:
        return prompt + min(t, decode_budget)
    return max(1, half_up(exact + Decimal(decode_ratio or 0) * t))


@dataclass
class Rule:
    """One row's figures. heads, kv_heads: query head h reads KV head h // (heads // kv_heads)."""

    heads: int
    kv_heads: int
    separate = False
    """Only generated tokens compete."""
    least = 1

    def start(self, layer: int, attention: Array) -> None:
        """attention [H, n, n]: of the whole prompt, before anything has left."""

    def see(self, layer: int, query: int, row: Row) -> None:
        """A later query's attention; the query at n - 1, where it is fed again, is not shown: `start` has seen it."""

    def keep(self, layer: int, row: Row, competing: Heads, cap: int) -> Heads:
        """Which stay, per KV head. row: attention of the newest query."""
        raise NotImplementedError

    def group(self, kv_head: int) -> range:
        size = self.heads // self.kv_heads
        return range(kv_head * size, (kv_head + 1) * size)


def best(positions: Sequence[int], score: Callable[[int], float], count: int) -> list[int]:
    return sorted(positions, key=lambda p: (-score(p), p))[:count]


def reduced(values: list[float], reduce: str) -> float:
    return max(values) if reduce == "max" else sum(values) / len(values)


def all_alike(competing: Heads) -> list[int]:
    assert all(positions == competing[0] for positions in competing)
    return competing[0]


@dataclass
class H2O(Rule):
    """Algorithm 1 of 2306.14048: accumulated attention; half of the cap is recent tokens."""

    reduce: str = "mean"
    sums: dict[tuple[int, int], dict[int, float]] = field(default_factory=dict)

    def start(self, layer: int, attention: Array) -> None:
        for h in range(self.heads):
            n = attention.shape[1]
            self.sums[layer, h] = {p: sum(float(attention[h, i, p]) for i in range(p, n)) for p in range(n)}

    def see(self, layer: int, query: int, row: Row) -> None:
        for h in range(self.heads):
            for p, weight in row[h].items():
                self.sums[layer, h][p] = self.sums[layer, h].get(p, 0.0) + weight

    def keep(self, layer: int, row: Row, competing: Heads, cap: int) -> Heads:
        out = []
        for g, positions in enumerate(competing):
            recent = sorted(positions)[-max(1, cap // 2) :]
            others = [p for p in positions if p not in recent]

            def received(p: int, g: int = g) -> float:
                return reduced([self.sums[layer, h][p] for h in self.group(g)], self.reduce)

            out.append(sorted(recent + best(others, received, cap - len(recent))))
        return out


@dataclass
class StreamingLLM(Rule):
    """Section 3.2 of 2309.17453: the first tokens and the newest; sinks take at most half of the cap."""

    sinks: int = 4

    def keep(self, layer: int, row: Row, competing: Heads, cap: int) -> Heads:
        out = []
        for positions in competing:
            sinks = [p for p in positions if p < min(self.sinks, cap // 2)]
            others = sorted(p for p in positions if p not in sinks)
            out.append(sinks + others[len(others) - (cap - len(sinks)) :])
        return out


@dataclass
class TOVA(Rule):
    """The TOVA policy of 2401.06104: the newest query's attention, mean over all heads, nothing protected."""

    def keep(self, layer: int, row: Row, competing: Heads, cap: int) -> Heads:
        positions = all_alike(competing)
        kept = best(positions, lambda p: sum(row[h][p] for h in range(self.heads)) / self.heads, cap)
        return [sorted(kept)] * self.kv_heads


@dataclass
class Scissorhands(Rule):
    """Algorithm 2 of 2305.17118 over the last `history` queries, prompt and answer alike."""

    history: int = 400
    recent: int = 10
    reduce: str = "mean"
    low: dict[tuple[int, int], list[set[int]]] = field(default_factory=dict)
    """Per layer and KV head, of each query so far: the keys that were unimportant to it."""

    def start(self, layer: int, attention: Array) -> None:
        for g in range(self.kv_heads):
            self.low[layer, g] = [
                set(unimportant([attention[h, i] for h in self.group(g)], i, self.reduce))
                for i in range(attention.shape[1])
            ]

    def see(self, layer: int, query: int, row: Row) -> None:
        for g in range(self.kv_heads):
            seen = {p: reduced([row[h][p] for h in self.group(g)], self.reduce) for p in row[self.group(g)[0]]}
            self.low[layer, g].append({p for p, weight in seen.items() if weight < 1 / (query + 1)})

    def keep(self, layer: int, row: Row, competing: Heads, cap: int) -> Heads:
        out = []
        for g, positions in enumerate(competing):
            recent = sorted(positions)[-max(1, min(self.recent, cap // 2)) :]
            others = [p for p in positions if p not in recent]

            def seldom(p: int, g: int = g) -> int:
                return -sum(p in low for low in self.low[layer, g][-self.history :])

            out.append(sorted(recent + best(others, seldom, cap - len(recent))))
        return out


@dataclass
class ShotKV(Rule):
    """Equations 7 and 8 of 2502.01941 v4: generated tokens by the newest query's attention, summed over heads."""

    recent: int = 0
    separate = True

    def __post_init__(self) -> None:
        self.least = 1 + self.recent

    def keep(self, layer: int, row: Row, competing: Heads, cap: int) -> Heads:
        positions = sorted(all_alike(competing))
        newest, others = positions[-(1 + self.recent) :], positions[: -(1 + self.recent)]
        kept = best(others, lambda p: sum(row[h][p] for h in range(self.heads)), cap - len(newest))
        return [sorted(kept + newest)] * self.kv_heads


@dataclass
class SCOPE(Rule):
    """2412.13649, slide: recent generated tokens, and of the others those the newest query attends to, per KV head."""

    recent: int = 256
    reduce: str = "mean"
    separate = True

    def keep(self, layer: int, row: Row, competing: Heads, cap: int) -> Heads:
        out = []
        for g, positions in enumerate(competing):
            newest = sorted(positions)[-max(1, min(self.recent, cap // 2)) :]
            others = [p for p in positions if p not in newest]

            def attention(p: int, g: int = g) -> float:
                return reduced([row[h][p] for h in self.group(g)], self.reduce)

            out.append(sorted(newest + best(others, attention, cap - len(newest))))
        return out


RULES: dict[str, type[Rule]] = {
    "h2o": H2O, "streaming_llm": StreamingLLM, "tova": TOVA, "scissorhands": Scissorhands, "shotkv": ShotKV,
    "scope": SCOPE,
}  # fmt: skip


def rule_of(text: str, heads: int, kv_heads: int) -> Rule:
    """The rule of `name:key=value,...`; settings of the prompt's part are left out."""
    name, _, rest = text.partition(":")
    cls = RULES[name]
    pairs = dict(pair.split("=") for pair in rest.split(",") if pair)
    mine = {k: int(v) if v.isdigit() else v for k, v in pairs.items() if k in cls.__dataclass_fields__}
    return cls(heads, kv_heads, **mine)


def evicted(rule: Rule, layer: int, row: Row, visible: Heads, n: int, limit: int) -> Heads:
    """What is visible after an eviction to `limit` competing pairs per KV head."""
    competing = [[p for p in positions if not rule.separate or p >= n] for positions in visible]
    if max(map(len, competing)) <= limit:
        return visible
    assert min(map(len, competing)) > limit
    kept = rule.keep(layer, row, competing, limit)
    for positions, mine in zip(competing, kept, strict=True):
        assert len(mine) == len(set(mine)) == limit and set(mine) <= set(positions)
    frozen = [[p for p in positions if rule.separate and p < n] for positions in visible]
    return [sorted(a + b) for a, b in zip(frozen, kept, strict=True)]


@dataclass
class Masked:
    """tokens: generated; fed[i] is the token fed at step i, at position first + i; visible[i][layer][kv_head]: what its
    query saw, itself included; logits[i] [V]."""

    first: int
    tokens: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    visible: list[list[Heads]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    after: list[Heads] = field(default_factory=list)
    """What is left in the end, per layer and KV head."""


class _Masking:
    """Attention of one row over all keys ever made, each query looking only at the positions it is given."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.seen: Callable[[int, int, int], list[int]] = lambda layer, kv_head, query: list(range(query + 1))
        self.rows: dict[int, list[Row]] = {}
        """Per layer: the attention of each query of the last pass."""

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
    ) -> tuple[Any, None]:
        """query [1, H, Q, D]; key, value [1, H_kv, Q, D] of the same tokens."""
        assert mask is None
        layer = module.layer_idx
        for store, new in ((self.keys, key), (self.values, value)):
            store[layer] = torch.cat([store[layer], new[0]], 1) if layer in store else new[0]
        heads, new = query.shape[1], query.shape[2]
        kv_heads, size = self.keys[layer].shape[:2]
        out = torch.zeros_like(query)
        self.rows[layer] = []
        for i in range(new):
            row: Row = []
            for h in range(heads):
                g = h // (heads // kv_heads)
                positions = self.seen(layer, g, size - new + i)
                weights = (self.keys[layer][g, positions] @ query[0, h, i] * scaling).softmax(0)
                out[0, h, i] = weights @ self.values[layer][g, positions]
                row.append(dict(zip(positions, weights.tolist(), strict=True)))
            self.rows[layer].append(row)
        return out.transpose(1, 2), None

    def forget_last(self) -> None:
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer][:, :-1]


@contextmanager
def _masking(hf: Any) -> Iterator[_Masking]:
    from transformers import AttentionInterface

    masking = _Masking()
    AttentionInterface.register("oracle_masking", masking.attend)
    before = hf.config._attn_implementation
    hf.set_attn_implementation("oracle_masking")
    try:
        with torch.no_grad():
            yield masking
    finally:
        hf.set_attn_implementation(before)


def masked_generate(
    hf: Any,
    ids: list[int],
    kept: list[Heads],
    rule: Rule,
    steps: int,
    limit: Callable[[int], int],
    *,
    interval: int = 1,
    first_token: str = "compressed",
    forced: Sequence[int] | None = None,
) -> Masked:
    """Generates with the full cache, where each query sees only what the rule has left.

    hf: a transformers model (eager, any dtype; float64 for comparisons). kept[layer][kv_head]: positions of the prompt
    kept at the start, the last among them. limit(t): competing pairs per KV head that may stay after t generated
    tokens, applied where t is a multiple of interval. forced: tokens taken instead of the most likely ones.
    """
    n = len(ids)
    fed_again = first_token == "compressed"
    run = Masked(n - 1 if fed_again else n)
    visible = [[list(head) for head in layer] for layer in kept]
    with _masking(hf) as masking:

        def forward(tokens: list[int], start: int) -> torch.Tensor:
            positions = torch.arange(start, start + len(tokens))[None]
            return hf(torch.tensor([tokens]), position_ids=positions, use_cache=False).logits[0, -1]

        logits = forward(ids, 0)
        for layer in range(len(visible)):
            rule.start(layer, _square(masking.rows[layer], n))
        if fed_again:
            masking.forget_last()
        else:
            run.tokens.append(_next(logits, run, forced))
        masking.seen = lambda layer, kv_head, query: visible[layer][kv_head]
        while len(run.tokens) < steps:
            place = run.first + len(run.fed)
            token = ids[-1] if place < n else run.tokens[-1]
            for layer in visible:
                for head in layer:
                    if place not in head:
                        head.append(place)
            run.visible.append([[list(head) for head in layer] for layer in visible])
            run.fed.append(token)
            run.logits.append(forward([token], place))
            t = place - n + 1
            for layer in range(len(visible)):
                row = masking.rows[layer][0]
                if t > 0:
                    rule.see(layer, place, row)
                if t > 0 and t % interval == 0:
                    visible[layer] = evicted(rule, layer, row, visible[layer], n, limit(t))
            run.tokens.append(_next(run.logits[-1], run, forced))
    run.after = visible
    return run


def _next(logits: torch.Tensor, run: Masked, forced: Sequence[int] | None) -> int:
    return int(logits.argmax()) if forced is None else forced[len(run.tokens)]


def _square(rows: list[Row], n: int) -> Array:
    """[H, n, n]"""
    out = torch.zeros(len(rows[0]), n, n, dtype=torch.float64)
    for i, row in enumerate(rows):
        for h, weights in enumerate(row):
            for p, weight in weights.items():
                out[h, i, p] = weight
    return out.numpy()
