"""The loop: prefill a batch of samples once; for every cell select, fork, decode together, compare, score, record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from typing import Any, Protocol

import torch

from kvcli.attention.patch import Idle, patched
from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.reading import ReadingCache
from kvcli.cache.stored import StoredCache
from kvcli.cache.workspace import Workspace
from kvcli.engine.asking import Asker, Choice
from kvcli.engine.asking import Options as Options
from kvcli.engine.comparing import Comparer, mode_of
from kvcli.engine.fidelity import Distance
from kvcli.engine.generate import Ask, AskOutOfMemory, Build, Generated, OutOfRoom, generate
from kvcli.engine.memory import Room, is_out_of_memory
from kvcli.engine.needs import require
from kvcli.engine.plan import MAX_DECODE_ROWS, WAVES, Anchor, Cell, DecodeBatch, Plan, PrefillBatch
from kvcli.engine.pool import PoolCache
from kvcli.engine.prefilling import Prefiller, Ready
from kvcli.engine.prepare import PromptSet
from kvcli.engine.records import error_record, ok_record, prompt_entry
from kvcli.engine.selecting import SharedContextWritten, positions_kept
from kvcli.errors import Exit
from kvcli.methods import catalog
from kvcli.methods.base import Method
from kvcli.models.wrapper import Model
from kvcli.weights.model import Stopped
from kvcli.weights.spec import DENSE

Key = tuple[str, str]
Finished = tuple[Ask, Generated]
FLUSH = 64
"""Finished rows that wait for each other, so that their predictions are compared with full's in one pass."""


class Sink(Protocol):
    """Where records go (results.store.RunStore)."""

    def done_keys(self) -> set[Key]: ...

    def append(self, record: dict[str, Any]) -> None: ...

    def add_prompt(self, entry: dict[str, Any]) -> None: ...

    def keep_map(self, task: str, sample_id: str, cell_id: str, kept: Any) -> None: ...


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
class Runner:
    """One pass over a plan.

    `stop(progressed)` is asked before each prefill and each step; `progress(done, total, task)` is told of each record.
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
    enter: Callable[[str], Model] | None = None
    """Gives the model with other weights; the one before is no longer used. None: all batches are of one kind."""
    weights: str = DENSE
    """The weights that `model` has."""

    def __post_init__(self) -> None:
        self.done = self.sink.done_keys()
        self.methods: dict[str, Method] = {}
        self.outcome = Outcome()
        self.memory = Workspace()
        rows = self.options.decode_rows
        self.room = Room(self.options.memory, max(rows, MAX_DECODE_ROWS) if self.options.memory else rows)
        self.seen = self.total = 0
        self.completed = False
        """Whether this run has finished a decode batch with something new in it: one that is stopped is repeated whole,
        and a time limit that stops before anything new would stop there again and again."""

    def run(self) -> Outcome:
        every = [(self.prompt_sets[b.task, b.shots], b, d.rows) for b in self.plan.batches for d in self._decodes(b)]
        self.total = sum(self._asked(c, b.start + i) for _, b, rows in every for i, c in rows)
        self._tick(self.total - sum(self._open(*item) for item in every), "")
        for weights, batches in groupby(self.plan.batches, key=lambda batch: batch.weights):
            missing = [batch for batch in batches if self._todo(batch)]
            if not missing or not self._entered(weights):
                continue
            cells = [cell for batch in missing for cell in batch.cells]
            texts = {x.method for cell in cells for x in (cell, cell.match) if x is not None}
            require(self.model, {text: self._built(text).needs() for text in sorted(texts)})
            self.prefiller = Prefiller(self.model, self.options.max_new_tokens)
            self.asker = Asker(self.model, self.options, self._method)
            self.comparer = Comparer(self.model, self.asker, self.full_outputs)
            with patched(self.model.hf, Idle()):
                for batch in missing:
                    if self.outcome.stopped is None:
                        self._prefill_batch(batch)
        return self.outcome

    def _entered(self, weights: str) -> bool:
        """Whether the model has these weights now; False where the command was asked to stop meanwhile."""
        if self.enter is None or weights == self.weights:
            return True
        if self._stopped():
            return False
        self.prefiller = self.asker = self.comparer = self.model = None  # type: ignore[assignment]
        try:
            self.model = self.enter(weights)
        except Stopped:
            return False
        self.weights = weights
        return True

    def _method(self, cell: Cell | Anchor) -> Method:
        return self._built(cell.method)

    def _built(self, text: str) -> Method:
        if text not in self.methods:
            self.methods[text] = catalog.build(text)
        return self.methods[text]

    def _needs(self, cell: Cell) -> frozenset[str]:
        """What its method reads, and the one whose bytes it is held to."""
        needed = self._method(cell).needs()
        return needed | self._method(cell.match).needs() if cell.match else needed

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
        return any(self._todo(batch) for batch in self.plan.batches)

    def stopping(self) -> bool:
        """Whether the command was asked to stop; asks again."""
        return self._stopped()

    def _stopped(self) -> bool:
        if self.outcome.stopped is None:
            self.outcome.stopped = self.stop(self.completed)
        return self.outcome.stopped is not None

    def _tick(self, rows: int, label: str) -> None:
        self.seen += rows
        self.progress(self.seen, self.total, label)

    def _prefill_batch(self, batch: PrefillBatch) -> None:
        prompts, todo = self.prompt_sets[batch.task, batch.shots], self._todo(batch)
        if todo and not self._stopped():
            self._samples(prompts, batch, todo, list(range(batch.end - batch.start)))

    def _todo(self, batch: PrefillBatch) -> list[DecodeBatch]:
        """Its decode batches in which a record is missing."""
        prompts = self.prompt_sets[batch.task, batch.shots]
        return [d for d in self._decodes(batch) if self._open(prompts, batch, d.rows)]

    def _samples(self, prompts: PromptSet, batch: PrefillBatch, todo: list[DecodeBatch], rows: list[int]) -> None:
        """These samples of the batch, prefilled together or, where memory does not allow it, half by half."""
        if self._stopped():
            return
        names = {name for cell in batch.cells for name in self._needs(cell)}
        failure: BaseException | None = None
        try:
            ready = self.prefiller.run(prompts, batch, rows, names)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # its frames hold the tensors that did not fit
        if failure is not None:
            self._free()
            if len(rows) == 1:
                for number, cell, name in ((i, c, d.id) for d in todo for i, c in d.rows if i in rows):
                    self._failed(prompts, batch.start + number, cell, failure, name)
                return
            self.outcome.halved.append(
                f"{batch.id}: {len(rows)} prompts did not fit in memory together, went on in smaller batches"
            )
            for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                self._samples(prompts, batch, todo, part)
            return
        self.comparer.clear()
        for decode in todo:
            if not self._stopped():
                before = len(self.done)
                _Decoding(self, prompts, batch, decode, ready).run()
                self.completed |= self.outcome.stopped is None and len(self.done) > before

    def _free(self) -> None:
        """Gives memory back after it ran out."""
        self.memory = Workspace()
        self.comparer.memory = Workspace()
        self.prefiller.clear()
        self.comparer.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _failed(self, prompts: PromptSet, index: int, cell: Cell, error: BaseException, batch: str) -> None:
        sample = prompts.samples[index]
        if self._asked(cell, index) and (cell.id, sample.id) not in self.done:
            self._write(error_record(cell, prompts, sample, self._method(cell), error, batch))
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


@dataclass
class _Decoding:
    """One decode batch: all its rows are asked, generated, compared and recorded."""

    runner: Runner
    prompts: PromptSet
    batch: PrefillBatch
    decode: DecodeBatch
    ready: dict[int, Ready]
    pending: list[Finished] = field(default_factory=list)

    def run(self) -> None:
        """Rows that had no room are asked again in batches half as large; one that has none alone is an error."""
        runner = self.runner
        self.build = self._build()
        full = [(i, cell) for i, cell in self.decode.rows if cell.method == "full" and i in self.ready]
        self.unanswered = {(mode_of(cell), self.prompts.samples[self.batch.start + i].id) for i, cell in full}
        self.clock = time.perf_counter()
        room, steady, waiting = runner.room, runner.options.deterministic, _Waiting(self)
        asks: Iterator[Ask] = waiting
        while True:
            try:
                for done in generate(
                    runner.model, asks, room=room, memory=runner.memory, build=self.build, steady=steady,
                    stop=runner._stopped,
                ):  # fmt: skip
                    self.pending.append(done)
                    self.unanswered -= runner.comparer.note(done[0].tag, done[1].ids)
                    if len(self.pending) >= FLUSH:
                        self._flush()
                break
            except OutOfRoom as error:
                short = error.with_traceback(None)
            runner._free()
            again = short.asks
            why = short.__cause__ or short
            if short.asking:  # with nothing else in the batch: once more now that memory was given back
                if not short.rows:
                    self._failed(*waiting.skip(), why.__cause__ or why)
            elif short.rows > 1:
                room, steady = room.halved(short.rows), False
                runner.outcome.halved.append(
                    f"{self.decode.id}: {short.rows} rows did not fit in memory together, went on in smaller batches"
                )
            else:
                alone, *again = again
                self._failed(alone.tag.sample, alone.tag.cell, why)
            asks = chain(again, asks)
        self._flush(last=runner.outcome.stopped is None)

    def _build(self) -> Build:
        cell = self.decode.rows[0][1]
        if cell.reading:
            return partial(ReadingCache, self.runner._method(cell))  # type: ignore[arg-type]
        if cell.decode is None:
            return StoredCache if cell.transformed else CompressedCache
        return partial(PoolCache, self.runner._method(cell), self.runner.model.shapes.heads)

    def _failed(self, sample: int, cell: Cell, error: BaseException) -> None:
        self.runner._failed(self.prompts, self.batch.start + sample, cell, error, self.decode.id)

    def _flush(self, last: bool = False) -> None:
        """Records the finished rows whose `full` has answered; the others wait unless these are the last.

        A batch that is repeated forms the same groups: what was known before it does not count.
        """
        keys = [self.runner.comparer.key(done[0].tag, self.unanswered) for done in self.pending]
        now = [done for done, key in zip(self.pending, keys, strict=True) if last or key not in self.unanswered]
        self.pending = [done for done in self.pending if not any(done is other for other in now)]
        if not now:
            return
        seconds = (time.perf_counter() - self.clock) / len(now)
        for (ask, output), distance in zip(now, self._distances([ask for ask, _ in now]), strict=True):
            self._record(ask.tag, output, seconds, distance)
        self.clock = time.perf_counter()

    def _distances(self, asks: list[Ask]) -> list[Distance | None]:
        """How far the rows' caches move the predictions; in smaller batches where memory does not allow all at once."""
        runner, room = self.runner, self.runner.room
        found: list[Distance | None] = [None] * len(asks)
        mine = list(range(len(asks))) if runner.options.fidelity else []
        while mine:
            try:
                some = runner.comparer.distances(self.prompts, [asks[i] for i in mine], self.ready, self.build, room)
            except OutOfRoom as error:
                rows, alone = error.rows, error.asks[0]
            else:
                for i, distance in zip(mine, some, strict=True):
                    found[i] = distance
                break
            runner._free()
            if rows == 1:
                mine = [i for i in mine if asks[i] is not alone]
                what = "no memory to compare a row's predictions: kl, top1, nll stay null"
            else:
                room = room.halved(rows)
                what = f"{rows} rows did not fit in memory to be compared together, went on in smaller batches"
            runner.outcome.halved.append(f"{self.decode.id}: {what}")
        return found

    def _open(self, choice: Choice) -> bool:
        """Whether a record of this row is wanted and not there yet."""
        index = self.batch.start + choice.sample
        key = (choice.cell.id, choice.context.sample_id)
        return self.runner._asked(choice.cell, index) and key not in self.runner.done

    def _record(self, choice: Choice, output: Generated, seconds: float, distance: Distance | None) -> None:
        if not self._open(choice):
            return
        runner, index, cell = self.runner, self.batch.start + choice.sample, choice.cell
        sample, prompt = self.prompts.samples[index], self.prompts.prompts[index]
        prefill = self.ready[choice.sample].seconds
        times = {"prefill": prefill, "select": choice.seconds, "decode": seconds, "shared": True}
        try:
            record = ok_record(
                cell=cell, prompts=self.prompts, sample=sample, prompt=prompt, method=runner._method(cell),
                selection=choice.selection, output=output, full=runner.comparer.answer(choice), distance=distance,
                dims=runner.model.shapes.dims, n=choice.context.n, seconds=times, batch=self.decode.id,
                payload=choice.payload, matched=choice.matched,
            )  # fmt: skip
        except Exception as error:  # a task's or a plugin's fault: that sample's result
            self._failed(choice.sample, cell, error)
            return
        runner.sink.add_prompt(prompt_entry(self.prompts, sample, prompt, runner.options.store_prompts))
        if index < runner.options.keep_maps:
            kept = positions_kept(choice.selection.kept, choice.context.kv_heads)
            runner.sink.keep_map(cell.task, sample.id, cell.id, kept)
        runner._write(record)
        runner._tick(1, cell.task)


class _Waiting:
    """The rows of a decode batch, selected when they are about to enter. A method's fault is that row's result."""

    def __init__(self, decoding: _Decoding) -> None:
        self.decoding = decoding
        self.rows = [(i, cell) for i, cell in decoding.decode.rows if i in decoding.ready]
        self.at = 0

    def __iter__(self) -> Iterator[Ask]:
        return self

    def __next__(self) -> Ask:
        decoding = self.decoding
        while self.at < len(self.rows):
            sample, cell = self.rows[self.at]
            try:
                ask = decoding.runner.asker.ask(decoding.prompts, sample, cell, decoding.ready[sample])
            except SharedContextWritten:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise AskOutOfMemory(str(error)) from error.with_traceback(None)
                decoding._failed(*self.skip(), error)
            else:
                self.at += 1
                return ask
        raise StopIteration

    def skip(self) -> tuple[int, Cell]:
        """Leaves the next row out."""
        self.at += 1
        return self.rows[self.at - 1]
