"""R-KV in plain loops (arXiv:2505.24133, section 3; Zefan-Cai/R-KV: compute_attention_scores, cal_similarity, R1KV).

Score of a key before the window: mix x importance - (1 - mix) x redundancy. Importance: each window query's softmax
over the keys before the window, largest (or mean) of the KV head's query heads, mean over the queries, max-pool over
neighbours. Redundancy: cosine similarities to all held keys, the diagonal 0; in key i's row the newest key above the
threshold is set to 0; a key's column mean, softmax over all held keys. The window of newest tokens stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tests.oracles.generating import Heads, Row, Rule, best, reduced
from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Array, Prompt, cut_window


def redundancies(keys: dict[int, list[float]], threshold: float) -> dict[int, float]:
    """keys: position -> key, of all that is held."""
    positions = sorted(keys)
    lengths = {p: math.sqrt(sum(x * x for x in keys[p])) + 1e-8 for p in positions}
    blame = dict.fromkeys(positions, 0.0)
    for i in positions:
        row = {}
        for j in positions:
            product = sum(a * b for a, b in zip(keys[i], keys[j], strict=True))
            row[j] = 0.0 if i == j else product / (lengths[i] * lengths[j])
        near = [j for j in positions if row[j] > threshold]
        if near:
            row[max(near)] = 0.0
        for j in positions:
            blame[j] += row[j] / len(positions)
    powers = {p: math.exp(blame[p]) for p in positions}
    return {p: powers[p] / sum(powers.values()) for p in positions}


def importances(rows: list[Row], before: list[int], group: range, kernel: int, reduce: str) -> dict[int, float]:
    """rows: the voting queries' attention; before: the keys before the window, ascending."""
    raw = dict.fromkeys(before, 0.0)
    for row in rows:
        shares = []
        for h in group:
            whole = sum(row[h][p] for p in before)
            shares.append({p: row[h][p] / whole if whole else 0.0 for p in before})
        for p in before:
            raw[p] += reduced([share[p] for share in shares], reduce) / len(rows)
    out = {}
    for i, p in enumerate(before):
        out[p] = max(raw[q] for q in before[max(0, i - kernel // 2) : i + kernel // 2 + 1])
    return out


def rkv(
    prompt: Prompt,
    size: int,
    *,
    window: int = 8,
    kernel: int = 7,
    mix: str = "0.1",
    threshold: str = "0.5",
    reduce: str = "max",
    strict: bool = False,
) -> Answer:
    """Of a prompt."""
    n, group = prompt.n, prompt.group
    w, cut = cut_window(window, n, size, strict)
    weight = float(mix)
    picks = []
    for layer in range(prompt.layers):
        rows = [
            [dict(enumerate(prompt.attention[layer][h, i].tolist())) for h in range(prompt.heads)]
            for i in range(n - w, n)
        ]
        tops = []
        for g in range(prompt.kv_heads):
            again = redundancies(dict(enumerate(prompt.keys[layer][g].tolist())), float(threshold))
            wanted = importances(rows, list(range(n - w)), range(g * group, (g + 1) * group), kernel, reduce)
            scores = {p: weight * wanted[p] - (1 - weight) * again[p] for p in range(n - w)}
            tops.append(Top(set(range(n - w, n)), scores, max(0, size - w)))
        picks.append(tops)
    return Answer(list(map(list, picks)), {"fallback"} if cut else {"over_budget"} if w > size else set())


@dataclass
class RKV(Rule):
    """While generating. keys[layer] [H_kv, tokens, D]: of the masked model that is running."""

    window: int = 8
    kernel: int = 7
    mix: str = "0.1"
    threshold: str = "0.5"
    reduce: str = "max"
    rows: dict[int, list[Row]] = field(default_factory=dict)
    keys: ClassVar[Any] = None

    def start(self, layer: int, attention: Array) -> None:
        heads, n = attention.shape[:2]
        self.rows[layer] = [[dict(enumerate(attention[h, i].tolist())) for h in range(heads)] for i in range(n)]

    def see(self, layer: int, query: int, row: Row) -> None:
        assert len(self.rows[layer]) == query
        self.rows[layer].append(row)

    def keep(self, layer: int, row: Row, competing: Heads, cap: int) -> Heads:
        newest = len(self.rows[layer]) - 1
        w = max(1, min(self.window, cap // 2))
        out = []
        for g, positions in enumerate(competing):
            held = {p: self.keys[layer][g, p].tolist() for p in positions}
            recent = [p for p in sorted(positions) if p > newest - w]
            before = [p for p in sorted(positions) if p <= newest - w]
            again = redundancies(held, float(self.threshold))
            wanted = importances(self.rows[layer][-w:], before, self.group(g), self.kernel, self.reduce)

            def score(p: int, wanted: dict[int, float] = wanted, again: dict[int, float] = again) -> float:
                return float(self.mix) * wanted[p] - (1 - float(self.mix)) * again[p]

            out.append(sorted(recent + best(before, score, cap - len(recent))))
        return out
