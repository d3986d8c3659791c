"""Samples of a prefill batch through the model, once for all their cells."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcli.attention.capture import Dense, Needs, band
from kvcli.cache.rows import Row
from kvcli.engine.generate import Ask, Start, StopRules, end_tokens, generate
from kvcli.engine.memory import CHUNK
from kvcli.engine.needs import captured, given
from kvcli.engine.plan import PrefillBatch
from kvcli.engine.prefixes import PrefixCache, question_start, shared_cuts
from kvcli.engine.prompts import PromptSet
from kvcli.methods.context import Context
from kvcli.models.answering import LONGEST, Answered, answered
from kvcli.models.reconstruction import reconstruction
from kvcli.models.wrapper import Model, Prefilled
from kvcli.spans import Region


@dataclass
class Ready:
    """A prefilled sample, number `index` of its prompt set. logits [V]: what the prefill says of the next token."""

    index: int
    context: Context
    logits: Tensor
    seconds: float = 0.0


@dataclass
class Prefiller:
    """Prefills samples behind the prefixes they share, in passes of at most one chunk of tokens."""

    model: Model
    max_new_tokens: int | None = None
    """How long an answer may be where the run says it, not the task."""
    _given: dict[str, Callable[[], Any]] = field(default_factory=dict, repr=False)
    _shared: dict[Any, tuple[list[tuple[int, ...]], PrefixCache]] = field(default_factory=dict)
    _context_before: tuple[Any, Ready] | None = None
    """The context that the last question was asked about: the next batch's may be about the same."""

    def run(self, prompts: PromptSet, batch: PrefillBatch, rows: Sequence[int], names: set[str]) -> dict[int, Ready]:
        """The batch's samples `rows` with the statistics `names` of `Method.needs()`."""
        started = time.perf_counter()
        needs = Needs.of(captured(names))
        self._given |= given(self.model, names - self._given.keys())
        cuts, prefixes = self._prefixes(prompts, batch, needs)
        groups: dict[tuple[int, ...], list[int]] = {}
        alike = _alike(prompts, batch, rows)
        known = self._known(prompts, batch, alike, names)
        for row in (row for row in alike if row not in known):
            mine = cuts[batch.start + row]
            begin = prompts.parts[batch.start + row].ids[: mine[-1]] if mine else []
            groups.setdefault(tuple(begin), []).append(row)
        ready: dict[int, Ready] = dict(known)
        for shared, members in groups.items():
            prefix = prefixes.get(shared, cuts[batch.start + members[0]])
            lengths = [len(prompts.parts[batch.start + row].ids) - len(shared) for row in members]
            for some in _together(members, lengths):
                ready.update(self._pass(prompts, [batch.start + row for row in some], some, needs, prefix))
        self._remember(prompts, batch, ready, names)
        for row, others in alike.items():
            ready |= {other: dataclasses.replace(ready[row], index=batch.start + other) for other in others}
        for each in ready.values():
            each.seconds = (time.perf_counter() - started) / len(ready)
        return {row: ready[row] for row in rows}

    def clear(self) -> None:
        """Gives up what is held."""
        self._shared.clear()
        self._context_before = None

    def _known(self, prompts: PromptSet, batch: PrefillBatch, rows: Iterable[int], names: set[str]) -> dict[int, Ready]:
        """Rows about the context that was read last."""
        if self._context_before is None or prompts.key.query == "aware":
            return {}
        key, before = self._context_before
        mine = {row: batch.start + row for row in rows}
        return {
            row: dataclasses.replace(before, index=at)
            for row, at in mine.items()
            if (prompts.key, names, prompts.parts[at].sha) == key
        }

    def _remember(self, prompts: PromptSet, batch: PrefillBatch, ready: dict[int, Ready], names: set[str]) -> None:
        if prompts.key.query == "agnostic":
            last = ready[max(ready)]
            self._context_before = (prompts.key, names, prompts.parts[last.index].sha), last

    def _pass(
        self, prompts: PromptSet, indices: list[int], rows: list[int], needs: Needs, prefix: Dense | None
    ) -> Iterator[tuple[int, Ready]]:
        n = 0 if prefix is None else prefix.n
        ids = [prompts.parts[i].ids[n:] for i in indices]
        questions = [question_start(prompts.parts[i].regions) - n for i in indices]
        done: Prefilled
        if len(ids) == 1:
            dense, done = self.model.prefill_one(ids[0], needs, questions[0], prefix, chunk=CHUNK)
            denses = [dense]
        else:
            done = self.model.prefill(ids, needs, questions, prefix)
            denses = [done.dense(at) for at in range(len(ids))]
        for at, (row, index) in enumerate(zip(rows, indices, strict=True)):
            yield row, Ready(index, self._context(denses[at], done.capture.scaling, prompts, index), done.logits[at])

    def _prefixes(
        self, prompts: PromptSet, batch: PrefillBatch, needs: Needs
    ) -> tuple[list[tuple[int, ...]], PrefixCache]:
        """Where shared prefixes end in each prompt of the batch's generation, and the cache that holds them."""
        key = (batch.prompts, batch.samples, needs)
        if key not in self._shared:
            some = prompts.parts[: batch.samples]
            limits = [min(question_start(p.regions), len(p.ids) - 1) for p in some]

            def extend(ids: Sequence[int], parent: Dense | None) -> Dense:
                return self.model.prefill_one(ids, needs, len(ids), parent, chunk=CHUNK)[0]

            self._shared.clear()  # one prompt set at a time
            self._shared[key] = shared_cuts([p.ids for p in some], limits), PrefixCache(extend)
        return self._shared[key]

    def _context(self, dense: Dense, scaling: list[float], prompts: PromptSet, index: int) -> Context:
        prompt, shapes, task = prompts.parts[index], self.model.shapes, prompts.task
        agnostic = prompts.key.query == "agnostic"
        length = prompts.new_tokens(self.max_new_tokens)
        return Context(
            n=dense.n, heads=shapes.heads, kv_heads=shapes.kv_heads[0], token_ids=prompt.ids, regions=prompt.regions,
            keys=dense.keys, values=dense.values, column_sums=dense.column_sums, window_queries=dense.window_queries,
            scaling=scaling, sample_id=prompt.sha if agnostic else prompts.samples[index].id, seed=0,
            token_text=prompt.token_text,
            passes={
                **self._given,
                **passes(self.model, dense, prompt.ids, prompt.regions, length, task.until, prompts.behind(index)),
            },
            rope=self.model.rope, o_proj=self.model.o_proj, moments=dense.moments,
        )  # fmt: skip


def _alike(prompts: PromptSet, batch: PrefillBatch, rows: Sequence[int]) -> dict[int, list[int]]:
    """Rows that stand for others with the same text to prefill, and those others: a context is read and selected from
    once, however many questions are asked about it."""
    if prompts.key.query == "aware":
        return {row: [] for row in rows}
    first: dict[str, int] = {}
    found: dict[int, list[int]] = {}
    for row in rows:
        same = first.setdefault(prompts.parts[batch.start + row].sha, row)
        found.setdefault(same, []).extend([row] if row != same else [])
    return found


def passes(
    model: Model,
    dense: Dense,
    ids: Sequence[int],
    regions: Sequence[Region],
    max_new_tokens: int,
    until: tuple[str, ...] = (),
    behind: Sequence[int] | None = None,
) -> dict[str, Callable[[], Any]]:
    """The extra passes over one prefilled prompt, each run only when a method asks for it."""
    return {
        "reconstruction": partial(reconstruction, model, dense, ids, regions, behind),
        "answer": partial(_answer, model, dense, ids, max_new_tokens, until),
        "bands": lambda: partial(_band_sums, model, ids),
    }


def _answer(model: Model, dense: Dense, ids: Sequence[int], max_new_tokens: int, until: tuple[str, ...]) -> Answered:
    """What the prompt's keys receive from the full cache's own greedy answer."""
    context = model.shapes.context
    room = LONGEST if context is None else max(1, min(LONGEST, context - dense.n + 1))
    rules = StopRules(min(max_new_tokens, room), end_tokens(model), until)
    before = [torch.arange(dense.n - 1)] * len(dense.keys)
    ask = Ask(Row(dense.keys, dense.values, before), Start(ids[-1], dense.n - 1), rules)
    ((_, answer),) = generate(model, [ask])
    return answered(model, dense, ids[-1], answer.ids)


def _band_sums(model: Model, ids: Sequence[int], width: int) -> list[Tensor]:
    """Per layer [H, n]: the prompt is read again, because a shared prefix does not know which widths its prompts
    need."""
    needs = Needs(bands=frozenset({width}))
    return model.prefill_one(ids, needs, len(ids) - 1, chunk=CHUNK)[0].column_sums[band(width)]


def _together(rows: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Rows in their order, so many at a time that their padded tokens stay within one chunk."""
    some: list[int] = []
    longest = 0
    for row, length in zip(rows, lengths, strict=True):
        if some and max(longest, length) * (len(some) + 1) > CHUNK:
            yield some
            some, longest = [], 0
        some.append(row)
        longest = max(longest, length)
    if some:
        yield some
