"""The loop: prefill once per batch of samples; per sample and cell select, fork, decode together, score, record."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from kvcli.attention.capture import Dense, Needs
from kvcli.cache.budget import Budget
from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import Row
from kvcli.cache.workspace import Workspace
from kvcli.engine import fidelity
from kvcli.engine.generate import Ask, Build, Generated, OutOfRoom, Start, StopRules, end_tokens, generate
from kvcli.engine.memory import Room, is_out_of_memory
from kvcli.engine.plan import WAVES, Cell, DecodeBatch, Plan, PrefillBatch, ratio_of
from kvcli.engine.pool import Cap, PoolCache, PoolRow
from kvcli.engine.prefixes import PrefixCache, shared_cuts
from kvcli.engine.prepare import PromptSet
from kvcli.engine.records import error_record, ok_record, prompt_entry
from kvcli.engine.sampling import Sampler
from kvcli.engine.selecting import SharedContextWritten, positions_kept, select
from kvcli.errors import Exit, KvcliError
from kvcli.methods import catalog
from kvcli.methods.base import Method, Selection
from kvcli.methods.context import Context
from kvcli.models.wrapper import CHUNK, Model

RECONSTRUCTION = "reconstruction"
"""A need that an extra pass of the model meets, not the prefill."""

Key = tuple[str, str]


class Sink(Protocol):
    """Where records go (results.store.RunStore)."""

    def done_keys(self) -> set[Key]: ...

    def append(self, record: dict[str, Any]) -> None: ...

    def add_prompt(self, entry: dict[str, Any]) -> None: ...

    def keep_map(self, task: str, sample_id: str, cell_id: str, kept: Any) -> None: ...


@dataclass
class Options:
    """What steers the loop and changes no result."""

    decode_rows: int
    keep_maps: int = 5
    store_prompts: bool = False
    max_new_tokens: int | None = None
    ignore_eos: bool = False
    strict_window: bool = False
    deterministic: bool = False
    fidelity: bool = False
    memory: int | None = None
    """Bytes of one decode batch's cache; None: decode_rows rows of whatever length."""
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass
class Outcome:
    written: int = 0
    errors: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    """Failed samples per method and message."""
    stopped: Exit | None = None
    halved: list[str] = field(default_factory=list)
    """What did not fit in memory and was run in smaller batches."""


@dataclass
class Ready:
    """A prefilled sample. logits [V]: what the dense prefill says of the first answer token."""

    context: Context
    logits: Tensor
    seconds: float = 0.0


@dataclass
class Choice:
    """One row of a decode batch after selection."""

    sample: int
    cell: Cell
    context: Context
    selection: Selection
    budget: Budget
    seconds: float


Finished = tuple[Ask, Generated]
FLUSH = 64
"""Finished rows that wait for each other, so that their predictions are compared with full's in one pass."""


@dataclass
class Runner:
    """One pass over a plan.

    `stop(progressed)` is asked before each prefill and decode batch; `progress(done, total, task)` is told after them.
    """

    model: Model
    plan: Plan
    prompt_sets: dict[tuple[str, int], PromptSet]
    sink: Sink
    options: Options
    stop: Callable[[bool], Exit | None] = lambda progressed: None
    progress: Any = lambda done, total, label: None
    wanted: set[str] | None = None
    """Cells this command asked for (None: all). A batch runs when one of their rows is missing, and then as a whole."""
    limit: int | None = None
    """Samples per task this command asked for (None: all the plan has)."""
    full_outputs: dict[Key, list[int]] = field(default_factory=dict)
    """output_ids of `full` by (first-token mode and sample): what other rows are compared with."""

    def __post_init__(self) -> None:
        self.done = self.sink.done_keys()
        self.methods: dict[str, Method] = {}
        self.outcome = Outcome()
        self.memory = Workspace()
        self.beside = Workspace()
        self.room = Room(self.options.memory, None if self.options.memory else self.options.decode_rows)
        self.shared: dict[Any, tuple[list[tuple[int, ...]], PrefixCache]] = {}
        self.references: dict[Key, fidelity.Reference] = {}
        self.seen = self.total = 0

    def run(self) -> Outcome:
        every = [(self.prompt_sets[b.task, b.shots], b, d.rows) for b in self.plan.batches for d in self._decodes(b)]
        self.total = sum(self._asked(c, b.start + i) for _, b, rows in every for i, c in rows)
        self._tick(self.total - sum(self._open(*item) for item in every), "")
        for batch in self.plan.batches:
            if self.outcome.stopped is None:
                self._prefill_batch(batch)
        return self.outcome

    def _method(self, cell: Cell) -> Method:
        if cell.method not in self.methods:
            self.methods[cell.method] = catalog.build(cell.method)
        return self.methods[cell.method]

    def _asked(self, cell: Cell, index: int) -> bool:
        """Whether this command wants a record of the cell for the task's sample of this index."""
        return (self.wanted is None or cell.id in self.wanted) and (self.limit is None or index < self.limit)

    def _open(self, prompts: PromptSet, batch: PrefillBatch, rows: Iterable[tuple[int, Cell]]) -> int:
        """How many of these rows are asked for and have no record yet."""
        asked = ((batch.start + i, cell) for i, cell in rows if self._asked(cell, batch.start + i))
        return sum((cell.id, prompts.samples[i].id) not in self.done for i, cell in asked)

    def _decodes(self, batch: PrefillBatch) -> Iterator[DecodeBatch]:
        return batch.decode_batches(self.options.decode_rows, 1 if self.options.deterministic else WAVES)

    def anything_missing(self) -> bool:
        """Whether any row of the wanted cells has no record yet."""
        return any(
            self._open(self.prompt_sets[b.task, b.shots], b, d.rows)
            for b in self.plan.batches
            for d in self._decodes(b)
        )

    def _stopped(self) -> bool:
        if self.outcome.stopped is None:
            self.outcome.stopped = self.stop(self.outcome.written > 0)
        return self.outcome.stopped is not None

    # --- prefill ------------------------------------------------------------------------------------------------------

    def _prefill_batch(self, batch: PrefillBatch) -> None:
        prompts = self.prompt_sets[batch.task, batch.shots]
        todo = [d for d in self._decodes(batch) if self._open(prompts, batch, d.rows)]
        if todo and not self._stopped():
            self._samples(prompts, batch, todo, list(range(batch.end - batch.start)))

    def _samples(self, prompts: PromptSet, batch: PrefillBatch, todo: list[DecodeBatch], rows: list[int]) -> None:
        """These samples of the batch, prefilled together or, where memory does not allow it, half by half."""
        ready: dict[int, Ready] | None = None
        try:
            ready = self._prefill(prompts, batch, rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        if ready is None:
            self._free()
            if len(rows) > 1:
                self.outcome.halved.append(f"{batch.id}: {len(rows)} prompts did not fit in memory together")
                for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                    self._samples(prompts, batch, todo, part)
                return
            self._fail(prompts, batch, todo, rows, failure)
            return
        self.references.clear()
        for decode in todo:
            if self._stopped():
                return
            self._decode_batch(prompts, batch, decode, ready)

    def _fail(
        self, prompts: PromptSet, batch: PrefillBatch, todo: list[DecodeBatch], samples: list[int], error: BaseException
    ) -> None:
        """Error records for all cells of samples that cannot even be prefilled alone."""
        for decode in todo:
            for i, cell in decode.rows:
                if i in samples:
                    self._failed(prompts, batch.start + i, cell, error, decode.id)

    def _failed(self, prompts: PromptSet, index: int, cell: Cell, error: BaseException, batch: str) -> None:
        if self._asked(cell, index):
            sample = prompts.samples[index]
            self._write(error_record(cell, prompts, sample, self._method(cell), error, batch))
            self._tick(1, cell.task)

    def _free(self) -> None:
        """Gives memory back after it ran out."""
        self.memory, self.beside = Workspace(), Workspace()
        self.shared.clear()
        self.references.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _prefill(self, prompts: PromptSet, batch: PrefillBatch, rows: list[int]) -> dict[int, Ready]:
        """Samples after their prefill; those behind the same shared prefix run together."""
        started = time.perf_counter()
        needs = Needs.of(need for cell in batch.cells for need in self._method(cell).needs() if need != RECONSTRUCTION)
        cuts, prefixes = self._prefixes(prompts, batch, needs)
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            mine = cuts[batch.start + row]
            begin = prompts.prompts[batch.start + row].ids[: mine[-1]] if mine else []
            groups.setdefault(tuple(begin), []).append(row)
        ready: dict[int, Ready] = {}
        for shared, members in groups.items():
            prefix = prefixes.get(shared, cuts[batch.start + members[0]])
            for some in self._together(
                members, [len(prompts.prompts[batch.start + r].ids) - len(shared) for r in members]
            ):
                self._prefill_rows(prompts, batch, some, needs, prefix, len(shared), ready)
        for each in ready.values():
            each.seconds = (time.perf_counter() - started) / len(ready)
        return ready

    @staticmethod
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
        yield some

    def _prefill_rows(
        self, prompts: PromptSet, batch: PrefillBatch, rows: list[int], needs: Needs, prefix: Dense | None, n: int,
        ready: dict[int, Ready],
    ) -> None:  # fmt: skip
        chosen = [prompts.prompts[batch.start + row] for row in rows]
        ids = [prompt.ids[n:] for prompt in chosen]
        questions = [question_start(prompt.regions) - n for prompt in chosen]
        if len(rows) == 1:
            dense, done = self.model.prefill_one(ids[0], needs, questions[0], prefix, CHUNK)
            denses = [dense]
        else:
            done = self.model.prefill(ids, needs, questions, prefix)
            denses = [done.dense(at) for at in range(len(rows))]
        for at, row in enumerate(rows):
            context = self._context(denses[at], done.capture.scaling, prompts, batch.start + row)
            ready[row] = Ready(context, done.logits[at])

    def _prefixes(
        self, prompts: PromptSet, batch: PrefillBatch, needs: Needs
    ) -> tuple[list[tuple[int, ...]], PrefixCache]:
        """Where shared prefixes end in each prompt of the batch's generation, and the cache that holds them."""
        key = (batch.task, batch.shots, batch.samples, needs)
        if key not in self.shared:
            some = prompts.prompts[: batch.samples]
            limits = [min(question_start(p.regions), len(p.ids) - 1) for p in some]

            def extend(ids: Sequence[int], parent: Dense | None) -> Dense:
                return self.model.prefill_one(ids, needs, len(ids), parent, CHUNK)[0]

            self.shared.clear()  # one prompt set at a time
            self.shared[key] = shared_cuts([p.ids for p in some], limits), PrefixCache(extend)
        return self.shared[key]

    def _tick(self, rows: int, label: str) -> None:
        self.seen += rows
        self.progress(self.seen, self.total, label)

    def _context(self, dense: Dense, scaling: list[float], prompts: PromptSet, index: int) -> Context:
        prompt, shapes = prompts.prompts[index], self.model.shapes
        return Context(
            n=dense.n, heads=shapes.heads, kv_heads=shapes.kv_heads[0], token_ids=prompt.ids, regions=prompt.regions,
            keys=dense.keys, values=dense.values, column_sums=dense.column_sums, window_queries=dense.window_queries,
            scaling=scaling, sample_id=prompts.samples[index].id, seed=0, token_text=prompt.token_text,
        )  # fmt: skip

    # --- decode -------------------------------------------------------------------------------------------------------

    def _decode_batch(
        self, prompts: PromptSet, batch: PrefillBatch, decode: DecodeBatch, ready: dict[int, Ready]
    ) -> None:
        """Generates all rows of the batch. Rows that had no room are asked again in batches half as large."""
        build = self._build(decode)
        waiting: Iterable[Ask] = self._asks(prompts, batch, decode, ready)
        room = self.room
        pending: list[Finished] = []
        self._clock = time.perf_counter()
        while True:
            again: list[Ask] = []
            try:
                for done in generate(
                    self.model, waiting, room=room, memory=self.memory, build=build,
                    steady=self.options.deterministic and room == self.room, stop=self._stopped,
                ):  # fmt: skip
                    pending.append(done)
                    self._answered(done)
                    if len(pending) >= FLUSH:
                        pending = self._flush(prompts, batch, decode, pending, build, ready)
            except OutOfRoom as error:
                failure, again = error, error.asks
            if not again:
                break
            self._free()
            if failure.rows <= 1:
                ask, *again = again
                why = failure.__cause__ or failure
                self._failed(prompts, batch.start + ask.tag.sample, ask.tag.cell, why, decode.id)
            else:
                room = room.halved(failure.rows)
                self.outcome.halved.append(f"{decode.id}: {failure.rows} rows did not fit in memory together")
            waiting = chain(again, waiting)
        self._flush(prompts, batch, decode, pending, build, ready, last=True)

    def _build(self, decode: DecodeBatch) -> Build:
        cell = decode.rows[0][1]
        if not cell.storage:
            return CompressedCache
        return partial(PoolCache, self._method(cell), self.model.shapes.heads)

    def _asks(
        self, prompts: PromptSet, batch: PrefillBatch, decode: DecodeBatch, ready: dict[int, Ready]
    ) -> Iterator[Ask]:
        """The batch's rows, selected when they are about to enter. A method's fault is that row's result."""
        for i, cell in decode.rows:
            if i not in ready:
                continue
            try:
                yield self._ask(prompts, self._choose(i, cell, ready[i].context), ready[i])
            except SharedContextWritten:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self._failed(prompts, batch.start + i, cell, error, decode.id)

    def _ask(self, prompts: PromptSet, choice: Choice, ready: Ready) -> Ask:
        sampler = self._sampler(choice)
        first = sampler(ready.logits, 0) if sampler else int(ready.logits.argmax())
        return Ask(self._row(choice), self._start(choice, first), self._rules(prompts, choice.cell), sampler, choice)

    def _sampler(self, choice: Choice) -> Sampler | None:
        if not self.options.temperature:
            return None
        cell = choice.cell
        return Sampler(
            self.options.temperature, self.options.top_p, cell.seed or 0, choice.context.sample_id, cell.draw
        )

    def _choose(self, sample: int, cell: Cell, context: Context) -> Choice:
        started = time.perf_counter()
        ctx = dataclasses.replace(context, seed=cell.seed or 0)
        budget = self._budget(cell, ctx)
        selection = select(self._method(cell), ctx, budget)
        return Choice(sample, cell, ctx, selection, budget, time.perf_counter() - started)

    def _budget(self, cell: Cell, ctx: Context) -> Budget:
        size = (len(ctx.keys), ctx.kv_heads, self.options.strict_window)
        ratio = ratio_of(cell)
        if ratio is not None:
            return Budget.of_ratio(ratio, ctx.n, *size)
        return Budget.of_size(cell.budget or ctx.n, ctx.n, *size)

    def _row(self, choice: Choice) -> Row:
        """The row's kept pairs; in the compressed mode the last prompt token leaves and is fed again."""
        kept, ctx = choice.selection.kept, choice.context
        if choice.cell.first_token == "compressed":
            kept = [[p[:-1] for p in layer] if isinstance(layer, list) else layer[..., :-1] for layer in kept]
        if choice.cell.decode is None:
            return Row(ctx.keys, ctx.values, kept, self._rotate(choice))
        method = self._method(choice.cell)
        with torch.no_grad():
            state = [method.decode_start(ctx, layer) for layer in range(ctx.layers)]
        cap = Cap.of(choice.cell.decode, choice.budget, method)
        return PoolRow(ctx.keys, ctx.values, kept, None, ctx.n, cap, state, choice.cell.decode["interval"])

    def _rotate(self, choice: Choice) -> Any:
        if not choice.selection.rerotate:
            return None
        rope = self.model.rope
        if rope is None:
            raise KvcliError("this model's keys cannot be moved", given=choice.cell.method, fix="rerotate=false")
        return lambda layer, keys, old: rope.move(keys, old, torch.arange(len(old)))

    def _start(self, choice: Choice, dense_token: int) -> Start:
        """Where the row begins: the position after its last pair, true or (rerotated) inside the cache."""
        n, last = choice.context.n, choice.context.token_ids[-1]
        end = len(choice.selection.kept[0]) if choice.selection.rerotate else n
        if choice.cell.first_token == "compressed":
            return Start(last, end - 1)
        return Start(last, end, given=dense_token)

    def _rules(self, prompts: PromptSet, cell: Cell) -> StopRules:
        length = self.options.max_new_tokens or prompts.task.max_new_tokens
        if self.options.ignore_eos:
            return StopRules(length)
        return StopRules(length, end_tokens(self.model), prompts.task.until)

    # --- fidelity and records -----------------------------------------------------------------------------------------

    def _answered(self, done: Finished) -> None:
        """Keeps what `full` answers: the others are compared with it."""
        choice: Choice = done[0].tag
        if choice.cell.method == "full":
            self.full_outputs[self._mode(choice.cell), choice.context.sample_id] = done[1].ids

    def _mode(self, cell: Cell) -> str:
        """Cells of one mode have one answer of `full` to be compared with."""
        sampled = (cell.seed or 0, cell.draw) if self.options.temperature else ()
        return "/".join(map(str, (cell.task, cell.shots, cell.first_token, *sampled)))

    def _full_key(self, choice: Choice) -> Key | None:
        """Where full's answer to this row's prompt is; a cell without a first-token mode takes either."""
        cell, sample = choice.cell, choice.context.sample_id
        modes = ("prefill", "compressed") if cell.first_token == "n/a" else (cell.first_token,)
        keys = [(self._mode(dataclasses.replace(cell, first_token=mode)), sample) for mode in modes]
        return next((key for key in keys if key in self.full_outputs), None)

    def _flush(
        self, prompts: PromptSet, batch: PrefillBatch, decode: DecodeBatch, pending: list[Finished], build: Build,
        ready: dict[int, Ready], last: bool = False,
    ) -> list[Finished]:  # fmt: skip
        """Records the finished rows whose `full` has answered; gives the others back unless these are the last."""
        waits = [] if last or not any(c.method == "full" for c in batch.cells) else [
            done for done in pending if self._full_key(done[0].tag) is None]  # fmt: skip
        now = [done for done in pending if not any(done is w for w in waits)]
        if not now:
            return waits
        seconds = (time.perf_counter() - self._clock) / len(now)
        distances = self._distances(prompts, batch, now, build, ready)
        for (ask, output), distance in zip(now, distances, strict=True):
            choice: Choice = ask.tag
            times = {
                "prefill": ready[choice.sample].seconds,
                "select": choice.seconds,
                "decode": seconds,
                "shared": True,
            }
            self._record(prompts, batch, decode, choice, output, times, distance)
        self._clock = time.perf_counter()
        return waits

    def _distances(
        self, prompts: PromptSet, batch: PrefillBatch, rows: list[Finished], build: Build, ready: dict[int, Ready]
    ) -> list[fidelity.Distance | None]:
        """Per finished row how far its cache moves the predictions of full's answer."""
        found: list[fidelity.Distance | None] = [None] * len(rows)
        if not self.options.fidelity:
            return found
        asks = [ask for ask, _ in rows]
        keys = [self._full_key(ask.tag) for ask in asks]
        asked = [self._asked(ask.tag.cell, batch.start + ask.tag.sample) for ask in asks]
        mine = [i for i, ask in enumerate(asks) if keys[i] is not None and ask.tag.cell.method != "full" and asked[i]]
        try:
            self._refer(prompts, [(asks[i].tag, keys[i]) for i in mine], ready)  # type: ignore[misc]
            for some in fidelity.batches([asks[i] for i in mine], self.room):
                part = [mine[at] for at in some]
                answers = [self.references[keys[i]] for i in part]  # type: ignore[index]
                measured = fidelity.distances(
                    self.model, [asks[i] for i in part], answers, self.beside, build, one=build is not CompressedCache
                )
                for i, distance in zip(part, measured, strict=True):
                    found[i] = distance
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._free()
            self.outcome.halved.append(
                f"{batch.id}: no memory to compare predictions with full's; kl, top1, nll are null"
            )
        return found

    def _refer(self, prompts: PromptSet, wanted: list[tuple[Choice, Key]], ready: dict[int, Ready]) -> None:
        """Full's predictions of its own answers, once per prompt and mode."""
        for choice, key in wanted:
            if key in self.references:
                continue
            mode = key[0].split("/")[2]
            cell = dataclasses.replace(
                choice.cell, method="full", ratio="1", budget=None, decode=None, first_token=mode
            )
            ask = self._ask(
                prompts, self._choose(choice.sample, cell, ready[choice.sample].context), ready[choice.sample]
            )
            ids = self.full_outputs[key]
            (self.references[key],) = fidelity.references(self.model, [ask], [ids], self.beside)

    def _record(
        self, prompts: PromptSet, batch: PrefillBatch, decode: DecodeBatch, choice: Choice, output: Generated,
        times: dict[str, Any], distance: fidelity.Distance | None,
    ) -> None:  # fmt: skip
        index = batch.start + choice.sample
        sample, prompt, cell = prompts.samples[index], prompts.prompts[index], choice.cell
        if (cell.id, sample.id) in self.done or not self._asked(cell, index):
            return
        key = self._full_key(choice)
        try:
            record = ok_record(
                cell=cell, prompts=prompts, sample=sample, prompt=prompt, method=self._method(cell),
                selection=choice.selection, output=output, full=self.full_outputs[key] if key else None,
                distance=distance, dims=self.model.shapes.dims, n=choice.context.n, seconds=times, batch=decode.id,
            )  # fmt: skip
        except Exception as error:  # a task's or a plugin's fault: that sample's result
            self._failed(prompts, index, cell, error, decode.id)
            return
        self.sink.add_prompt(prompt_entry(prompts, sample, prompt, self.options.store_prompts))
        if index < self.options.keep_maps:
            self.sink.keep_map(
                cell.task, sample.id, cell.id, positions_kept(choice.selection.kept, choice.context.kv_heads)
            )
        self._write(record)
        self._tick(1, cell.task)

    def _write(self, record: dict[str, Any]) -> None:
        key = (record["cell_id"], record["sample_id"])
        if key in self.done:
            return
        self.sink.append(record)
        self.outcome.written += 1
        if record["status"] == "ok":
            self.done.add(key)
        else:
            self.outcome.errors += 1
            self.outcome.messages[f"{record['method']}: {record['error']}"] += 1


def question_start(regions: Sequence[Any]) -> int:
    """First token of the question; the prompt's last token where it has none."""
    return next((r.start for r in regions if r.kind == "question"), regions[-1].end - 1)
