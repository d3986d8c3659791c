"""Compression while generating by rules of heads and layers of their own, and a model that masks what has left.

Nothing here imports kvcli. `start` sees the prompt's attention, `see` that of one query after the other; `keep` says
what a layer holds after an eviction, per KV head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.oracles.fastgen import _rules, chosen, share
from tests.oracles.generating import Heads, Row, _masking, _square


@dataclass
class FastGen:
    """Algorithm 2 of 2310.01801: each head goes on with the rule that was chosen for it.

    special, marks: positions in the prompt; text: of the tokens fed, by position; is_mark: whether one is punctuation.
    """

    special: set[int]
    marks: set[int]
    n: int
    recovery: float
    local: str = "0.3"
    frequent: str = "0.3"
    is_mark: Callable[[str], bool] = str.isspace
    text: dict[int, str] = field(default_factory=dict)
    rules: list[list[int]] = field(default_factory=list)
    sums: list[list[dict[int, float]]] = field(default_factory=list)

    def start(self, layer: int, rows: list[Row], kept: Heads) -> None:
        """The whole prompt's attention; the rule of each head must be one that keeps what was kept."""
        square, n = _square(rows, self.n), self.n
        group = len(square) // len(kept)
        self.rules.append([])
        self.sums.append([])
        for g, mine in enumerate(kept):
            shared = sum(square[g * group : (g + 1) * group]) / group
            near, many = max(1, share(self.local, n)), share(self.frequent, n)
            sets, held = _rules(shared, self.special | {n - 1}, self.marks, near, many)
            self.rules[-1].append(next(r for r in sorted(chosen(held, self.recovery)) if sets[r] == mine))
            self.sums[-1].append({p: float(shared[:, p].sum()) for p in range(n)})

    def see(self, layer: int, place: int, row: Row) -> None:
        group = len(row) // len(self.sums[layer])
        for h, weights in enumerate(row):
            sums = self.sums[layer][h // group]
            for p, weight in weights.items():
                sums[p] = sums.get(p, 0.0) + weight / group

    def keep(self, layer: int, place: int, visible: Heads) -> Heads:
        marks = self.marks | {p for p, text in self.text.items() if p >= self.n and self.is_mark(text)}
        near, many = max(1, share(self.local, self.n)), share(self.frequent, place + 1)
        out = []
        for g, positions in enumerate(visible):
            rule, sums = self.rules[layer][g], self.sums[layer][g]
            stay = {place} | self.special | (marks if rule >= 1 else set())
            stay |= set(range(place - near + 1, place + 1)) if rule == 3 else set()
            others = sorted((p for p in positions if p not in stay), key=lambda p: (-sums[p], p))
            best = others[:many] if rule in (2, 3) else others if rule == 4 else []
            out.append(sorted([p for p in positions if p in stay] + best))
        return out


@dataclass
class PyramidInfer:
    """The newest `recent` tokens stay; of the older ones the first `sinks`, and what the newest attend to most."""

    n: int
    recent: int
    limit: Callable[[int, int], int]
    """(layer, t) -> pairs per KV head."""
    sinks: int = 4
    weight: float = 1.2
    rows: list[list[dict[int, float]]] = field(default_factory=list)
    """Per layer, of each query so far: its attention, averaged over heads."""

    def start(self, layer: int, rows: list[Row], kept: Heads) -> None:
        self.rows.append([])
        for place, row in enumerate(rows):
            self.see(layer, place, row)

    def see(self, layer: int, place: int, row: Row) -> None:
        assert len(self.rows[layer]) == place
        self.rows[layer].append({p: sum(weights[p] for weights in row) / len(row) for p in row[0]})

    def keep(self, layer: int, place: int, visible: Heads) -> Heads:
        positions, limit = visible[0], self.limit(layer, place - self.n + 1)
        assert all(head == positions for head in visible)
        newest = [p for p in positions if p > place - self.recent]
        sinks = [p for p in positions if p < self.sinks and p not in newest]
        others = [p for p in positions if p not in newest and p not in sinks]
        voters = self.rows[layer][-self.recent :]
        assert len(voters) == self.recent <= limit

        def votes(p: int) -> float:
            grow = (self.weight - 1) / max(1, self.recent - 1)
            return sum((1 + grow * i) * voter[p] for i, voter in enumerate(voters))

        order = sinks + sorted(others, key=lambda p: (-votes(p), p))
        return [sorted(newest + order[: limit - len(newest)])] * len(visible)


@dataclass
class Masked:
    """logits[i] [V] behind the i-th token fed; after[i]: what each layer and KV head holds then.

    keys, values: per layer [H_kv, tokens, D], of all tokens.
    """

    logits: list[torch.Tensor] = field(default_factory=list)
    after: list[list[Heads]] = field(default_factory=list)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)


def masked(
    hf: Any, ids: list[int], kept: list[Heads], rule: Any, fed: Sequence[int], first: int, interval: int, pruned: bool
) -> Masked:
    """Feeds tokens from position `first` on to the full cache, where each query sees only what the rule has left.

    pruned: the prompt's tokens, too, see only what their layer keeps.
    """
    n, run = len(ids), Masked()
    visible = [[list(head) for head in layer] for layer in kept]

    def seen(layer: int, kv_head: int, query: int) -> list[int]:
        before = kept[layer][kv_head] if pruned else range(n)
        return sorted({query} | {p for p in before if p <= query})

    with _masking(hf) as masking:

        def forward(tokens: list[int], start: int) -> torch.Tensor:
            positions = torch.arange(start, start + len(tokens))[None]
            return hf(torch.tensor([tokens]), position_ids=positions, use_cache=False).logits[0, -1]

        masking.seen = seen
        forward(ids, 0)
        for layer in range(len(visible)):
            rule.start(layer, masking.rows[layer], kept[layer])
        if first == n - 1:
            masking.forget_last()
        masking.seen = lambda layer, kv_head, query: visible[layer][kv_head]
        for place, token in enumerate(fed, first):
            visible = [[sorted({*head, place}) for head in layer] for layer in visible]
            run.logits.append(forward([token], place))
            t = place - n + 1
            for layer in range(len(visible)):
                if t > 0:
                    rule.see(layer, place, masking.rows[layer][0])
                if t > 0 and t % interval == 0:
                    visible[layer] = rule.keep(layer, place, visible[layer])
            run.after.append([[list(head) for head in layer] for layer in visible])
        run.keys, run.values = masking.keys, masking.values
    return run
