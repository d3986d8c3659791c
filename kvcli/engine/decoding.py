"""One decode batch: its rows are made, answered together, compared with full's answers and recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING

from kvcli.engine.asking import Choice
from kvcli.engine.caches import build_of, storage_of
from kvcli.engine.cells import Cell
from kvcli.engine.choosing import choose_all
from kvcli.engine.comparing import mode_of
from kvcli.engine.fidelity import Distance
from kvcli.engine.generate import Ask, AskOutOfMemory, Build, Generated, OutOfRoom, generate
from kvcli.engine.memory import Room, is_out_of_memory
from kvcli.engine.plan import DecodeBatch, PrefillBatch
from kvcli.engine.prefilling import Ready
from kvcli.engine.prompts import PromptSet
from kvcli.engine.records import ok_record, prompt_entry
from kvcli.engine.selecting import SharedContextWritten, positions_kept

if TYPE_CHECKING:
    from kvcli.engine.runner import Runner

Finished = tuple[Ask, Generated]
FLUSH = 64
"""Finished rows that wait for each other, so that their predictions are compared with full's in one pass; fewer where
what they hold themselves would take more memory than a batch may."""


@dataclass
class Decoding:
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
                for done in self._answers(asks, room, steady):
                    self.pending.append(done)
                    self.unanswered -= runner.comparer.note(done[0].tag, done[1].ids)
                    if len(self.pending) >= FLUSH or self._crowded():
                        self._flush()
                break
            except OutOfRoom as error:
                short = error.with_traceback(None)
            runner.free()
            again = short.asks
            why = short.__cause__ or short
            if short.asking:  # with nothing else in the batch: once more now that memory was given back
                if not short.rows:
                    self.failed(*waiting.skip(), why.__cause__ or why)
            elif short.rows > 1:
                room, steady = room.halved(short.rows), False
                runner.outcome.halved.append(
                    f"{self.decode.id}: {short.rows} rows did not fit in memory together, went on in smaller batches"
                )
            else:
                alone, *again = again
                self.failed(alone.tag.sample, alone.tag.cell, why)
            asks = chain(again, asks)
        self._flush(last=runner.outcome.stopped is None)

    def _answers(self, asks: Iterator[Ask], room: Room, steady: bool) -> Iterator[Finished]:
        """Every ask with its answer, generated or chosen."""
        runner = self.runner
        model, memory = runner.model, runner.memory
        if self.prompts.choosing:
            return choose_all(model, asks, room=room, memory=memory, build=self.build, stop=runner.stopping)
        return generate(model, asks, room=room, memory=memory, build=self.build, steady=steady, stop=runner.stopping)

    def _build(self) -> Build:
        cell = self.decode.rows[0][1]
        method = self.runner.method(cell)
        return build_of(storage_of(method, cell.decode), method, self.runner.model.shapes.heads)

    def failed(self, sample: int, cell: Cell, error: BaseException) -> None:
        self.runner.failed(self.prompts, self.batch.start + sample, cell, error, self.decode.id)

    def _crowded(self) -> bool:
        """Whether the finished rows hold more memory of their own than there is for a batch."""
        room = self.runner.room
        if room.bytes is None or not room.figures:
            return False
        own: dict[int, int] = {}
        for ask, _ in self.pending:
            own |= ask.row.own
        return sum(own.values()) > room.bytes

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
            runner.free()
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
        key = (choice.cell.id, choice.sample_id)
        return self.runner.asked(choice.cell, index) and key not in self.runner.done

    def _record(self, choice: Choice, output: Generated, seconds: float, distance: Distance | None) -> None:
        if not self._open(choice):
            return
        runner, index, cell = self.runner, self.batch.start + choice.sample, choice.cell
        sample, prompt = self.prompts.samples[index], self.prompts.prompts[index]
        prefill = self.ready[choice.sample].seconds
        times = {"prefill": prefill, "select": choice.seconds, "decode": seconds, "shared": True}
        try:
            record = ok_record(
                cell=cell, prompts=self.prompts, sample=sample, prompt=prompt, method=runner.method(cell),
                selection=choice.selection, output=output, full=runner.comparer.answer(choice), distance=distance,
                dims=runner.model.shapes.dims, n=choice.context.n, seconds=times, batch=self.decode.id,
                payload=choice.payload, matched=choice.matched,
            )  # fmt: skip
        except Exception as error:  # a task's or a plugin's fault: that sample's result
            self.failed(choice.sample, cell, error)
            return
        runner.sink.add_prompt(prompt_entry(self.prompts, sample, prompt, runner.options.store_prompts))
        if index < runner.options.keep_maps:
            kept = positions_kept(choice.selection.kept, choice.context.kv_heads)
            behind = list(range(choice.context.n, len(prompt.ids)))
            kept = [[[*head, *behind] for head in layer] for layer in kept]
            runner.sink.keep_map(cell.task, sample.id, cell.id, kept)
        runner.write(record)
        runner.tick(1, cell.task)


class _Waiting:
    """The rows of a decode batch, selected when they are about to enter. A method's fault is that row's result."""

    def __init__(self, decoding: Decoding) -> None:
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
                ask = decoding.runner.asker.ask(
                    decoding.prompts, sample, cell, decoding.ready[sample], self._beside(sample)
                )
            except SharedContextWritten:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise AskOutOfMemory(str(error)) from error.with_traceback(None)
                decoding.failed(*self.skip(), error)
            else:
                self.at += 1
                return ask
        raise StopIteration

    def _beside(self, sample: int) -> Iterator[tuple[int, Cell]]:
        """The rows of the same context that are still to come."""
        ready = self.decoding.ready
        mine = ready[sample].context
        return (row for row in islice(self.rows, self.at + 1, None) if ready[row[0]].context is mine)

    def skip(self) -> tuple[int, Cell]:
        """Leaves the next row out."""
        self.at += 1
        return self.rows[self.at - 1]
