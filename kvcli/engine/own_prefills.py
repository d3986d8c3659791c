"""What rows have beside the shared prefill: prefills of in-prefill methods, of which those of one context run together,
and merged pairs. It is made once for all rows of a context that are alike, and waits until they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from kvcli.cache.budget import Budget
from kvcli.cache.rows import Pairs, storages
from kvcli.engine.memory import CHUNK
from kvcli.methods.context import Context
from kvcli.models.pruned_prefill import Asked, Pruned, pruned_prefill, pruned_prefills
from kvcli.models.wrapper import Model

MOST_BYTES = 512 << 20
"""Keys, values and figures that may wait; a row that has no room among them prefills or merges alone."""


@dataclass(frozen=True)
class Own:
    """What one row's prefill is: the row (sample in the prefill batch, cell), its method as text and built, what it
    may keep, whether generated tokens will be compressed too, and the seed of a method that draws."""

    row: tuple[int, str]
    text: str
    method: Any
    budget: Budget
    decode: bool = False
    seed: int | None = None

    @property
    def run(self) -> Run:
        """Rows of one context with the same one share all of it."""
        return self.text, self.budget, self.decode, self.seed


Run = tuple[str, Budget, bool, int | None]


class Formed(NamedTuple):
    """A row's pairs; logits [V] behind the prompt, where they come from a prefill of the method's own."""

    pairs: Pairs
    logits: Tensor | None = None


@dataclass
class OwnPrefills:
    """The first row of a context that is asked for brings those to come with it: they share the first layer, and what a
    pass costs whatever its tokens. Rows of one method and budget share all of it: draws, questions about a context."""

    model: Model
    _waiting: dict[tuple[int, str], Pruned] = field(default_factory=dict)
    _formed: dict[tuple[int, str], Formed] = field(default_factory=dict)
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
        if done is None:
            return pruned_prefill(self.model, ctx.token_ids, mine.method, mine.budget, mine.decode)
        return done

    def formed(self, mine: Own, coming: Iterable[Own], make: Callable[[], Formed]) -> Formed:
        """The pairs of one row; those to come of its context that are alike (`run`) get the same."""
        if mine.row in self._formed:
            return self._formed.pop(mine.row)
        done = make()
        if self._held() + sum(_storages(done).values()) <= MOST_BYTES:
            with suppress(Exception):  # another row's fault, which says so itself
                self._formed.update((own.row, done) for own in coming if own.run == mine.run)
        return done

    def clear(self) -> None:
        """Gives up what waits."""
        self._waiting.clear()
        self._formed.clear()
        self._alone.clear()

    def _together(self, ctx: Context, asked: Iterable[Own]) -> None:
        """Prefills for as many of these rows as memory allows."""
        runs: dict[Run, Asked] = {}
        rows: list[Own] = []
        room = MOST_BYTES - self._held()
        for own in asked:
            if own.row in self._waiting:
                continue
            if own.run not in runs:
                room -= _bytes(ctx, own)
                if room < 0 or len(runs) >= CHUNK // ctx.n:
                    break
                runs[own.run] = Asked(own.method, own.budget, own.decode)
            rows.append(own)
        if len(rows) > 1:
            done = dict(zip(runs, pruned_prefills(self.model, ctx.token_ids, list(runs.values())), strict=True))
            self._waiting.update((own.row, done[own.run]) for own in rows)

    def _held(self) -> int:
        """Bytes of what waits."""
        held = {id(done): done for done in self._waiting.values()}.values()
        figures = [x for done in held for layer in done.state for x in layer.values()]
        pairs = {at: size for formed in self._formed.values() for at, size in _storages(formed).items()}
        own = sum(x.nbytes for x in (*figures, *(y for done in held for y in (*done.keys, *done.values))))
        return own + sum(pairs.values())


def _storages(formed: Formed) -> dict[int, int]:
    keys, values, _ = formed.pairs
    return storages((*keys, *values))


def _bytes(ctx: Context, own: Own) -> int:
    """What a prefill adds at most to what waits: pairs, and to go on with them a figure per pair and voting query."""
    pairs = sum(x.nbytes for x in (*ctx.keys, *ctx.values))
    if not own.decode:
        return pairs
    voters = len(own.method.prefill_start(own.budget).weights)
    return pairs + len(ctx.keys) * ctx.n * voters * max(4, ctx.keys[0].element_size())
