"""From a cell and a prefilled prompt to the row that is generated: select, fork, where it starts, when it ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from kvcli.cache.budget import Budget
from kvcli.cache.rows import (
    STORED_BYTES,
    Kept,
    Pairs,
    Row,
    gathered,
    head_positions,
    kept_counts,
    packed,
    payload_bytes,
    storages,
)
from kvcli.cache.stored import Layers, StoredRow
from kvcli.engine.cells import Anchor, Cell, ratio_of
from kvcli.engine.generate import Ask, Start, StopRules, end_tokens
from kvcli.engine.own_prefills import Formed, Own, OwnPrefills
from kvcli.engine.pool_rows import Cap, PoolRow
from kvcli.engine.prefilling import Ready
from kvcli.engine.prompts import PromptSet
from kvcli.engine.sampling import Sampler
from kvcli.engine.selecting import SharedContextWritten, checked, guarded, select
from kvcli.errors import KvcliError
from kvcli.grammar import round_half_up
from kvcli.methods.base import Block, Merge, Method, Selection, Transform
from kvcli.methods.composed import merge_of, transform_of
from kvcli.methods.context import Context
from kvcli.models.pruned_prefill import Pruned
from kvcli.models.streaming_prefill import streaming_prefill
from kvcli.models.wrapper import Model

MATCHED = Decimal("0.01")
"""Kept bytes that are further than this share from those they were to match are flagged `unreachable`."""


@dataclass
class Options:
    """What steers the loop; none of it belongs to a cell that is not in its key."""

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
    figures: bool = True
    """Whether `memory` holds what methods keep beside the pairs too: not in folders of earlier versions."""


@dataclass
class Choice:
    """What a row is: its sample in the prefill batch, its cell, and what the method kept."""

    sample: int
    cell: Cell
    context: Context
    selection: Selection
    seconds: float
    payload: int | None = None
    """Bytes of the prompt's kept pairs, the last one's included, where a transform stores them."""
    matched: int | None = None
    """Bytes its kept pairs were to have, where they are those of another method."""
    logits: Tensor | None = None
    """[V] behind the prompt, where they come from a prefill of the method's own."""
    sample_id: str = ""
    first: Tensor | None = None
    """[V] log-probabilities of the answer's first token, where it comes from a prefill and options are judged by it."""


@dataclass
class Asker:
    """Makes rows. method: the built method of a cell."""

    model: Model
    options: Options
    method: Callable[[Cell | Anchor], Method]

    def __post_init__(self) -> None:
        self.own = OwnPrefills(self.model)

    def ask(
        self, prompts: PromptSet, sample: int, cell: Cell, ready: Ready, coming: Iterable[tuple[int, Cell]] = ()
    ) -> Ask:
        """The row of one cell; its tag is a `Choice`. Raises what the method raises, and BadSelection.

        coming: rows of the same context (sample and cell) that will be asked for, in their order.
        """
        started = time.perf_counter()
        ctx = dataclasses.replace(ready.context, seed=cell.seed or 0)
        matched, budget = self._sized(cell, ctx)
        method = self.method(cell)
        payload = None
        mine = _own(sample, cell, method, budget, ctx)
        if prunes(method):
            done = self.own.take(ctx, mine, self._owns(coming, ctx, lambda other: prunes(self.method(other))))
            selection, row, logits = pruned_row(done, cell, method, ctx, budget)
            beside = [x for layer in done.state for x in layer.values()]
        else:
            selection = self._selected(method, ctx, budget, cell)
            alike = self._owns(coming, ctx, lambda other: other.method == cell.method)
            pairs, read = self._formed(method, ctx, selection, mine, alike)
            logits = ready.logits if read is None else read
            payload = self._payload(method, ctx, selection, pairs)
            row, beside = self.row(cell, method, ctx, selection, pairs, budget), []
        shared = storages((*ctx.keys, *ctx.values))
        held = storages((*row.keys, *row.values, *beside))
        row.own = {at: size for at, size in held.items() if at not in shared}
        own = logits if method.kind == "in-prefill" else None
        if payload is not None and self.saves_nothing(selection, ctx, payload):
            selection.flags |= {"noop"}
        if matched is not None and self._misses(selection, matched):
            selection.flags |= {"unreachable"}
        name, prompt = prompts.samples[ready.index].id, prompts.prompts[ready.index]
        choice = Choice(sample, cell, ctx, selection, time.perf_counter() - started, payload, matched, own, name)
        sampler = self._sampler(cell, name)
        start = self._start(choice, logits, sampler, prompt.ids)
        if prompt.options and start.given is not None:
            choice.first = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return Ask(row, start, self._rules(prompts), sampler, choice, prompt.options)

    def _selected(self, method: Method, ctx: Context, budget: Budget, cell: Cell) -> Selection:
        """The method's selection; of a context that many questions are asked about, made once per method and size."""
        if cell.query == "aware":
            return select(method, ctx, budget)
        seed = ctx.seed if method.seeded else None
        return ctx.once(("selected", cell.method, budget, seed), lambda: select(method, ctx, budget))

    def _formed(
        self, method: Method, ctx: Context, selection: Selection, mine: Own, coming: Iterable[Own]
    ) -> Formed:  # fmt: skip
        """The row's pairs: the prompt's, what a merge makes of them, or those of a prefill through windows."""
        window = method.prefill_window()
        if window is not None:
            return self.own.formed(mine, coming, lambda: self._through(window, ctx, selection))
        if merge_of(method) is not None:
            return self.own.formed(mine, coming, lambda: Formed(pairs_of(method, ctx, selection.kept)))
        return Formed((ctx.keys, ctx.values, selection.kept))

    def _through(self, window: tuple[int, int], ctx: Context, selection: Selection) -> Formed:
        """What is kept of the prompt as it is when streaming heads read it through their window."""
        streams = [facts["streams"] for facts in selection.facts]
        read = streaming_prefill(self.model, ctx.token_ids, streams, *window)
        own = [
            [gathered(x, form) for x, form in zip(xs, selection.kept, strict=True)] for xs in (read.keys, read.values)
        ]
        keys, values = ([pairs for pairs, _ in layers] for layers in own)
        return Formed((keys, values, [places for _, places in own[0]]), read.logits)

    def _bytes_of(self, anchor: Anchor, ctx: Context) -> int:
        """Bytes of what the anchor keeps of this prompt: it really selects and stores it, once per prompt and seed."""
        method = self.method(anchor)

        def make() -> int:
            try:
                selection = select(method, ctx, self._budget(anchor, ctx))
                payload = self._payload(method, ctx, selection, pairs_of(method, ctx, selection.kept))
            except (ValueError, KvcliError) as error:
                if isinstance(error, SharedContextWritten):
                    raise
                raise ValueError(f"the bytes of {anchor.method} cannot be had: {error}") from error
            return payload_bytes(selection.kept, self.model.shapes.dims) if payload is None else payload

        seed = ctx.seed if method.seeded else None
        found: int = ctx.once(("bytes of", anchor, self.options.strict_window, seed), make)
        return found

    def _pair(self) -> int:
        """Bytes of one pair in every KV head of every layer: the step in which a budget can be set."""
        return sum(heads * width for heads, width in self.model.shapes.dims) * STORED_BYTES

    def _misses(self, selection: Selection, matched: int) -> bool:
        """Whether what was kept is further from these bytes than MATCHED of them and than the rounding to pairs."""
        off = abs(payload_bytes(selection.kept, self.model.shapes.dims) - matched)
        return off > MATCHED * matched and 2 * off > self._pair()

    def _budget(self, cell: Cell | Anchor, ctx: Context, matched: int | None = None) -> Budget:
        size = (len(ctx.keys), ctx.kv_heads, self.options.strict_window)
        if matched is not None:
            return Budget.of_size(round_half_up(Decimal(matched) / self._pair()), ctx.n, *size)
        ratio = ratio_of(cell)
        if ratio is not None:
            return Budget.of_ratio(ratio, ctx.n, *size)
        return Budget.of_size(cell.budget or ctx.n, ctx.n, *size)

    def _sized(self, cell: Cell, ctx: Context) -> tuple[int | None, Budget]:
        """The bytes that a row is held to, if any, and its budget."""
        matched = None if cell.match is None else self._bytes_of(cell.match, ctx)
        return matched, self._budget(cell, ctx, matched)

    def _owns(
        self, rows: Iterable[tuple[int, Cell]], ctx: Context, wanted: Callable[[Cell], bool]
    ) -> Iterator[Own]:  # fmt: skip
        """What the wanted ones of these rows prefill or merge for themselves."""
        for sample, cell in rows:
            if wanted(cell):
                mine = dataclasses.replace(ctx, seed=cell.seed or 0)
                yield _own(sample, cell, self.method(cell), self._sized(cell, mine)[1], mine)

    def row(self, cell: Cell, method: Method, ctx: Context, selection: Selection, pairs: Pairs, budget: Budget) -> Row:
        """The row's kept pairs; in the compressed mode the last prompt token leaves and is fed again."""
        transform, kept = transform_of(method), selection.kept
        keys, values, chosen = pairs
        if cell.first_token == "compressed" and cell.query == "aware":
            kept, chosen = _without_last(kept), _without_last(chosen)
        if transform is not None:
            row = Row(keys, values, chosen)
            return StoredRow(keys, values, chosen, None, lambda: stored_layers(transform, ctx, row, kept))
        if cell.decode is None:
            return Row(keys, values, chosen, self._rotate(cell, selection, kept))
        with guarded(method):
            state = [method.decode_start(ctx, layer) for layer in range(ctx.layers)]
        cap = Cap.of(cell.decode, budget, method)
        return PoolRow(
            keys, values, chosen, None, ctx.n, cap, state, cell.decode["interval"], kept,
            _facts(method, ctx, selection), _beyond(method, cap, selection.kept, ctx.kv_heads),
        )  # fmt: skip

    def saves_nothing(self, selection: Selection, ctx: Context, payload: int) -> bool:
        """Whether all pairs were kept and stored in another form that is no smaller."""
        whole = all(count == ctx.n for layer in kept_counts(selection.kept, ctx.kv_heads) for count in layer)
        return whole and payload >= payload_bytes(selection.kept, self.model.shapes.dims)

    def _payload(self, method: Method, ctx: Context, selection: Selection, pairs: Pairs) -> int | None:
        """Bytes of what a transform makes of all kept pairs of the prompt; None without one."""
        transform = transform_of(method)
        if transform is None:
            return None
        layers = stored_layers(transform, ctx, Row(*pairs), selection.kept)
        return sum(store.payload() for blocks in layers for _, store in blocks)

    def _rotate(self, cell: Cell, selection: Selection, kept: Kept) -> Any:
        if not selection.rerotate:
            return None
        rope = self.model.rope
        if rope is None:
            raise KvcliError("this model's keys cannot be moved", given=cell.method, fix="rerotate=false")
        return lambda layer, keys, _: rope.move(keys, kept[layer], torch.arange(len(kept[layer])))  # type: ignore[arg-type]

    def _start(self, choice: Choice, logits: Tensor, sampler: Sampler | None, ids: Sequence[int]) -> Start:
        """Where the row begins: the position after its last pair, true or (rerotated) inside the cache. ids: the whole
        prompt's, of which the context may be the part before the question."""
        n, last = choice.context.n, choice.context.token_ids[-1]
        end = len(choice.selection.kept[0]) if choice.selection.rerotate else n
        if choice.cell.query == "agnostic":
            return Start(ids[n], end, follow=tuple(ids[n + 1 :]))
        if choice.cell.first_token == "compressed":
            return Start(last, end - 1)
        return Start(last, end, given=sampler(logits, 0) if sampler else int(logits.argmax()))

    def _sampler(self, cell: Cell, sample_id: str) -> Sampler | None:
        if not self.options.temperature:
            return None
        return Sampler(self.options.temperature, self.options.top_p, cell.seed or 0, sample_id, cell.draw)

    def _rules(self, prompts: PromptSet) -> StopRules:
        length = prompts.new_tokens(self.options.max_new_tokens)
        if self.options.ignore_eos:
            return StopRules(length)
        return StopRules(length, end_tokens(self.model), prompts.task.until)


def prunes(method: Method) -> bool:
    """Whether it drops tokens while it reads the prompt, in a prefill of its own."""
    return method.kind == "in-prefill" and method.prefill_window() is None


def _own(sample: int, cell: Cell, method: Method, budget: Budget, ctx: Context) -> Own:
    seed = ctx.seed if method.seeded else None
    return Own((sample, cell.id), cell.method, method, budget, cell.decode is not None, seed)


def pruned_row(done: Pruned, cell: Cell, method: Method, ctx: Context, budget: Budget) -> tuple[Selection, Row, Tensor]:
    """Of a prefill of its own: what it kept, where that stands in the prompt, and its own logits."""
    facts = [{name: torch.full((ctx.kv_heads,), value) for name, value in done.facts.items()}] * ctx.layers
    selection = checked(Selection(done.positions, done.flags, notes=dict(done.notes), facts=facts), method, ctx, budget)
    whole = [torch.arange(len(positions)) for positions in done.positions]
    if cell.decode is None:
        return selection, Row(done.keys, done.values, whole), done.logits
    cap = Cap.of(cell.decode, budget, method)
    row = PoolRow(
        done.keys, done.values, whole, None, ctx.n, cap, done.state, cell.decode["interval"], selection.kept,
        facts, _beyond(method, cap, selection.kept, ctx.kv_heads), whole,
    )  # fmt: skip
    return selection, row, done.logits


def pairs_of(method: Method, ctx: Context, kept: Kept) -> Pairs:
    """The prompt's own, or what a merge makes of them."""
    merge = merge_of(method)
    return (ctx.keys, ctx.values, kept) if merge is None else _merged(merge, ctx, kept)


def _facts(method: Method, ctx: Context, selection: Selection) -> list[dict[str, Tensor]]:
    """Per layer what the evictor decided about whole heads, and what a merge begins with."""
    merge, given = merge_of(method), selection.facts or [{}] * ctx.layers
    if merge is None:
        return list(given)
    with guarded(merge):
        return [
            {**facts, **merge.decode_facts(ctx, layer, head_positions(selection.kept[layer], ctx.kv_heads))}
            for layer, facts in enumerate(given)
        ]


def _beyond(method: Method, cap: Cap, kept: Kept, kv_heads: int) -> list[Tensor]:
    """Per layer [H_kv]: pairs that each head was selected with above the cap of the first step."""
    if not method.decode_as_selected:
        return []
    return [torch.tensor(counts) - cap.at(0) for counts in kept_counts(kept, kv_heads)]


def _without_last(kept: Kept) -> Kept:
    return [[p[:-1] for p in layer] if isinstance(layer, list) else layer[..., :-1] for layer in kept]


def _merged(merge: Merge, ctx: Context, kept: Kept) -> Pairs:
    """Keys and values of the kept pairs with the dropped ones folded in, and where they stand in these."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    chosen: list[Tensor | list[Tensor]] = []
    for layer, form in enumerate(kept):
        heads = head_positions(form, ctx.kv_heads)
        with guarded(merge):
            folded = merge.fold(ctx, layer, heads)
        for made, source, which in ((keys, ctx.keys, 0), (values, ctx.values, 1)):
            whole, places = packed([pair[which].to(source[layer]) for pair in folded])
            made.append(whole)
        even = len({len(p) for p in heads}) == 1
        chosen.append(places[0] if even else places)
    return keys, values, chosen


def stored_layers(transform: Transform, ctx: Context, row: Row, kept: Kept) -> Layers:
    """What a transform makes of a row's pairs. kept: their true positions."""
    blocks = []
    for layer, (form, true) in enumerate(zip(row.kept, kept, strict=True)):
        keys, values = row.keys[layer], row.values[layer]
        if isinstance(form, list):
            heads = enumerate(zip(form, head_positions(true, ctx.kv_heads), strict=True))
            blocks.append([
                Block(layer, slice(h, h + 1), keys[h : h + 1, p], values[h : h + 1, p], t[None]) for h, (p, t) in heads
            ])  # fmt: skip
            continue
        index = form if form.dim() == 2 else form.expand(ctx.kv_heads, -1)
        place = torch.stack(head_positions(true, ctx.kv_heads))
        picked = [x.gather(1, index.to(x.device)[..., None].expand(-1, -1, x.shape[-1])) for x in (keys, values)]
        blocks.append([Block(layer, slice(0, ctx.kv_heads), picked[0], picked[1], place)])
    with guarded(transform):
        stores = transform.store(ctx, blocks)
    return [[(b.heads, s) for b, s in zip(*pair, strict=True)] for pair in zip(blocks, stores, strict=True)]
