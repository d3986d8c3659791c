"""Prefills of in-prefill methods: those of one context run together, and wait until their rows are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from kvcli.cache.budget import Budget
from kvcli.engine.memory import CHUNK
from kvcli.methods.context import Context
from kvcli.models.pruned_prefill import Pruned, pruned_prefill, pruned_prefills
from kvcli.models.wrapper import Model

MOST_BYTES = 512 << 20
"""Keys and values that may wait; a row that has no room among them prefills alone."""


@dataclass(frozen=True)
class Own:
    """What one row's prefill is: the row (sample in the prefill batch, cell), its method as text and built, and what it
    may keep."""

    row: tuple[int, str]
    text: str
    method: Any
    budget: Budget


@dataclass
class OwnPrefills:
    """The first row of a context that is asked for brings those to come with it: they share the first layer, and what a
    pass costs whatever its tokens. Rows of one method and budget share all of it: draws, questions about a context."""

    model: Model
    _waiting: dict[tuple[int, str], Pruned] = field(default_factory=dict)
    _alone: set[int] = field(default_factory=set)
    """Samples whose prefills failed together: each row's runs by itself, and says itself what is wrong."""

    def take(self, ctx: Context, mine: Own, coming: Iterable[Own] = ()) -> Pruned:
        """The prefill of one row. coming: further rows of its context, in the order in which they will be asked for."""
        if mine.row not in self._waiting and mine.row[0] not in self._alone:
            try:
                self._together(ctx, chain([mine], coming))
            except Exception:  # memory, or the fault of a method that may be another row's
                self._alone.add(mine.row[0])
        done = self._waiting.pop(mine.row, None)
        return pruned_prefill(self.model, ctx.token_ids, mine.method, mine.budget) if done is None else done

    def clear(self) -> None:
        """Gives up what waits."""
        self._waiting.clear()
        self._alone.clear()

    def _together(self, ctx: Context, asked: Iterable[Own]) -> None:
        """Prefills for as many of these rows as memory allows."""
        runs: dict[tuple[str, Budget], tuple[Any, Budget]] = {}
        rows: list[Own] = []
        most = self._most(ctx)
        for own in asked:
            if own.row in self._waiting:
                continue
            if (own.text, own.budget) not in runs and len(runs) >= most:
                break
            runs[own.text, own.budget] = (own.method, own.budget)
            rows.append(own)
        if len(rows) > 1:
            done = dict(zip(runs, pruned_prefills(self.model, ctx.token_ids, list(runs.values())), strict=True))
            self._waiting.update((own.row, done[own.text, own.budget]) for own in rows)

    def _most(self, ctx: Context) -> int:
        """How many prefills of this context run in one pass: their tokens stay within a chunk, what waits within
        MOST_BYTES."""
        whole = sum(x.nbytes for x in (*ctx.keys, *ctx.values))
        held = {id(done): done for done in self._waiting.values()}.values()
        waiting = sum(x.nbytes for done in held for x in (*done.keys, *done.values))
        return min(CHUNK // ctx.n, (MOST_BYTES - waiting) // whole)
