"""One pass of a benchmark: prefill, selection, compressed cache and decode steps of one method.

Every prompt is prefilled alone, with the statistics this method needs and no others, and compressed at once; then all
rows decode together. The first token is the prefill's; each of `new_tokens` decode steps reads one and gives the next.
Nothing ends a row early.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import cast

import torch
from torch import Tensor

from kvcli.attention.capture import Needs
from kvcli.cache.budget import Budget
from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import STORED_BYTES, Row, payload_bytes
from kvcli.cache.workspace import Workspace
from kvcli.engine.bench import Job
from kvcli.engine.meter import Memory, Meter
from kvcli.engine.needs import captured, given
from kvcli.engine.prefilling import passes
from kvcli.engine.selecting import select
from kvcli.errors import KvcliError
from kvcli.methods import catalog
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


@dataclass
class Held:
    """One compressed prompt on its way into the batch.

    row: its pairs, in lists whose layers can be let go one by one. first [1]: the prefill's own next token, which is
    fed at position `end`. payload: 16-bit bytes of what was kept.
    """

    row: Row
    first: Tensor
    end: int
    payload: int
    flags: frozenset[str]

    def shrink(self) -> None:
        """Nothing but the kept pairs stays in memory; a layer that is kept whole stays as it is."""
        row, forms = self.row, []
        for layer, form in enumerate(row.kept):
            small, row.keys[layer] = _gather(row.keys[layer], form)  # type: ignore[index]
            small, row.values[layer] = _gather(row.values[layer], form)  # type: ignore[index]
            forms.append(small)
        row.kept = forms

    def clone(self) -> Held:
        row = dataclasses.replace(
            self.row, keys=[x.clone() for x in self.row.keys], values=[x.clone() for x in self.row.values]
        )
        return dataclasses.replace(self, row=row)


def _gather(x: Tensor, form: Tensor | list[Tensor]) -> tuple[Tensor | list[Tensor], Tensor]:
    """Which positions of the result are kept, and the kept pairs of [H_kv, n, D] as a tensor of their own."""
    if isinstance(form, list):
        out = x.new_zeros(len(form), max(len(p) for p in form), x.shape[-1])
        for head, positions in enumerate(form):
            out[head, : len(positions)] = x[head, positions.to(x.device)]
        return [torch.arange(len(p)) for p in form], out
    everything = torch.arange(form.shape[-1])
    if form.dim() == 1:
        return everything, x if len(form) == x.shape[1] else x[:, form.to(x.device)]
    return everything, x.gather(1, form.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))


class Draining(Workspace):
    """Buffers of exactly the size asked for; each layer's sources are let go when the next layer asks for its own.

    So building a cache never holds more than one layer twice. Else `full`, which copies everything into its decode
    cache, would seem to need twice its memory, and every method to save as much.
    """

    def __init__(self, rows: Sequence[Row], settle: Callable[[], object]) -> None:
        """settle: called when something was let go."""
        super().__init__()
        self._rows, self._settle = list(rows), settle

    def swap(self, layer: int, like: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
        if layer:
            self._let_go(layer - 1)
        return [like.new_empty(shape) for shape in shapes]

    def _let_go(self, layer: int) -> None:
        for row in self._rows:
            row.keys[layer] = row.values[layer] = None  # type: ignore[index]
        self._settle()

    def finish(self) -> None:
        self._let_go(-1)
        self._rows.clear()


def joined(rows: Sequence[Row], room: int, settle: Callable[[], object] = lambda: None) -> CompressedCache:
    """The cache of a batch; the rows have given up their keys and values."""
    memory = Draining(rows, settle)
    cache = CompressedCache(rows, room, memory)
    memory.finish()
    return cache


@dataclass(frozen=True)
class Pass:
    """What one pass took. seconds and peaks by phase; steps: seconds of each decode step."""

    batch: int
    seconds: dict[str, float]
    steps: list[float]
    idle: int | None
    peaks: dict[str, int]
    payload: float
    alloc: int
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
    """A loaded model with one method and one ratio."""

    def __init__(self, job: Job, model: Model, memory: Memory) -> None:
        self.job, self.model, self.memory = job, model, memory
        self.method = catalog.build(job.method)
        self.needs = Needs.of(captured(self.method.needs()))
        self.given = given(self.model, self.method.needs())
        self.regions = regions(job.prompt_tokens)
        config = model.hf.config
        bos = getattr(config, "bos_token_id", None)
        self.first = bos if isinstance(bos, int) and 0 <= bos < config.vocab_size else None

    def once(self, batch: int, steps: int, *, weigh: bool = False, clones: bool = False) -> Pass:
        """One pass with room for all new tokens.

        weigh: freed memory is given back on the way, for peaks; its times are of no use. clones: all rows
        but the first and the last are copies of the first.
        """
        settle = self.memory.settle if weigh else gc.collect
        settle()
        idle = self.memory.now()
        meter = Meter(self.model.device, self.memory)
        held: list[Held] = []
        for i in range(batch):
            copied = clones and 0 < i < batch - 1
            held.append(held[0].clone() if copied else self._compressed(i, batch, meter))
        payload = sum(one.payload for one in held) / batch
        tokens = torch.cat([one.first for one in held])[:, None]
        ends = torch.tensor([[one.end] for one in held], device=self.model.device)
        flags = frozenset().union(*(one.flags for one in held))
        with meter.phase("build"), torch.inference_mode():
            rows = [one.row for one in held]
            cache = joined(rows, self.job.new_tokens, self.memory.settle if weigh else lambda: None)
        del held, rows
        settle()
        times: list[float] = []
        with meter.phase("decode"):
            decoded = self._decode(cache, tokens, ends, steps, meter, times)
        if meter.peaks and idle is not None:  # pages of the cache that nothing has written yet are not resident
            meter.peaks["decode"] = max(meter.peaks["decode"], idle + cache.nbytes())
        cpu_share = meter.cpu / sum(meter.seconds.values())
        return Pass(
            batch, meter.seconds, times, idle, meter.peaks, payload, cache.nbytes() // batch, flags, cpu_share,
            torch.cat([tokens, decoded], 1).tolist(),
        )  # fmt: skip

    def _compressed(self, row: int, batch: int, meter: Meter) -> Held:
        """Prefills one prompt and selects; where other prompts follow, no more than what was selected stays."""
        n, config = self.job.prompt_tokens, self.model.hf.config
        ids = prompt(n, config.vocab_size, self.first, self.job.seed, row)
        held = self._pruned(ids, meter) if self.method.kind == "in-prefill" else self._selected(ids, row, meter)
        if batch > 1:
            with meter.phase("build"), torch.inference_mode():
                held.shrink()
        return held

    def _pruned(self, ids: list[int], meter: Meter) -> Held:
        """Under a method that drops tokens while the prompt is read: all its work is prefill."""
        from kvcli.models.pruned_prefill import pruned_prefill

        with meter.phase("prefill"):
            done = pruned_prefill(self.model, ids, self.method, self._budget())  # type: ignore[arg-type]
            first = done.logits.argmax(-1, keepdim=True)
        meter.nothing("select")
        kept = [torch.arange(len(positions)) for positions in done.positions]
        return Held(
            Row(done.keys, done.values, kept), first, len(ids), payload_bytes(kept, self.model.shapes.dims), done.flags
        )

    def _selected(self, ids: list[int], row: int, meter: Meter) -> Held:
        n, shapes, rope = len(ids), self.model.shapes, self.model.rope
        with meter.phase("prefill"):
            prefilled = self.model.prefill([ids], self.needs, [self.regions[-1].start])
            first = prefilled.logits.argmax(-1)
        with meter.phase("select"):
            dense = prefilled.dense(0)
            own = passes(self.model, dense, ids, self.regions, self.job.new_tokens)
            ctx = Context(
                n=n, heads=shapes.heads, kv_heads=shapes.kv_heads[0], token_ids=ids, regions=self.regions,
                keys=dense.keys, values=dense.values, column_sums=dense.column_sums,
                window_queries=dense.window_queries, scaling=prefilled.capture.scaling, sample_id=f"bench-{row}",
                seed=self.job.seed, passes={**self.given, **own},
                rope=rope, o_proj=self.model.o_proj, moments=dense.moments,
            )  # fmt: skip
            selection = select(self.method, ctx, self._budget())
        kept, end, rotate = selection.kept, n, None
        if selection.rerotate:
            if rope is None:
                what = "this model's keys cannot be moved"
                raise KvcliError(what, given=f"--method {self.job.method}", fix="rerotate=false")
            end = len(kept[0])

            def rotate(layer: int, keys: Tensor, _: Tensor) -> Tensor:
                return rope.move(keys, cast(Tensor, kept[layer]), torch.arange(end))

        whole = Row(list(dense.keys), list(dense.values), kept, rotate)
        return Held(whole, first, end, payload_bytes(kept, shapes.dims), selection.flags)

    def _budget(self) -> Budget:
        size = (self.model.shapes.layers, self.model.shapes.kv_heads[0], self.job.strict_window)
        n = self.job.prompt_tokens
        if self.job.ratio is None:
            return Budget.of_size(n, n, *size)
        return Budget.of_ratio(Decimal(self.job.ratio), n, *size)

    def _decode(
        self, cache: CompressedCache, tokens: Tensor, positions: Tensor, steps: int, meter: Meter, times: list[float]
    ) -> Tensor:
        """[R, steps]: greedy tokens; a step is over when its tokens are known. tokens, positions [R, 1]: the first."""
        found = []
        for _ in range(steps):
            started = time.perf_counter()
            logits = self.model.step(tokens, positions, cache)
            tokens, positions = logits[:, -1:].argmax(-1), positions + 1
            meter.synchronise()
            times.append(time.perf_counter() - started)
            found.append(tokens)
        return torch.cat(found, 1)

    @property
    def full_bytes(self) -> int:
        """16-bit bytes of one prompt's full cache."""
        return self.job.prompt_tokens * sum(heads * width for heads, width in self.model.shapes.dims) * STORED_BYTES
