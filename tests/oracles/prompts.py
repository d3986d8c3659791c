"""Prompts for the oracles: random queries and keys, named layouts of regions, and causal attention in float64.

Everything is numpy and slow on purpose; nothing here imports kvcli.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Layout = list[tuple[str, int, int, int]]
"""(kind, start, end, index) of each region, in order, covering the prompt; index is -1 but for shots."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """queries: per layer [H, n, D]; keys, values: per layer [H_kv, n, D]; query head h reads KV head h // group."""

    queries: list[Array]
    keys: list[Array]
    values: list[Array]
    scaling: float
    layout: Layout
    name: str = "sample"

    @property
    def n(self) -> int:
        return int(self.keys[0].shape[1])

    @property
    def heads(self) -> int:
        return len(self.queries[0])

    @property
    def kv_heads(self) -> int:
        return len(self.keys[0])

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def layers(self) -> int:
        return len(self.keys)

    @cached_property
    def attention(self) -> list[Array]:
        """Per layer [H, n, n]: row i is the softmax of query i over the keys 0..i, zero behind."""
        out = []
        for queries, keys in zip(self.queries, self.keys, strict=True):
            weights = np.zeros((self.heads, self.n, self.n))
            for h in range(self.heads):
                for i in range(self.n):
                    logits = self.scaling * (keys[h // self.group, : i + 1] @ queries[h, i])
                    powers = np.exp(logits - logits.max())
                    weights[h, i, : i + 1] = powers / powers.sum()
            out.append(weights)
        return out

    def column_sums(self, queries: str = "all") -> list[Array]:
        """Per layer [H, n]: what each key received from all prompt queries, or from the question's alone."""
        key = f"_sums_{queries}"
        if key not in self.__dict__:
            rows = range(self.n) if queries == "all" else self.positions("question")
            self.__dict__[key] = [
                sum((weights[:, i] for i in rows), np.zeros((self.heads, self.n))) for weights in self.attention
            ]
        return self.__dict__[key]

    def positions(self, *kinds: str) -> list[int]:
        return [p for kind, start, end, _ in self.layout if kind in kinds for p in range(start, end)]


def budget(ratio: str, n: int) -> int:
    """ratio x n rounded half up on exact numbers, at least 1 (METHODS.md, traps: 1000 at 0.1 is 100)."""
    return min(n, max(1, math.floor(Fraction(ratio) * n + Fraction(1, 2))))


def cut_window(window: int, n: int, size: int, strict: bool = False) -> tuple[int, bool]:
    """(window, cut): at most half of the head's budget, at least 1 (METHODS.md, One rule for protected tokens)."""
    window = min(window, n)
    if strict or size >= n:
        return window, False
    cut = max(1, min(window, size // 2))
    return cut, cut < window


def _shots(start: int, end: int, count: int) -> Layout:
    """`count` shots of unequal lengths between start and end (fewer where there is no room)."""
    weights = [3 + (5 * i) % 7 for i in range(count)]
    edges = [start + (end - start) * sum(weights[:i]) // sum(weights) for i in range(count + 1)]
    return [("shot", a, b, i) for i, (a, b) in enumerate(pairwise(edges)) if b > a]


def layout(kind: str, n: int) -> Layout:
    """Regions of an n-token prompt: shots, context, mixed (both), union (shot = question span + answer span), plain."""
    bos: Layout = [("special", 0, 1, -1)]
    asked = n - max(1, n // 12)
    ask: Layout = [("question", asked, n, -1)]
    if kind == "plain" or n < 5:
        return [*bos, ("question", 1, n, -1)] if n > 1 else [("question", 0, n, -1)]
    begin = 1 + n // 40
    middle: Layout = [("system", 1, begin, -1)] if begin > 1 else []
    if kind == "shots":
        return [*bos, *middle, *_shots(begin, asked, 8), *ask]
    if kind == "context":
        return [*bos, *middle, ("context", begin, asked, -1), *ask]
    half = (begin + asked) // 2
    if kind == "mixed":
        return [*bos, *middle, ("context", begin, half, -1), *_shots(half, asked, 4), *ask]
    if kind == "union":
        return [*bos, *middle, *_shots(begin, half, 3), *_shots(half, asked, 3), *ask]
    if kind == "open":  # no question: the last prompt token stands in a shot
        return [*bos, *middle, *_shots(begin, n, 5)]
    raise ValueError(kind)


def random_prompt(
    n: int, *, kv_heads: int = 2, group: int = 2, layers: int = 3, dim: int = 8, regions: str = "shots", seed: int = 0
) -> Prompt:
    rng = np.random.default_rng([n, kv_heads, group, layers, seed])
    return Prompt(
        queries=[2 * rng.standard_normal((kv_heads * group, n, dim)) for _ in range(layers)],
        keys=[rng.standard_normal((kv_heads, n, dim)) for _ in range(layers)],
        values=[rng.standard_normal((kv_heads, n, dim)) for _ in range(layers)],
        scaling=dim**-0.5,
        layout=layout(regions, n),
        name=f"random-{n}-{kv_heads}x{group}-{regions}-{seed}",
    )


def tied_prompt(n: int, *, kv_heads: int = 2, group: int = 2, layers: int = 2, regions: str = "shots") -> Prompt:
    """All keys zero: every query spreads its attention evenly, so scores tie and only positions can decide."""
    dim = 4
    one = np.ones((kv_heads * group, n, dim))
    zero = np.zeros((kv_heads, n, dim))
    return Prompt([one] * layers, [zero] * layers, [zero] * layers, 0.5, layout(regions, n), f"tied-{n}-{regions}")
