"""Rows for `generate` made by hand, sweeps with any options, and models that run out of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.attention.capture import Dense, Needs
from kvcli.cache.rows import Kept, Row
from kvcli.config import SweepConfig
from kvcli.engine.comparing import mode_of
from kvcli.engine.generate import Ask, Start, StopRules
from kvcli.engine.plan import Plan
from kvcli.engine.pool import PoolCache
from kvcli.engine.runner import Options, Outcome, Runner
from kvcli.models.wrapper import Model
from tests.engine import tiny


@contextmanager
def exact_model(**sizes: int) -> Iterator[Model]:
    """A float64 model whose norms stay in float64."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    yield tiny.tiny_llama(torch.float64, **sizes)
    patch.undo()


@dataclass
class Prompted:
    """A prefilled prompt. first: the dense logits' own next token."""

    ids: list[int]
    dense: Dense
    first: int

    def ask(
        self,
        rules: StopRules | int,
        *,
        given: int | None = None,
        kept: Kept | None = None,
        tag: Any = None,
        choose: Any = None,
    ) -> Ask:
        """A row that feeds the last prompt token again, or (given) begins with a token from the prefill.

        kept: prompt positions in the cache; by default all that belong there.
        """
        n = len(self.ids)
        end = n - 1 if given is None else n
        positions = [torch.arange(end)] * len(self.dense.keys) if kept is None else kept
        rule = StopRules(rules) if isinstance(rules, int) else rules
        row = Row(self.dense.keys, self.dense.values, positions)
        return Ask(row, Start(self.ids[-1], end, given), rule, choose, tag)

    def spoiled(self) -> Prompted:
        """The same prompt after a prefill that gave NaN."""
        keys, values = ([torch.full_like(x, float("nan")) for x in xs] for xs in (self.dense.keys, self.dense.values))
        return Prompted(self.ids, dataclasses.replace(self.dense, keys=keys, values=values), self.first)


def prompted(model: Model, lengths: Sequence[int]) -> list[Prompted]:
    found = []
    for seed, n in enumerate(lengths):
        ids = tiny.prompt(n, seed).ids
        done = model.prefill([ids], Needs(), [0])
        found.append(Prompted(ids, done.dense(0), int(done.logits[0].argmax())))
    return found


@dataclass
class Steps:
    """Every call of `model.step`: rows, and the cache's slots per layer. most: rows that memory allows."""

    rows: list[int] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    most: int | None = None


def watch(model: Model, monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> Steps:
    """Counts steps from here on; with `most`, a step of more rows runs out of memory."""
    seen, step = Steps(most=most), model.step

    def watched(tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
        seen.rows.append(len(tokens))
        seen.slots.append([layer.get_max_length() for layer in cache.layers])
        if seen.most is not None and len(tokens) > seen.most:
            raise torch.OutOfMemoryError(f"no memory for {len(tokens)} rows")
        return step(tokens, positions, cache)

    monkeypatch.setattr(model, "step", watched)
    return seen


def of_length(prompts: tiny.PromptSet, new: int) -> tiny.PromptSet:
    """The same prompts with answers of up to `new` tokens."""
    return dataclasses.replace(prompts, task=dataclasses.replace(prompts.task, max_new_tokens=new))


def sweep(
    model: Model,
    config: SweepConfig,
    prompts: tiny.PromptSet,
    options: Options,
    *,
    prefill_rows: int = 4,
    sink: tiny.Memory | None = None,
    plan: Plan | None = None,
    **more: Any,
) -> tuple[tiny.Memory, Outcome]:
    """One run with these options. more: further fields of the Runner."""
    sink = sink or tiny.Memory()
    plan = plan or tiny.plan_of(config, prompts, prefill_rows)
    runner = Runner(model, plan, {tiny.KEY: prompts}, sink, options, **more)
    return sink, runner.run()


def answers_of_full(plan: Plan, records: list[dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """What a resumed run reads of `full`'s answers out of its folder."""
    return {
        (mode_of(plan.cells[r["cell_id"]]), r["sample_id"]): r["output_ids"]
        for r in records
        if r["method"] == "full" and r["status"] == "ok"
    }


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """A record without its times: all that a resumed run must repeat."""
    return {k: v for k, v in record.items() if k != "seconds"}


def watch_pools(monkeypatch: pytest.MonkeyPatch) -> list[list[list[list[int]]]]:
    """Per step, layer and KV head: the positions row 0 holds after the step's eviction."""
    steps: list[list[list[list[int]]]] = []
    settle = PoolCache.settle

    def watched(self: PoolCache, layer: int, attention: Tensor | None) -> None:
        settle(self, layer, attention)
        if layer == 0:
            steps.append([])
        position = self.layers[layer].slots.position[0].tolist()
        steps[-1].append([sorted(p for p in head if p >= 0) for head in position])

    monkeypatch.setattr(PoolCache, "settle", watched)
    return steps
