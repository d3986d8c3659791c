"""From a cell and a prefilled prompt to the row that is generated: select, fork, where it starts, when it ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcli.cache.budget import Budget
from kvcli.cache.rows import Row
from kvcli.engine.generate import Ask, Start, StopRules, end_tokens
from kvcli.engine.plan import Cell, ratio_of
from kvcli.engine.pool import Cap, PoolRow
from kvcli.engine.prefilling import Ready
from kvcli.engine.prepare import PromptSet
from kvcli.engine.sampling import Sampler
from kvcli.engine.selecting import checked, guarded, select
from kvcli.errors import KvcliError
from kvcli.methods.base import Method, Selection
from kvcli.methods.context import Context
from kvcli.models.pruned_prefill import pruned_prefill
from kvcli.models.wrapper import Model


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


@dataclass
class Choice:
    """What a row is: its sample in the prefill batch, its cell, and what the method kept."""

    sample: int
    cell: Cell
    context: Context
    selection: Selection
    seconds: float
    logits: Tensor | None = None
    """[V] behind the prompt, where they come from a prefill of the method's own."""


@dataclass
class Asker:
    """Makes rows. method: the built method of a cell."""

    model: Model
    options: Options
    method: Callable[[Cell], Method]

    def ask(self, prompts: PromptSet, sample: int, cell: Cell, ready: Ready) -> Ask:
        """The row of one cell; its tag is a `Choice`. Raises what the method raises, and BadSelection."""
        started = time.perf_counter()
        ctx = dataclasses.replace(ready.context, seed=cell.seed or 0)
        budget = self._budget(cell, ctx)
        method = self.method(cell)
        if method.kind == "in-prefill":
            selection, row, logits = self._pruned(method, ctx, budget)
        else:
            selection, logits = select(method, ctx, budget), ready.logits
            row = self._row(cell, method, ctx, selection, budget)
        own = logits if method.kind == "in-prefill" else None
        choice = Choice(sample, cell, ctx, selection, time.perf_counter() - started, own)
        sampler = self._sampler(cell, ctx)
        return Ask(row, self._start(choice, logits, sampler), self._rules(prompts), sampler, choice)

    def _budget(self, cell: Cell, ctx: Context) -> Budget:
        size = (len(ctx.keys), ctx.kv_heads, self.options.strict_window)
        ratio = ratio_of(cell)
        if ratio is not None:
            return Budget.of_ratio(ratio, ctx.n, *size)
        return Budget.of_size(cell.budget or ctx.n, ctx.n, *size)

    def _pruned(self, method: Any, ctx: Context, budget: Budget) -> tuple[Selection, Row, Tensor]:
        """A prefill of its own: what it kept, where that stands in the prompt, and its own logits."""
        done = pruned_prefill(self.model, ctx.token_ids, method, budget)
        selection = checked(Selection(done.positions, done.flags, notes=done.notes), method, ctx, budget)
        whole = [torch.arange(len(positions)) for positions in done.positions]
        return selection, Row(done.keys, done.values, whole), done.logits

    def _row(self, cell: Cell, method: Method, ctx: Context, selection: Selection, budget: Budget) -> Row:
        """The row's kept pairs; in the compressed mode the last prompt token leaves and is fed again."""
        kept = selection.kept
        if cell.first_token == "compressed":
            kept = [[p[:-1] for p in layer] if isinstance(layer, list) else layer[..., :-1] for layer in kept]
        if cell.decode is None:
            return Row(ctx.keys, ctx.values, kept, self._rotate(cell, selection))
        with guarded(method):
            state = [method.decode_start(ctx, layer) for layer in range(ctx.layers)]
        cap = Cap.of(cell.decode, budget, method)
        return PoolRow(ctx.keys, ctx.values, kept, None, ctx.n, cap, state, cell.decode["interval"])

    def _rotate(self, cell: Cell, selection: Selection) -> Any:
        if not selection.rerotate:
            return None
        rope = self.model.rope
        if rope is None:
            raise KvcliError("this model's keys cannot be moved", given=cell.method, fix="rerotate=false")
        return lambda layer, keys, old: rope.move(keys, old, torch.arange(len(old)))

    def _start(self, choice: Choice, logits: Tensor, sampler: Sampler | None) -> Start:
        """Where the row begins: the position after its last pair, true or (rerotated) inside the cache."""
        n, last = choice.context.n, choice.context.token_ids[-1]
        end = len(choice.selection.kept[0]) if choice.selection.rerotate else n
        if choice.cell.first_token == "compressed":
            return Start(last, end - 1)
        return Start(last, end, given=sampler(logits, 0) if sampler else int(logits.argmax()))

    def _sampler(self, cell: Cell, ctx: Context) -> Sampler | None:
        if not self.options.temperature:
            return None
        return Sampler(self.options.temperature, self.options.top_p, cell.seed or 0, ctx.sample_id, cell.draw)

    def _rules(self, prompts: PromptSet) -> StopRules:
        length = self.options.max_new_tokens or prompts.task.max_new_tokens
        if self.options.ignore_eos:
            return StopRules(length)
        return StopRules(length, end_tokens(self.model), prompts.task.until)
