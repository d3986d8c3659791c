"""The loop: prefill once per batch of samples; per sample and cell select, fork, decode together, score, record."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kvcli.attention.capture import Dense, Needs
from kvcli.cache.budget import Budget
from kvcli.cache.kv_cache import CompressedCache, Row, Workspace
from kvcli.engine.generate import Generated, Start, StopRules, end_tokens, generate
from kvcli.engine.plan import Cell, DecodeBatch, Plan, PrefillBatch, ratio_of
from kvcli.engine.prefixes import PrefixCache, shared_cuts
from kvcli.engine.prepare import PromptSet
from kvcli.engine.records import error_record, ok_record, prompt_entry
from kvcli.engine.selecting import SharedContextWritten, positions_kept, select
from kvcli.errors import Exit, KvcliError
from kvcli.methods import catalog
from kvcli.methods.base import Method, Selection
from kvcli.methods.context import Context
from kvcli.models.wrapper import Model

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


@dataclass
class Outcome:
    written: int = 0
    errors: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    """Failed samples per method and message."""
    stopped: Exit | None = None


@dataclass
class Ready:
    """A prefilled sample. first_token: what the dense prefill's logits say, for --first-token prefill."""

    context: Context
    first_token: int


@dataclass
class Choice:
    """One row of a decode batch after selection."""

    sample: int
    cell: Cell
    context: Context
    selection: Selection
    seconds: float


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
        self.shared: dict[Any, tuple[list[tuple[int, ...]], PrefixCache]] = {}
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
        return batch.decode_batches(self.options.decode_rows)

    def anything_missing(self) -> bool:
        """Whether any row of the wanted cells has no record yet."""
        return any(
            self._open(self.prompt_sets[b.task, b.shots], b, d.rows)
            for b in self.plan.batches
            for d in self._decodes(b)
        )

    def _prefill_batch(self, batch: PrefillBatch) -> None:
        prompts = self.prompt_sets[batch.task, batch.shots]
        todo = [d for d in self._decodes(batch) if self._open(prompts, batch, d.rows)]
        if not todo:
            return
        self.outcome.stopped = self.stop(self.outcome.written > 0)
        if self.outcome.stopped is not None:
            return
        started = time.perf_counter()
        try:
            ready = self._prefill(prompts, batch)
        except torch.OutOfMemoryError as e:
            what = f"out of memory while prefilling {batch.end - batch.start} prompts together"
            raise KvcliError(what, given=batch.id, fix="--prefill-batch 1", code=Exit.ENVIRONMENT) from e
        prefill_seconds = (time.perf_counter() - started) / len(ready)
        for decode in todo:
            self.outcome.stopped = self.stop(self.outcome.written > 0)
            if self.outcome.stopped is not None:
                return
            before = self._open(prompts, batch, decode.rows)
            self._decode_batch(prompts, batch, decode, ready, prefill_seconds)
            self._tick(before, batch.task)

    def _prefill(self, prompts: PromptSet, batch: PrefillBatch) -> list[Ready]:
        """The batch's samples after their prefill; those behind the same shared prefix run together."""
        chosen = prompts.prompts[batch.start : batch.end]
        needs = Needs.of(need for cell in batch.cells for need in self._method(cell).needs())
        cuts, prefixes = self._prefixes(prompts, batch, needs)
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(chosen):
            mine = cuts[batch.start + row]
            groups.setdefault(tuple(prompt.ids[: mine[-1]]) if mine else (), []).append(row)
        ready: dict[int, Ready] = {}
        for shared, rows in groups.items():
            prefix = prefixes.get(shared, cuts[batch.start + rows[0]])
            n = len(shared)
            ids = [chosen[row].ids[n:] for row in rows]
            questions = [question_start(chosen[row].regions) - n for row in rows]
            prefilled = self.model.prefill(ids, needs, questions, prefix)
            for at, row in enumerate(rows):
                context = self._context(prefilled.dense(at), prefilled.capture.scaling, prompts, batch.start + row)
                ready[row] = Ready(context, int(prefilled.logits[at].argmax()))
        return [ready[row] for row in range(len(chosen))]

    def _prefixes(
        self, prompts: PromptSet, batch: PrefillBatch, needs: Needs
    ) -> tuple[list[tuple[int, ...]], PrefixCache]:
        """Where shared prefixes end in each prompt of the batch's generation, and the cache that holds them."""
        key = (batch.task, batch.shots, batch.samples, needs)
        if key not in self.shared:
            some = prompts.prompts[: batch.samples]
            limits = [min(question_start(p.regions), len(p.ids) - 1) for p in some]

            def extend(ids: Sequence[int], parent: Dense | None) -> Dense:
                return self.model.prefill([ids], needs, [len(ids)], parent).dense(0)

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

    def _decode_batch(
        self, prompts: PromptSet, batch: PrefillBatch, decode: DecodeBatch, ready: list[Ready],
        prefill_seconds: float,
    ) -> None:  # fmt: skip
        choices: list[Choice] = []
        for i, cell in decode.rows:
            sample = prompts.samples[batch.start + i]
            try:
                choices.append(self._choose(i, cell, ready[i].context))
            except SharedContextWritten:
                raise
            except Exception as error:  # a method's fault is that cell's result, not the run's end
                if self._asked(cell, batch.start + i):
                    self._write(error_record(cell, prompts, sample, self._method(cell), error, decode.id))
        if not choices:
            return
        started = time.perf_counter()
        rows = [self._row(c) for c in choices]
        starts = [self._start(c, ready[c.sample].first_token) for c in choices]
        rules = [self._rules(prompts, c.cell) for c in choices]
        try:
            cache = CompressedCache(rows, max(r.max_new_tokens for r in rules), self.memory)
            alloc = cache.nbytes() // len(rows)
            outputs = generate(self.model, cache, starts, rules)
        except torch.OutOfMemoryError as e:
            what = f"out of memory while decoding {len(rows)} rows together"
            raise KvcliError(what, given=decode.id, fix="--decode-batch 16, or --memory", code=Exit.ENVIRONMENT) from e
        seconds = (time.perf_counter() - started) / len(rows)
        for choice, output in zip(choices, outputs, strict=True):
            times = {"prefill": prefill_seconds, "select": choice.seconds, "decode": seconds, "shared": True}
            self._record(prompts, batch, decode, choice, output, times, alloc)

    def _choose(self, sample: int, cell: Cell, context: Context) -> Choice:
        started = time.perf_counter()
        ctx = dataclasses.replace(context, seed=cell.seed or 0)
        size = (len(context.keys), context.kv_heads, self.options.strict_window)
        ratio = ratio_of(cell)
        if ratio is not None:
            budget = Budget.of_ratio(ratio, ctx.n, *size)
        else:
            budget = Budget.of_size(cell.budget or ctx.n, ctx.n, *size)
        selection = select(self._method(cell), ctx, budget)
        return Choice(sample, cell, ctx, selection, time.perf_counter() - started)

    def _row(self, choice: Choice) -> Row:
        """The row's kept pairs; in the compressed mode the last prompt token leaves and is fed again."""
        kept = choice.selection.kept
        if choice.cell.first_token == "compressed":
            kept = [[p[:-1] for p in layer] if isinstance(layer, list) else layer[..., :-1] for layer in kept]
        return Row(choice.context.keys, choice.context.values, kept, self._rotate(choice))

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

    def _record(
        self, prompts: PromptSet, batch: PrefillBatch, decode: DecodeBatch, choice: Choice, output: Generated,
        times: dict[str, Any], alloc: int,
    ) -> None:  # fmt: skip
        index = batch.start + choice.sample
        sample, prompt, cell = prompts.samples[index], prompts.prompts[index], choice.cell
        mode = f"{cell.task}/{cell.shots}/{cell.first_token}"
        if cell.method == "full":
            self.full_outputs[mode, sample.id] = output.ids
        if (cell.id, sample.id) in self.done or not self._asked(cell, index):
            return
        try:
            record = self._ok_record(prompts, decode, choice, output, times, alloc, index)
        except Exception as error:  # a task's or a plugin's fault: that sample's result
            self._write(error_record(cell, prompts, sample, self._method(cell), error, decode.id))
            return
        self.sink.add_prompt(prompt_entry(prompts, sample, prompt, self.options.store_prompts))
        if index < self.options.keep_maps:
            self.sink.keep_map(
                cell.task, sample.id, cell.id, positions_kept(choice.selection.kept, choice.context.kv_heads)
            )
        self._write(record)

    def _ok_record(
        self, prompts: PromptSet, decode: DecodeBatch, choice: Choice, output: Generated, times: dict[str, Any],
        alloc: int, index: int,
    ) -> dict[str, Any]:  # fmt: skip
        cell, sample, prompt = choice.cell, prompts.samples[index], prompts.prompts[index]
        full = self.full_outputs.get((f"{cell.task}/{cell.shots}/{cell.first_token}", sample.id))
        return ok_record(
            cell=cell, prompts=prompts, sample=sample, prompt=prompt, method=self._method(cell),
            selection=choice.selection, output=output, full=full,
            dims=self.model.shapes.dims, n=choice.context.n, seconds=times, alloc=alloc, batch=decode.id,
        )  # fmt: skip

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
