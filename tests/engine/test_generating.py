"""Equality 2 while generating: a pool that evicts decodes like the full cache under masks made by the paper's rule.

float64; tests/oracles/generating.py generates with a full cache and plain Python sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.config import SweepConfig
from kvcli.engine.cells import Cell
from kvcli.models.wrapper import Model
from tests.engine import tiny
from tests.engine.asks import watch_pools
from tests.oracles.generating import Heads, Masked, cap, masked_generate, rule_of

NEW = 24
METHODS = [
    "h2o", "h2o:reduce=max", "streaming_llm", "tova", "scissorhands:history=20,recent=4", "scissorhands", "shotkv",
    "shotkv:recent=2,queries=window,window=8", "scope", "scope:prefill=snapkv,recent=3",
]  # fmt: skip
AXES: dict[str, dict[str, Any]] = {
    "a ratio": {"decode_ratios": ("0.5",)},
    "a small ratio": {"decode_ratios": ("0.2",)},
    "a size": {"decode_budgets": (6,)},
    "together, every fourth": {"decode_ratios": ("0.4",), "decode_interval": 4},
    "a size, every third": {"decode_budgets": (5,), "decode_interval": 3},
}


@pytest.fixture(scope="module")
def exact() -> Iterator[Callable[[int], Model]]:
    """exact(kv_heads): a float64 model whose norms stay in float64."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    made: dict[int, Model] = {}
    yield lambda kv_heads: made.setdefault(kv_heads, tiny.tiny_llama(torch.float64, kv_heads=kv_heads))
    patch.undo()


@pytest.fixture(autouse=True)
def _no_end_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer has its full length."""
    monkeypatch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset())


def prompts_of(lengths: list[int]) -> tiny.PromptSet:
    """Prompts whose answers are long enough for many evictions."""
    prompts = tiny.prompt_set(lengths)
    return dataclasses.replace(prompts, task=dataclasses.replace(prompts.task, max_new_tokens=NEW))


def limits_of(cell: Cell, per_head: int, n: int, rule: Any) -> Callable[[int], int]:
    assert cell.decode is not None
    start = {"ratio": cell.ratio} if cell.ratio is not None else {"budget": cell.budget}
    given = {"decode_ratio": cell.decode.get("ratio"), "decode_budget": cell.decode.get("budget")}
    fixed = cell.decode.get("cap") == "fixed"
    return lambda t: cap(t, n, rule.separate, least=rule.least, fixed=fixed, **start, **given)


def masked(model: Model, ids: list[int], cell: Cell, kept: list[Heads], steps: int) -> Masked:
    """The oracle's answer to one cell and prompt. kept: one entry in a layer whose heads are alike."""
    heads, kv_heads = model.shapes.heads, model.shapes.kv_heads[0]
    whole = [layer * kv_heads if len(layer) == 1 else layer for layer in kept]
    rule = rule_of(cell.method, heads, kv_heads)
    limit = limits_of(cell, len(whole[0][0]), len(ids), rule)
    assert cell.decode is not None
    return masked_generate(
        model.hf, ids, whole, rule, steps, limit, interval=cell.decode["interval"], first_token=cell.first_token
    )


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[list[Heads]]:
    return watch_pools(monkeypatch)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("method", METHODS)
def test_every_step_holds_what_the_rule_leaves(
    exact: Callable[[int], Model], held: list[list[Heads]], method: str, axis: str, first_token: str, kv_heads: int
) -> None:
    """One row: positions of every layer and KV head after every step, and the tokens."""
    model, prompts = exact(kv_heads), prompts_of([37])
    config = SweepConfig(methods=(method,), ratios=("0.4",), first_token=(first_token,), full=False, **AXES[axis])
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0
    (record,) = sink.records
    (cell,) = tiny.plan_of(config, prompts).cells.values()
    tokens = record["output_ids"]
    run = masked(model, prompts.prompts[0].ids, cell, sink.maps[cell.id, "s0"], len(tokens))
    assert tokens == run.tokens
    left = _after(run)
    assert held == left
    assert len(tokens) == NEW
    assert max(len(b[0]) - len(a[0]) for a, b in zip(left[0], left[-1], strict=True)) < NEW - 6


def _after(run: Masked) -> list[list[Heads]]:
    """What is left after each step: what the next query saw but for its own token."""
    place = run.first + 1
    out = []
    for i, layers in enumerate(run.visible[1:]):
        out.append([[[p for p in head if p != place + i] for head in layer] for layer in layers])
    return [*out, run.after]


@pytest.mark.parametrize("method", ["h2o", "streaming_llm", "tova", "scissorhands"])
def test_a_pool_of_fixed_size_holds_what_the_rule_leaves(
    exact: Callable[[int], Model], held: list[list[Heads]], method: str
) -> None:
    model, prompts = exact(2), prompts_of([37])
    config = SweepConfig(methods=(method,), budgets=(14,), cap="fixed", full=False)
    sink, _ = tiny.run(model, config, prompts)
    (cell,) = tiny.plan_of(config, prompts).cells.values()
    tokens = sink.records[0]["output_ids"]
    run = masked(model, prompts.prompts[0].ids, cell, sink.maps[cell.id, "s0"], len(tokens))
    assert tokens == run.tokens
    assert held == _after(run)
    assert {len(head) for step in held[1:] for layer in step for head in layer} == {14}


@pytest.mark.slow
def test_rows_of_many_methods_and_prompts_generate_what_the_masked_model_does(exact: Callable[[int], Model]) -> None:
    """Batches of prompts, ratios and ages: the tokens, and the bytes of what is left at the end."""
    model, prompts = exact(2), prompts_of([37, 50, 21])
    config = SweepConfig(
        methods=("h2o", "streaming_llm", "tova", "scissorhands:history=20,recent=4", "shotkv", "scope"),
        ratios=("0.3", "0.6"), decode_ratios=("off", "0.5"), first_token=("compressed", "prefill"),
    )  # fmt: skip
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0
    cells, records = tiny.plan_of(config, prompts).cells, sink.by_key()
    assert len(records) == 3 * 2 * (1 + 2 * 2 * 6)
    kept_all = {
        (c.method, c.ratio, c.first_token, sample): record["output_ids"]
        for (cell_id, sample), record in records.items()
        if (c := cells[cell_id]).decode is None
    }
    changed = 0
    for (cell_id, sample), record in records.items():
        cell, answer = cells[cell_id], record["output_ids"]
        if cell.decode is None:
            continue
        ids = prompts.prompts[int(sample[1:])].ids
        run = masked(model, ids, cell, sink.maps[cell_id, sample], len(answer))
        where = (cell.method, cell.ratio, cell.first_token, len(ids))
        assert answer == run.tokens, where
        pairs = sum(len(head) for layer in run.after for head in layer)
        assert record["kv_bytes"]["end"] == pairs * 2 * (64 // 4) * 2, where
        changed += answer != kept_all[cell.method, cell.ratio, cell.first_token, sample]
    assert changed > 20  # eviction while generating is felt
    for prefill_rows, decode_rows in ((1, 1), (3, 5)):
        other, _ = tiny.run(model, config, prompts, prefill_rows=prefill_rows, decode_rows=decode_rows)
        assert {k: tiny.same(r) for k, r in other.by_key().items()} == {k: tiny.same(r) for k, r in records.items()}


def test_settings_without_a_decode_phase_keep_every_generated_token(exact: Callable[[int], Model]) -> None:
    model, prompts = exact(2), prompts_of([37])
    config = SweepConfig(
        methods=("streaming_llm:rerotate=true", "shotkv:decode=off", "snapkv", "h2o"), ratios=("0.5",),
        decode_ratios=("off", "0.5"), full=False,
    )  # fmt: skip
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0
    assert sorted((r["method"].partition(":")[0], r["decode"] is None) for r in sink.records) == [
        ("h2o", False), ("h2o", True), ("shotkv", True), ("snapkv", True), ("streaming_llm", True),
    ]  # fmt: skip
