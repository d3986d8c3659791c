"""What an oracle answers: per layer and KV head a choice that can judge another implementation's choice.

Two scores that differ by less than 1e-5 relative may be taken in either order (the method sees float32 attention);
scores that are exactly equal may not: there the smaller position, or the earlier unit, goes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

NEAR = 1e-5


def near(a: float, b: float) -> bool:
    return a != b and abs(a - b) < NEAR * max(abs(a), abs(b))


@dataclass
class Top:
    """`forced` positions, and the `count` best of `scores` (position -> score)."""

    forced: set[int]
    scores: dict[int, float]
    count: int

    def kept(self) -> list[int]:
        best = sorted(self.scores, key=lambda p: (-self.scores[p], p))[: self.count]
        return sorted(self.forced | set(best))

    def objection(self, actual: list[int]) -> str:
        """Why `actual` is not a right answer; empty when it is."""
        ours, theirs = set(self.kept()), set(actual)
        if len(ours) != len(theirs):
            return f"{len(theirs)} positions instead of {len(ours)}"
        for wrong in sorted(theirs - ours):
            for missing in sorted(ours - theirs):
                if missing in self.forced or wrong not in self.scores:
                    return f"kept {wrong}, lacks the protected {missing}"
                if not near(self.scores[wrong], self.scores[missing]):
                    return f"kept {wrong} ({self.scores[wrong]:.9g}) and not {missing} ({self.scores[missing]:.9g})"
        return ""


@dataclass
class Units:
    """`forced` positions, and whole units taken by score while the positions fit in `size` altogether."""

    forced: set[int]
    units: list[list[int]]
    scores: list[float]
    size: int
    stop: bool = False

    def _orders(self, left: list[int]) -> Iterator[list[int]]:
        """Orders by descending score, every one that near ties allow."""
        if not left:
            yield []
        for i in left:
            before = any(
                (self.scores[j] > self.scores[i] and not near(self.scores[j], self.scores[i]))
                or (self.scores[j] == self.scores[i] and j < i)
                for j in left
                if j != i
            )
            if not before:
                for rest in self._orders([j for j in left if j != i]):
                    yield [i, *rest]

    def _greedy(self, order: list[int]) -> tuple[list[int], list[int]]:
        """(kept positions, units taken)."""
        kept, taken = set(self.forced), []
        for i in order:
            more = kept | set(self.units[i])
            if len(more) <= self.size:
                kept = more
                taken.append(i)
            elif self.stop:
                break
        return sorted(kept), taken

    def best_order(self) -> list[int]:
        return sorted(range(len(self.units)), key=lambda i: (-self.scores[i], i))

    def taken(self) -> list[int]:
        return self._greedy(self.best_order())[1]

    def kept(self) -> list[int]:
        return self._greedy(self.best_order())[0]

    def objection(self, actual: list[int]) -> str:
        if actual == self.kept():
            return ""
        orders = islice(self._orders(self.best_order()), 500)
        if any(actual == self._greedy(order)[0] for order in orders):
            return ""
        ranked = [(i, self.units[i][0], len(self.units[i]), round(self.scores[i], 9)) for i in self.best_order()]
        return f"kept {actual} instead of {self.kept()}; units (index, start, length, score): {ranked}"


@dataclass
class Answer:
    """picks[layer][kv_head] and the flags the method must raise."""

    picks: list[list[Top | Units]]
    flags: set[str] = field(default_factory=set)

    def kept(self) -> list[list[list[int]]]:
        return [[pick.kept() for pick in layer] for layer in self.picks]
