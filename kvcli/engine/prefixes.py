"""Which tokens several prompts begin with alike, so that they are prefilled once: a radix tree over token prefixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvcli.attention.capture import Dense
from kvcli.spans import question_start as question_start

LEAST = 32
"""Fewer shared tokens are not worth a pass of their own."""
KEPT = 4
"""Prefixes held at a time; the least recently used leaves first."""


def shared_cuts(prompts: Sequence[Sequence[int]], limits: Sequence[int], least: int = LEAST) -> list[tuple[int, ...]]:
    """For each prompt the ascending lengths at which a prefix ends that it shares with others; () when it shares none.

    A prefix is at least `least` tokens longer than the one it builds on, and no longer than any limit of its prompts
    (the first token that must stay a prompt's own).
    """
    cuts: list[tuple[int, ...]] = [() for _ in prompts]
    groups = [(list(range(len(prompts))), 0)]
    while groups:
        members, start = groups.pop()
        if len(members) < 2:
            continue
        end = min(_common([prompts[i] for i in members], start), *(limits[i] for i in members))
        if end - start >= least:
            for i in members:
                cuts[i] += (end,)
            start = end
        by_next: dict[int, list[int]] = {}
        for i in members:
            if end < limits[i]:
                by_next.setdefault(prompts[i][end], []).append(i)
        if len(by_next) > 1:
            groups += [(group, start) for group in by_next.values()]
    return cuts


def _common(prompts: Sequence[Sequence[int]], start: int) -> int:
    """Length of the longest common prefix, known to be at least `start`: that of the least and the greatest."""
    low, high = min(map(list, prompts)), max(map(list, prompts))
    end = start
    while end < min(len(low), len(high)) and low[end] == high[end]:
        end += 1
    return end


@dataclass
class PrefixCache:
    """Prefilled prefixes by their tokens. `extend(tokens, parent)` prefills what stands behind the parent."""

    extend: Callable[[Sequence[int], Dense | None], Dense]
    kept: int = KEPT
    _held: dict[tuple[int, ...], Dense] = field(default_factory=dict)

    def get(self, ids: Sequence[int], cuts: Sequence[int]) -> Dense | None:
        """The dense prefix of `ids` up to the last cut, built cut by cut; None without cuts."""
        state: Dense | None = None
        for cut in cuts:
            key = tuple(ids[:cut])
            held = self._held.pop(key, None)
            state = held if held is not None else self.extend(ids[0 if state is None else state.n : cut], state)
            self._held[key] = state
            while len(self._held) > self.kept:
                self._held.pop(next(iter(self._held)))
        return state

    def clear(self) -> None:
        self._held.clear()
