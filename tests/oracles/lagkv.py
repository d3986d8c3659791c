"""LagKV (arXiv:2504.04704, section 3; AI-Lab-China-Merchants-Bank/LagKV lag_kv.py).

The tokens behind the first `sinks` are cut into partitions of `lag`; a rest shorter than `lag` stays over. Of each
partition but the last, a token's state is scaled per channel by the minimum and maximum of the next partition, its
standard deviation over channels (n - 1 in the denominator) goes through a softmax over the partition, and the softmaxes
of keys and values are added. Every such partition keeps its best tokens, each the same number; here the first ones keep
one more where the budget does not divide. Sinks, last partition and rest always stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Prompt


@dataclass
class Parts:
    """Several choices in one head; objection and kept as in `Top`."""

    tops: list[Top]
    forced: set[int]

    def kept(self) -> list[int]:
        return sorted(self.forced.union(*(top.kept() for top in self.tops)))

    def objection(self, actual: list[int]) -> str:
        if len(actual) != len(set(actual)):
            return "repeated positions"
        left = set(actual)
        for top in self.tops:
            mine = sorted(left & set(top.scores))
            if reason := top.objection(mine):
                return reason
            left -= set(mine)
        return "" if left == self.forced else f"outside the partitions: {sorted(left ^ self.forced)}"


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(v - max(values)) for v in values]
    return [p / math.fsum(powers) for p in powers]


def deviation(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def standing_out(states: list[list[float]], following: list[list[float]]) -> list[float]:
    channels = range(len(states[0]))
    low = [min(row[c] for row in following) for c in channels]
    high = [max(row[c] for row in following) for c in channels]
    scaled = [[(row[c] - low[c]) / (high[c] - low[c]) if high[c] > low[c] else 0.0 for c in channels] for row in states]
    return softmax([deviation(row) for row in scaled])


def lagkv(prompt: Prompt, size: int, *, sinks: int = 16, lag: int = 128, strict: bool = False) -> Answer:
    n = prompt.n
    sinks = min(sinks, n - 1)
    starts = list(range(sinks, n - lag + 1, lag))  # whole partitions
    compressed = starts[:-1]
    forced = set(range(n)) - {p for start in compressed for p in range(start, start + lag)}
    free = max(0, size - len(forced))
    counts = [0] * len(compressed)
    for i in range(free):
        counts[i % len(counts)] += 1
    picks: list[list[Parts]] = []
    for layer in range(prompt.layers):
        heads = []
        for h in range(prompt.kv_heads):
            keys, values = prompt.keys[layer][h].tolist(), prompt.values[layer][h].tolist()
            tops = []
            for start, count in zip(compressed, counts, strict=True):
                end = start + lag
                by_key = standing_out(keys[start:end], keys[end : end + lag])
                by_value = standing_out(values[start:end], values[end : end + lag])
                both = {start + i: a + b for i, (a, b) in enumerate(zip(by_key, by_value, strict=True))}
                tops.append(Top(set(), both, count))
            heads.append(Parts(tops, forced))
        picks.append(heads)
    return Answer(picks, {"unreachable", "over_budget"} if len(forced) > size else set())  # type: ignore[arg-type]
