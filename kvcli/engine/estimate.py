"""What a plan will cost, before it starts: tokens, memory, time and record size, from sizes alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from kvcli.engine.cells import Cell, PromptKey
from kvcli.engine.memory import CHUNK
from kvcli.engine.peak import Memory, Peak
from kvcli.engine.plan import DecodeBatch, Plan, PrefillBatch, padded_share
from kvcli.engine.prompts import PromptSet

if TYPE_CHECKING:
    from kvcli.methods.base import Method

RECORD_BYTES = 1500
"""A record without its output; measured on the testbed."""
TOKEN_BYTES = 12
"""Text and id of one generated token."""
RECORD_SECONDS = 5e-3
"""Selection, scoring and writing of one record, an order of magnitude."""
STEP_OVERHEAD = 4e-4
"""Seconds per layer and forward pass that no batch size avoids (kernel launches and Python), an order of magnitude."""
ACTIVATIONS = 12
"""Tensors as wide as the hidden state that a layer's forward pass holds at its widest, as an order of magnitude."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, from its config."""

    layers: int
    kv_elements: int
    """Elements of one token's KV pairs over all layers."""
    parameters: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    width: int
    """Of one head."""

    @classmethod
    def of(cls, config: Any) -> Sizes:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        per_layer = config.hidden_size * dim * 2 * (heads + kv_heads) + 3 * config.hidden_size * inner
        layers, vocabulary = config.num_hidden_layers, config.vocab_size
        parameters = layers * per_layer + vocabulary * config.hidden_size
        return cls(
            layers, layers * kv_heads * dim * 2, parameters, config.hidden_size, vocabulary, heads, kv_heads, dim
        )  # fmt: skip


def rows_that_fit(config: Any, itemsize: int, longest: int, memory: int, most: int) -> int:
    """Rows whose full caches of `longest` tokens stay within `memory` bytes; at least 1, at most `most`."""
    row = Sizes.of(config).kv_elements * itemsize * longest
    return int(max(1, min(most, memory // max(1, row))))


@dataclass(frozen=True)
class Group:
    """Cells that share the prefills of one prompt set. sharing: the class of METHODS: 1 select from shared statistics,
    2 with an extra pass per prompt, 3 each cell prefills for itself."""

    task: str
    shots: int
    shot_seed: int
    shot_order: int
    query: str
    weights: str
    sharing: int
    cells: int
    prompts: int
    tokens: int
    """Tokens to prefill, shared beginnings once: of the first group of a prompt with its dense prefill, of class 2 with
    the extra pass, of class 3 with each cell's own."""
    tokens_alone: int
    """The same if every cell and prompt were prefilled whole."""


@dataclass(frozen=True)
class Storage:
    """Rows that may share a decode batch. kind: `kept` (the cache only grows) or the method that goes on evicting."""

    kind: str
    cells: int
    rows: int


@dataclass(frozen=True)
class Estimate:
    cells: int
    """Of the command, those that are done too."""
    samples: int
    """Prompts that a record is still to be made of."""
    records: int
    groups: list[Group]
    storage: list[Storage]
    prefill_tokens: int
    decode_tokens: int
    separate_prefill_tokens: int
    """Tokens to prefill if every cell ran on its own."""
    memory: Memory
    record_bytes: int
    seconds: float


@dataclass
class _Work:
    """Sums over the batches that are still to run."""

    records: int = 0
    decode: int = 0
    steps: int = 0
    passes: int = 0
    read: int = 0
    dense: int = 0
    _alike: dict[tuple[int, int], list[DecodeBatch]] = field(default_factory=dict)

    def batches(self, batch: PrefillBatch, rows: int) -> list[DecodeBatch]:
        """Decode batches of a prefill batch: alike for all with the same cells and number of samples."""
        key = (id(batch.cells), batch.end - batch.start)
        if key not in self._alike:
            self._alike[key] = list(batch.decode_batches(rows))
        return self._alike[key]


def estimate(
    plan: Plan, wanted: set[str], prompt_sets: dict[PromptKey, PromptSet], sizes: Sizes, itemsize: int, rows: int,
    length: int | None, done: set[tuple[str, str]], limit: int | None, methods: dict[str, Method], room: int,
    fidelity: bool = False,
) -> Estimate:  # fmt: skip
    """What is still to do of the wanted cells and first `limit` samples; done: (cell, sample) pairs with a record.
    room: bytes that the caches of one decode batch may take. fidelity: rows are compared with full's predictions.

    Upper bounds: every row is taken to generate its task's most tokens. length: --max-new-tokens. methods: by text.
    """
    work = _Work()
    parts: list[_Part] = []
    token = sizes.kv_elements * itemsize
    peak = Peak(sizes, itemsize, room, methods, fidelity and any(c.method == "full" for c in plan.cells.values()))
    recorded = _by_cell(done)
    for batch in plan.batches:
        prompts = prompt_sets[batch.prompts]
        samples = range(batch.start, min(batch.end, prompts.within(limit)))
        mine = list(_parts([c for c in batch.cells if c.id in wanted], prompts, samples, recorded))
        if not mine:
            continue
        parts += mine
        new = prompts.new_tokens(length)
        lengths = [len(prompts.prompts[i].ids) for i in samples]
        longest = max(lengths) + new
        decodes = work.batches(batch, rows)
        records = sum(len(part.cells) * len(part.samples) for part in mine)
        work.records += records
        work.decode += records * new
        work.steps += new * len(decodes)
        work.passes += 1
        work.read += int(sum(padded_share(d.rows) for d in decodes) * longest * token * new)
        peak.add(decodes, len(samples), max(lengths), new)
        work.dense = max(work.dense, len(samples) * longest * token)
    groups = _groups(prompt_sets, parts, methods)
    prefill = sum(group.tokens for group in groups)
    flops = 2 * sizes.parameters * (prefill + work.decode)
    weights = sizes.parameters * itemsize
    pace = _pace()
    seconds = flops / pace.flops + (work.read + work.steps * weights) / pace.bandwidth
    seconds += (work.steps + work.passes) * sizes.layers * STEP_OVERHEAD + work.records * RECORD_SECONDS
    wide = max((len(p.ids) for s in prompt_sets.values() for p in s.prompts), default=1)
    activations = min(wide * 8, CHUNK) * sizes.hidden * ACTIVATIONS * itemsize + rows * sizes.vocabulary * 4
    return Estimate(
        cells=len(wanted), samples=_prompts(parts), records=work.records, groups=groups,
        storage=_storage(parts), prefill_tokens=prefill, decode_tokens=work.decode,
        separate_prefill_tokens=sum(group.tokens_alone for group in groups),
        memory=Memory(weights, work.dense, peak.decode, peak.figures, peak.comparison, activations),
        record_bytes=work.records * RECORD_BYTES + work.decode * TOKEN_BYTES, seconds=seconds,
    )  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """Cells of one prompt set and of the same weights that lack the same samples (by index)."""

    prompt_key: PromptKey
    cells: list[Cell]
    samples: Sequence[int]


def _prompts(parts: Sequence[_Part]) -> int:
    """Distinct prompts; several kinds of weights read the same ones."""
    return len({(part.prompt_key, i) for part in parts for i in part.samples})


def _by_cell(done: set[tuple[str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for cell, sample in done:
        found.setdefault(cell, set()).add(sample)
    return found


def _parts(
    cells: list[Cell], prompts: PromptSet, samples: Sequence[int], recorded: dict[str, set[str]]
) -> Iterator[_Part]:
    """What the cells of one batch still lack."""
    fresh = [cell for cell in cells if cell.id not in recorded]
    if fresh:
        yield _Part(fresh[0].prompt_key, fresh, samples)
    for cell in cells:
        if cell.id in recorded:
            left = [i for i in samples if prompts.samples[i].id not in recorded[cell.id]]
            if left:
                yield _Part(cell.prompt_key, [cell], left)


def _groups(prompt_sets: dict[PromptKey, PromptSet], parts: Sequence[_Part], methods: dict[str, Method]) -> list[Group]:
    found = []
    axis = dict.fromkeys(part.cells[0].weights for part in parts)
    for weights, (key, prompts) in product(axis, prompt_sets.items()):
        dense: set[int] = set()
        for sharing in (1, 2, 3):
            cells: set[str] = set()
            some: set[int] = set()
            alone = 0
            for part in parts:
                mine = [c.id for c in part.cells if methods[c.method].sharing == sharing]
                if mine and (part.prompt_key, part.cells[0].weights) == (key, weights):
                    cells.update(mine)
                    some.update(part.samples)
                    alone += len(mine) * sum(len(prompts.parts[i].ids) for i in part.samples)
            if not cells:
                continue
            alone *= 2 if sharing == 2 else 1
            own = {1: 0, 2: sum(len(prompts.parts[i].ids) for i in some), 3: alone}[sharing]
            new = sorted(some - dense)  # the first group of a prompt pays for its dense prefill
            dense |= some
            tokens = own + (_shared_tokens([prompts.parts[i] for i in new]) if new else 0)
            found.append(Group(
                key.task, key.shots, key.shot_seed, key.shot_order, key.query, weights, sharing, len(cells), len(some),
                tokens, alone,
            ))  # fmt: skip
    return found


def _shared_tokens(prompts: Sequence[Any]) -> int:
    """Tokens to prefill when what prompts begin with alike is prefilled once."""
    from kvcli.engine.prefixes import question_start, shared_cuts

    cuts = shared_cuts([p.ids for p in prompts], [min(question_start(p.regions), len(p.ids) - 1) for p in prompts])
    own = sum(len(p.ids) - (cut[-1] if cut else 0) for p, cut in zip(prompts, cuts, strict=True))
    pieces: dict[tuple[int, ...], int] = {}
    for prompt, ends in zip(prompts, cuts, strict=True):
        for start, end in zip((0, *ends), ends, strict=False):
            pieces[tuple(prompt.ids[:end])] = end - start
    return own + sum(pieces.values())


def _storage(parts: Sequence[_Part]) -> list[Storage]:
    rows: Counter[str] = Counter()
    cells: dict[str, set[str]] = {}
    for part in parts:
        for cell in part.cells:
            rows[cell.storage] += len(part.samples)
            cells.setdefault(cell.storage, set()).add(cell.id)
    return [Storage(kind or "kept", len(cells[kind]), rows[kind]) for kind in sorted(rows)]


@dataclass(frozen=True)
class _Pace:
    """What this machine does per second, measured for a moment: float operations, bytes read."""

    flops: float
    bandwidth: float


def _pace() -> _Pace:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 2048 if device == "cuda" else 384
    a = torch.randn(size, size, device=device)
    cache = torch.ones(1 << 23, device=device)
    once = _seconds(lambda: float((a @ a)[0, 0]))
    read = _seconds(lambda: float(cache.sum()))
    return _Pace(0.5 * 2 * size**3 / once, 0.5 * cache.nbytes / read)


def _seconds(run: Any) -> float:
    """Of one call, over a few of them."""
    run()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < 0.03:
        run()
        calls += 1
    return (time.perf_counter() - started) / calls
