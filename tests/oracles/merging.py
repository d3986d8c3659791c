"""Merging while generating, pair by pair: what leaves is folded into what stays, and a model that generates so.

D2O (arXiv:2406.13035; AIoT-MLSys-Lab/D2O): a leaving pair goes to the staying one of its KV head whose key has the
largest cosine with its own, of equal ones the earliest, if that cosine reaches the layer's threshold; the threshold is
a moving average of the evictions' mean cosines, moved first. CaM (openreview LCTmppB165; zyxxmu/cam): a leaving value,
divided by the number of receivers, goes to each of the newest tokens that stay, with the probability of its attention
over theirs. Draws are splitmix64 of a head's key and the position. Nothing here imports kvcli's methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.oracles import merge
from tests.oracles.generating import Heads, Row, Rule, evicted
from tests.oracles.merge import cam, d2o
from tests.oracles.prompts import Array, Prompt

Held = dict[int, tuple[Array, Array]]
"""What a KV head holds: position -> key, value."""
MASK = (1 << 64) - 1


def uniform(key: int, position: int) -> float:
    """splitmix64: the state after position + 1 steps from key; its upper 24 bits."""
    x = (key + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return ((x ^ (x >> 31)) >> 40) / 2**24


def cosine(a: Array, b: Array) -> float:
    """0 where one of them is zero, as a padding token's key in the first layer is."""
    return merge.cosine(a, b) if a.any() and b.any() else 0.0


@dataclass
class D2O:
    weights: str = "exp"
    beta: float = 0.7
    thresholds: dict[int, float] = field(default_factory=dict)

    def prompt(self, prompt: Prompt, layer: int, kept: Heads) -> list[tuple[Array, Array]]:
        every = []
        for head, stays in enumerate(kept):
            keys = prompt.keys[layer][head]
            dropped = [i for i in range(prompt.n) if i not in stays] if len(stays) > 1 else []
            every += [max(cosine(keys[i], keys[j]) for j in stays[:-1]) for i in dropped]
        if every:
            self.thresholds[layer] = sum(every) / len(every)
        return d2o(prompt, layer, kept, self.weights)

    def step(self, layer: int, heads: list[Held], gone: Heads, row: Row, newest: int) -> None:
        """gone: per KV head the positions that leave; they are taken out of heads."""
        links = []
        for held, leaving in zip(heads, gone, strict=True):
            stays = sorted(set(held) - set(leaving))
            found = {}
            for p in leaving if stays else []:
                likeness = {q: cosine(held[p][0], held[q][0]) for q in stays}
                best = max(stays, key=lambda q: (likeness[q], -q))
                found[p] = best, likeness[best]
            links.append(found)
        every = [c for found in links for _, c in found.values()]
        if every:
            mean, old = sum(every) / len(every), self.thresholds.get(layer)
            self.thresholds[layer] = min(mean, max(every)) if old is None else old + self.beta * (mean - old)
        for held, leaving, found in zip(heads, gone, links, strict=True):
            for q in sorted(set(held) - set(leaving)):
                came = [(c, held[p]) for p, (to, c) in found.items() if to == q and c >= self.thresholds[layer]]
                if came:
                    held[q] = self._mean(held[q], came, 0), self._mean(held[q], came, 1)
            for p in leaving:
                del held[p]

    def _mean(self, own: tuple[Array, Array], came: list[tuple[float, tuple[Array, Array]]], which: int) -> Array:
        if self.weights == "cosine":
            return (own[which] + sum(c * pair[which] for c, pair in came)) / (1 + len(came))  # type: ignore[no-any-return]
        total = math.e + sum(math.exp(c) for c, _ in came)
        return (math.e * own[which] + sum(math.exp(c) * pair[which] for c, pair in came)) / total  # type: ignore[no-any-return]


@dataclass
class CaM:
    """keys[layer]: of each KV head; draws[layer] [H_kv, n]: of the prompt's pairs."""

    keys: list[list[int]]
    draws: list[Array]
    window: int = 32

    def prompt(self, prompt: Prompt, layer: int, kept: Heads) -> list[tuple[Array, Array]]:
        return cam(prompt, layer, kept, self.draws[layer], self.window)

    def step(self, layer: int, heads: list[Held], gone: Heads, row: Row, newest: int) -> None:
        size = len(row) // len(heads)
        for g, (held, leaving) in enumerate(zip(heads, gone, strict=True)):
            group = range(g * size, (g + 1) * size)
            seen = {p: sum(row[h][p] for h in group) / size for p in held}
            receivers = [p for p in held if p not in leaving and p > newest - self.window]
            values = {p: held[p][1] for p in leaving}
            for p in leaving:
                mean = sum(seen[q] for q in receivers) / len(receivers) if receivers else 0.0
                if mean > 0 and uniform(self.keys[layer][g], p) < min(1.0, seen[p] / mean):
                    for q in receivers:
                        held[q] = held[q][0], held[q][1] + values[p] / len(receivers)
                del held[p]


Merging = D2O | CaM


@dataclass
class Merged:
    """tokens: generated; after[i][layer][KV head]: what is held after the step that fed token i."""

    tokens: list[int] = field(default_factory=list)
    after: list[list[list[Held]]] = field(default_factory=list)


class _Reading:
    """Attention of one row: of a whole prompt, then of one token after the other over what each KV head holds."""

    def __init__(self) -> None:
        self.held: list[list[Held]] = []
        self.prompt: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.rows: dict[int, Row] = {}
        self.place = 0

    def attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        """query [1, H, Q, D]; key, value [1, H_kv, Q, D] of the same tokens."""
        layer, heads, kv_heads = module.layer_idx, query.shape[1], key.shape[1]
        if not self.held:
            scores = query[0] @ key[0].repeat_interleave(heads // kv_heads, 0).transpose(1, 2) * scaling
            future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            self.prompt[layer] = key[0], value[0], weights
            return (weights @ value[0].repeat_interleave(heads // kv_heads, 0))[None].transpose(1, 2), None
        out, row = torch.zeros_like(query), []
        for h in range(heads):
            held = self.held[layer][h // (heads // kv_heads)]
            g = h // (heads // kv_heads)
            held[self.place] = key[0, g, 0].numpy(), value[0, g, 0].numpy()
            positions = sorted(held)
            weights = torch.tensor(np.array([held[p][0] for p in positions])) @ query[0, h, 0] * scaling
            weights = weights.softmax(0)
            out[0, h, 0] = weights @ torch.tensor(np.array([held[p][1] for p in positions]))
            row.append(dict(zip(positions, weights.tolist(), strict=True)))
        self.rows[layer] = row
        return out.transpose(1, 2), None


def generate(
    hf: Any, ids: list[int], kept: list[Heads], rule: Rule, merging: Merging, steps: int, limit: Callable[[int], int],
    *, interval: int = 1, first_token: str = "compressed",
) -> Merged:  # fmt: skip
    """As `masked_generate`, with a plain cache whose pairs are merged by hand. hf: a float64 model."""
    from transformers import AttentionInterface

    reading, run, n = _Reading(), Merged(), len(ids)
    AttentionInterface.register("oracle_merging", reading.attend)
    before = hf.config._attn_implementation
    hf.set_attn_implementation("oracle_merging")

    def forward(tokens: list[int], start: int) -> int:
        reading.place = start
        places = torch.arange(start, start + len(tokens))[None]
        with torch.no_grad():
            return int(hf(torch.tensor([tokens]), position_ids=places, use_cache=False).logits[0, -1].argmax())

    try:
        first = forward(ids, 0)
        reading.held = _begin(reading, rule, merging, kept, n, first_token)
        if hasattr(type(rule), "keys"):  # R-KV compares what is held
            type(rule).keys = {i: _Keys(heads) for i, heads in enumerate(reading.held)}
        place = n - 1
        if first_token == "prefill":
            run.tokens.append(first)
            place = n
        while len(run.tokens) < steps:
            run.tokens.append(forward([ids[-1] if place < n else run.tokens[-1]], place))
            t = place - n + 1
            for layer, heads in enumerate(reading.held):
                row = reading.rows[layer]
                if t > 0:
                    rule.see(layer, place, row)
                if t > 0 and t % interval == 0:
                    visible = [sorted(held) for held in heads]
                    left = evicted(rule, layer, row, visible, n, limit(t))
                    gone = [sorted(set(a) - set(b)) for a, b in zip(visible, left, strict=True)]
                    merging.step(layer, heads, gone, row, place)
            run.after.append([[dict(held) for held in heads] for heads in reading.held])
            place += 1
    finally:
        hf.set_attn_implementation(before)
    return run


class _Keys:
    """keys[KV head, position] of what is held now."""

    def __init__(self, heads: list[Held]) -> None:
        self.heads = heads

    def __getitem__(self, where: tuple[int, int]) -> Array:
        return self.heads[where[0]][where[1]][0]


def _begin(
    reading: _Reading, rule: Rule, merging: Merging, kept: list[Heads], n: int, first_token: str
) -> list[list[Held]]:
    """The kept pairs with the dropped ones folded in; the last one leaves where it is fed again."""
    layers = sorted(reading.prompt)
    keys, values = ([reading.prompt[i][j].numpy() for i in layers] for j in (0, 1))
    queries = [np.zeros((reading.prompt[i][2].shape[0], n, 1)) for i in layers]
    prompt = Prompt(queries, keys, values, 1.0, [])
    prompt.__dict__["attention"] = [reading.prompt[i][2].numpy() for i in layers]
    held = []
    for layer in layers:
        rule.start(layer, prompt.attention[layer])
        folded = merging.prompt(prompt, layer, kept[layer])
        stays = [head[:-1] if first_token == "compressed" else head for head in kept[layer]]
        held.append([
            {p: (pair[0][i], pair[1][i]) for i, p in enumerate(head)} for head, pair in zip(stays, folded, strict=True)
        ])  # fmt: skip
    return held
