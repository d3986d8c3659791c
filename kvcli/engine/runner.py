"""The loop: prefill a batch of samples once; for every cell select, fork, decode together, compare, score, record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch

from kvcli.attention.patch import Idle, patched
from kvcli.cache.workspace import Workspace
from kvcli.engine.asking import Asker
from kvcli.engine.asking import Options as Options
from kvcli.engine.cells import Anchor, Cell, PromptKey
from kvcli.engine.comparing import Comparer
from kvcli.engine.decoding import Decoding
from kvcli.engine.memory import Room, is_out_of_memory
from kvcli.engine.needs import require
from kvcli.engine.plan import MAX_DECODE_ROWS, WAVES, DecodeBatch, Plan, PrefillBatch
from kvcli.engine.prefilling import Prefiller
from kvcli.engine.prompts import PromptSet
from kvcli.engine.records import error_record
from kvcli.errors import Exit
from kvcli.methods import catalog
from kvcli.methods.base import Method
from kvcli.models.wrapper import Model
from kvcli.weights.model import Stopped
from kvcli.weights.spec import DENSE

Key = tuple[str, str]


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
    prompt_sets: dict[PromptKey, PromptSet]
    sink: Sink
    options: Options
    stop: Callable[[bool], Exit | None] = lambda progressed: None
    progress: Any = lambda done, total, label: None
    wanted: set[str] | None = None
    """Cells this command asked for (None: all). A batch runs when one of their rows is missing, and then as a whole."""
    limit: int | None = None
    """The first so many samples of each task's order are asked for (None: all the plan has)."""
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
        most = max(rows, MAX_DECODE_ROWS) if self.options.memory else rows
        self.room = Room(self.options.memory, most, self.options.figures)
        self.seen = self.total = 0
        self.completed = False
        """Whether this run has finished a decode batch with something new in it: one that is stopped is repeated whole,
        and a time limit that stops before anything new would stop there again and again."""

    def run(self) -> Outcome:
        every = [(self.prompt_sets[b.prompts], b, d.rows) for b in self.plan.batches for d in self._decodes(b)]
        self.total = sum(self.asked(c, b.start + i) for _, b, rows in every for i, c in rows)
        self.tick(self.total - sum(self._open(*item) for item in every), "")
        for weights, batches in groupby(self.plan.batches, key=lambda batch: batch.weights):
            missing = [batch for batch in batches if self._todo(batch)]
            if not missing or not self._entered(weights):
                continue
            cells = [cell for batch in missing for cell in batch.cells]
            texts = {x.method for cell in cells for x in (cell, cell.match) if x is not None}
            require(self.model, {text: self._built(text).needs() for text in sorted(texts)})
            self.prefiller = Prefiller(self.model, self.options.max_new_tokens)
            self.asker = Asker(self.model, self.options, self.method)
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
        if self.stopping():
            return False
        self.prefiller = self.asker = self.comparer = self.model = None  # type: ignore[assignment]
        try:
            self.model = self.enter(weights)
        except Stopped:
            return False
        self.weights = weights
        return True

    def method(self, cell: Cell | Anchor) -> Method:
        return self._built(cell.method)

    def _built(self, text: str) -> Method:
        if text not in self.methods:
            self.methods[text] = catalog.build(text)
        return self.methods[text]

    def _needs(self, cell: Cell) -> frozenset[str]:
        """What its method reads, and the one whose bytes it is held to."""
        needed = self.method(cell).needs()
        return needed | self.method(cell.match).needs() if cell.match else needed

    def asked(self, cell: Cell, index: int) -> bool:
        """Whether this command wants a record of the cell for the task's sample of this index."""
        mine = self.wanted is None or cell.id in self.wanted
        return mine and (self.limit is None or index < self.prompt_sets[cell.prompt_key].within(self.limit))

    def _open(self, prompts: PromptSet, batch: PrefillBatch, rows: Iterable[tuple[int, Cell]]) -> int:
        """How many of these rows are asked for and have no record yet."""
        asked = ((batch.start + i, cell) for i, cell in rows if self.asked(cell, batch.start + i))
        return sum((cell.id, prompts.samples[i].id) not in self.done for i, cell in asked)

    def _decodes(self, batch: PrefillBatch) -> Iterator[DecodeBatch]:
        return batch.decode_batches(self.options.decode_rows, 1 if self.options.deterministic else WAVES)

    def anything_missing(self) -> bool:
        """Whether any row of the wanted cells has no record yet."""
        return any(self._todo(batch) for batch in self.plan.batches)

    def stopping(self) -> bool:
        if self.outcome.stopped is None:
            self.outcome.stopped = self.stop(self.completed)
        return self.outcome.stopped is not None

    def tick(self, rows: int, label: str) -> None:
        self.seen += rows
        self.progress(self.seen, self.total, label)

    def _prefill_batch(self, batch: PrefillBatch) -> None:
        prompts, todo = self.prompt_sets[batch.prompts], self._todo(batch)
        if todo and not self.stopping():
            self._samples(prompts, batch, todo, list(range(batch.end - batch.start)))

    def _todo(self, batch: PrefillBatch) -> list[DecodeBatch]:
        """Its decode batches in which a record is missing."""
        prompts = self.prompt_sets[batch.prompts]
        return [d for d in self._decodes(batch) if self._open(prompts, batch, d.rows)]

    def _samples(self, prompts: PromptSet, batch: PrefillBatch, todo: list[DecodeBatch], rows: list[int]) -> None:
        """These samples of the batch, prefilled together or, where memory does not allow it, half by half."""
        if self.stopping():
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
            self.free()
            if len(rows) == 1:
                for number, cell, name in ((i, c, d.id) for d in todo for i, c in d.rows if i in rows):
                    self.failed(prompts, batch.start + number, cell, failure, name)
                return
            self.outcome.halved.append(
                f"{batch.id}: {len(rows)} prompts did not fit in memory together, went on in smaller batches"
            )
            for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                self._samples(prompts, batch, todo, part)
            return
        self.comparer.clear()
        self.asker.own.clear()
        for decode in todo:
            if not self.stopping():
                before = len(self.done)
                Decoding(self, prompts, batch, decode, ready).run()
                self.completed |= self.outcome.stopped is None and len(self.done) > before

    def free(self) -> None:
        """Gives memory back after it ran out."""
        self.memory = Workspace()
        self.comparer.memory = Workspace()
        self.prefiller.clear()
        self.comparer.clear()
        self.asker.own.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def failed(self, prompts: PromptSet, index: int, cell: Cell, error: BaseException, batch: str) -> None:
        sample = prompts.samples[index]
        if self.asked(cell, index) and (cell.id, sample.id) not in self.done:
            self.write(error_record(cell, prompts, sample, self.method(cell), error, batch))
            self.tick(1, cell.task)

    def write(self, record: dict[str, Any]) -> None:
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
