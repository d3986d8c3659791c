"""One pass of a benchmark: prefill, selection, compressed cache and decode steps of one method.

Every prompt is prefilled alone, with the statistics this method needs and no others, and compressed at once; then all
rows decode together, from the cache that a sweep decodes this method's rows from. The first token is the prefill's;
each of `new_tokens` decode steps reads one and gives the next. Nothing ends a row early.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from kvcli.attention.capture import Needs
from kvcli.cache.budget import Budget
from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import STORED_BYTES, Row, payload_bytes
from kvcli.engine.asking import Asker, Options, pairs_of, pruned_row
from kvcli.engine.bench import Job
from kvcli.engine.bench_rows import Held, joined
from kvcli.engine.caches import build_of, storage_of
from kvcli.engine.cells import Cell
from kvcli.engine.meter import Memory, Meter
from kvcli.engine.needs import captured, given
from kvcli.engine.prefilling import passes
from kvcli.engine.selecting import select
from kvcli.methods import catalog
from kvcli.methods.base import Reader, Selection
from kvcli.methods.composed import transform_of
from kvcli.methods.context import Context
from kvcli.models.wrapper import Model
from kvcli.spans import Region

SHOTS = 8


def regions(n: int) -> list[Region]:
    """Regions of a prompt of n tokens: special 1, system and question n // 64 each, between them 8 shots of one size.

    What the shots leave over goes to the question. Methods that keep or drop whole shots have something to do, and
    from some 100 tokens on a fifth of the prompt has room for one shot.
    """
    edge = max(1, n // 64)
    shot = (n - 1 - 2 * edge) // SHOTS
    sizes = [("special", -1, 1), ("system", -1, edge), *(("shot", i, shot) for i in range(SHOTS))]
    found, start = [], 0
    for kind, index, size in sizes:
        found.append(Region(kind, start, start + size, index))
        start += size
    return [*found, Region("question", start, n)]


def prompt(n: int, vocabulary: int, first: int | None, seed: int, row: int) -> list[int]:
    """n token ids drawn by seed and row; `first` (the BOS), where there is one, in front."""
    drawn = random.Random(f"bench:{seed}:{row}").choices(range(vocabulary), k=n)
    return drawn if first is None else [first, *drawn[1:]]


@dataclass(frozen=True)
class Pass:
    """What one pass took. seconds and peaks by phase; steps: seconds of each decode step.

    payload, end, read: 16-bit bytes of one prompt's cache before and behind the decode steps, and of what a new token
    reads where the method chooses that (else None), means over the rows. alloc: bytes really held per row when all
    new tokens are in; buffer: those of them that are one layer, written out for attention.
    """

    batch: int
    seconds: dict[str, float]
    steps: list[float]
    idle: int | None
    peaks: dict[str, int]
    payload: float
    end: float
    read: float | None
    alloc: int
    buffer: int
    flags: frozenset[str]
    cpu_share: float
    tokens: list[list[int]]
    """Per row the prefill's token and those of the decode steps."""

    @property
    def above_idle(self) -> int | None:
        """Peak bytes beyond the loaded model."""
        return None if self.idle is None else max(self.peaks.values()) - self.idle

    def figures(self) -> dict[str, float]:
        """Seconds by the names of the record."""
        compress = self.seconds["select"] + self.seconds["build"]
        decode = sum(self.steps)
        later = sorted(self.steps[1:])
        return {
            "prefill": self.seconds["prefill"], "select": self.seconds["select"], "build": self.seconds["build"],
            "compress": compress, "first_step": self.steps[0],
            "first_token": self.seconds["prefill"] + compress + self.steps[0],
            "per_token": statistics.median(later), "per_token_p90": quantile(later, 0.9), "decode": decode,
            "total": self.seconds["prefill"] + compress + decode,
        }  # fmt: skip

    @property
    def rate(self) -> float:
        """Tokens per second of the steps after the first, all rows together."""
        return self.batch * (len(self.steps) - 1) / sum(self.steps[1:])


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between neighbours, as numpy's default."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


class Measured:
    """A loaded model with one method and one ratio.

    growth: bytes per row by which the cache has grown in a pass of all new tokens; 0 where it has all its room from
    the first.
    """

    def __init__(self, job: Job, model: Model, memory: Memory) -> None:
        self.job, self.model, self.memory = job, model, memory
        self.method = catalog.build(job.method)
        self.storage = storage_of(self.method, job.decode)
        self.build = build_of(self.storage, self.method, model.shapes.heads)
        self.cell = Cell(
            "bench", "", 0, job.method, job.ratio, None, "prefill", job.seed, {}, job.decode,
            transformed=transform_of(self.method) is not None, reading=isinstance(self.method, Reader),
        )  # fmt: skip
        self.asker = Asker(model, Options(1, strict_window=job.strict_window), lambda _: self.method)
        self.needs = Needs.of(captured(self.method.needs()))
        self.given = given(self.model, self.method.needs())
        self.regions = regions(job.prompt_tokens)
        self.growth = 0
        config = model.hf.config
        bos = getattr(config, "bos_token_id", None)
        self.first = bos if isinstance(bos, int) and 0 <= bos < config.vocab_size else None

    def once(self, batch: int, steps: int, *, weigh: bool = False, clones: bool = False) -> Pass:
        """One pass with room for all new tokens.

        weigh: freed memory is given back on the way, for peaks; its times are of no use. clones: all rows
        but the first and the last are copies of the first.
        """
        settle: Callable[[], object] = self.memory.settle if weigh else gc.collect
        settle()
        idle = self.memory.now()
        meter = Meter(self.model.device, self.memory)
        held: list[Held] = []
        for i in range(batch):
            copied = clones and 0 < i < batch - 1
            held.append(held[0].clone() if copied else self._compressed(i, batch, meter))
        payloads = [one.payload for one in held]
        tokens = torch.cat([one.first for one in held])[:, None]
        ends = torch.tensor([[one.end] for one in held], device=self.model.device)
        flags = frozenset().union(*(one.flags for one in held))
        with meter.phase("build"), torch.inference_mode():
            rows = [one.row for one in held]
            cache = joined(rows, self.job.new_tokens, self.build, self.memory.settle if weigh else lambda: None)
        del held, rows
        settle()
        begun, times = cache.nbytes(), list[float]()
        rewritten = weigh and self.storage == "stored"  # what such a step frees would count until the next one
        with meter.phase("decode"):
            decoded = self._decode(cache, tokens, ends, steps, meter, times, settle if rewritten else lambda: None)
        room = self._room_left(cache, begun, batch, steps)
        if meter.peaks and idle is not None:  # pages of the cache that nothing has written yet are not resident
            meter.peaks["decode"] = max(meter.peaks["decode"], idle + cache.nbytes()) + room
        cpu_share = meter.cpu / sum(meter.seconds.values())
        payload, end, read = self._bytes(cache, payloads, steps)
        if end < payload + steps * self.pair_bytes:
            flags -= {"noop"}  # nothing of the prompt was evicted at first, but something was while generating
        return Pass(
            batch, meter.seconds, times, idle, meter.peaks, payload, end, read, (cache.nbytes() + room) // batch,
            cache.layers[0].nbytes() // batch if self.storage == "stored" else 0, flags, cpu_share,
            torch.cat([tokens, decoded], 1).tolist(),
        )  # fmt: skip

    def _room_left(self, cache: CompressedCache, begun: int, batch: int, steps: int) -> int:
        """Bytes that the cache will still grow by until all new tokens are in."""
        grown = (cache.nbytes() - begun) // batch
        if steps >= self.job.new_tokens:
            self.growth = max(self.growth, grown)
        return batch * max(0, self.growth - grown)

    def _bytes(self, cache: CompressedCache, payloads: Sequence[int], steps: int) -> tuple[float, float, float | None]:
        """Of one row: 16-bit bytes before and behind the steps, and read per new token; means."""
        whole = [cache.payload(row) for row in range(len(payloads))]
        ends = [p + steps * self.pair_bytes if w is None else w for p, w in zip(payloads, whole, strict=True)]
        reads = [found for row in range(len(payloads)) if (found := cache.read_per_token(row)) is not None]
        return statistics.mean(payloads), statistics.mean(ends), statistics.mean(reads) if reads else None

    def _compressed(self, row: int, batch: int, meter: Meter) -> Held:
        """Prefills one prompt and selects; where other prompts follow, no more than what was selected stays."""
        n, config = self.job.prompt_tokens, self.model.hf.config
        ids = prompt(n, config.vocab_size, self.first, self.job.seed, row)
        window = self.method.prefill_window()
        if window is not None:
            held = self._through(window, ids, row, meter)
        elif self.method.kind == "in-prefill":
            held = self._pruned(ids, row, meter)
        else:
            held = self._selected(ids, row, meter)
        if batch > 1:
            with meter.phase("build"), torch.inference_mode():
                held.shrink()
        return held

    def _pruned(self, ids: list[int], row: int, meter: Meter) -> Held:
        """Under a method that drops tokens while the prompt is read: all its work is prefill."""
        from kvcli.models.pruned_prefill import pruned_prefill

        with meter.phase("prefill"):
            budget, evicting = self._budget(), self.job.decode is not None
            done = pruned_prefill(self.model, ids, self.method, budget, evicting)  # type: ignore[arg-type]
            first = done.logits.argmax(-1, keepdim=True)
        meter.nothing("select")
        ctx = self._context(ids, row, done.keys, done.values)
        selection, held, _ = pruned_row(done, self.cell, self.method, ctx, budget)
        return self._held(selection, held, first, len(ids))

    def _through(self, window: tuple[int, int], ids: list[int], row: int, meter: Meter) -> Held:
        """Under a method whose streaming heads read the prompt through a window; which heads do is known before."""
        from kvcli.models.streaming_prefill import streaming_prefill

        unread = [torch.empty(self.model.shapes.kv_heads[0], len(ids), 0)] * self.model.shapes.layers
        with meter.phase("select"):
            selection = select(self.method, self._context(ids, row, unread, unread, passes=self.given), self._budget())
        with meter.phase("prefill"):
            read = streaming_prefill(self.model, ids, [facts["streams"] for facts in selection.facts], *window)
            first = read.logits.argmax(-1, keepdim=True)
        ctx = self._context(ids, row, read.keys, read.values, passes=self.given)
        with meter.phase("build"), torch.inference_mode():
            return self._formed(ctx, selection, first)

    def _selected(self, ids: list[int], row: int, meter: Meter) -> Held:
        with meter.phase("prefill"):
            prefilled = self.model.prefill([ids], self.needs, [self.regions[-1].start])
            first = prefilled.logits.argmax(-1)
        with meter.phase("select"):
            dense = prefilled.dense(0)
            answer = self.job.new_tokens + 1  # the prefill's token and one per step
            own = passes(self.model, dense, ids, self.regions, answer)
            ctx = self._context(
                ids, row, dense.keys, dense.values, column_sums=dense.column_sums,
                window_queries=dense.window_queries, scaling=prefilled.capture.scaling,
                passes={**self.given, **own}, moments=dense.moments,
            )  # fmt: skip
            selection = select(self.method, ctx, self._budget())
        with meter.phase("build"), torch.inference_mode():
            return self._formed(ctx, selection, first)

    def _context(self, ids: list[int], row: int, keys: list[Tensor], values: list[Tensor], **captured: Any) -> Context:
        shapes, tokenizer = self.model.shapes, self.model.tokenizer
        given: dict[str, Any] = {"column_sums": {}, "window_queries": [], "scaling": [], **captured}

        def text(i: int) -> str:
            found: str = tokenizer.decode([ids[i]], skip_special_tokens=True)
            return found

        return Context(
            n=len(ids), heads=shapes.heads, kv_heads=shapes.kv_heads[0], token_ids=ids, regions=self.regions,
            keys=keys, values=values, sample_id=f"bench-{row}", seed=self.job.seed,
            token_text=text if tokenizer is not None else None, rope=self.model.rope, o_proj=self.model.o_proj,
            **given,
        )  # fmt: skip

    def _formed(self, ctx: Context, selection: Selection, first: Tensor) -> Held:
        """The row that a sweep would decode: what a merge made of the kept pairs, the form a transform stores."""
        pairs = pairs_of(self.method, ctx, selection.kept)
        row = self.asker.row(self.cell, self.method, ctx, selection, pairs, self._budget())
        held = self._held(selection, row, first, ctx.n)
        held.store()
        if self.cell.transformed and self.asker.saves_nothing(selection, ctx, held.payload):
            held.flags |= {"noop"}
        return held

    def _held(self, selection: Selection, row: Row, first: Tensor, n: int) -> Held:
        row.keys, row.values = list(row.keys), list(row.values)
        end = len(selection.kept[0]) if selection.rerotate else n
        return Held(row, first, end, payload_bytes(selection.kept, self.model.shapes.dims), selection.flags)

    def _budget(self) -> Budget:
        size = (self.model.shapes.layers, self.model.shapes.kv_heads[0], self.job.strict_window)
        n = self.job.prompt_tokens
        if self.job.ratio is None:
            return Budget.of_size(n, n, *size)
        return Budget.of_ratio(Decimal(self.job.ratio), n, *size)

    def _decode(
        self, cache: CompressedCache, tokens: Tensor, positions: Tensor, steps: int, meter: Meter, times: list[float],
        after: Callable[[], object],
    ) -> Tensor:  # fmt: skip
        """[R, steps]: greedy tokens; a step is over when its tokens are known. tokens, positions [R, 1]: the first.
        after: called behind each step, in nobody's time."""
        found = []
        for _ in range(steps):
            started = time.perf_counter()
            logits = self.model.step(tokens, positions, cache)
            tokens, positions = logits[:, -1:].argmax(-1), positions + 1
            meter.synchronise()
            times.append(time.perf_counter() - started)
            found.append(tokens)
            after()
        return torch.cat(found, 1)

    @property
    def pair_bytes(self) -> int:
        """16-bit bytes of one token's pairs in all layers."""
        return sum(heads * width for heads, width in self.model.shapes.dims) * STORED_BYTES

    @property
    def full_bytes(self) -> int:
        """16-bit bytes of one prompt's full cache."""
        return self.job.prompt_tokens * self.pair_bytes
