"""Merging while generating: a row's cache and text are those of a plain cache whose pairs are merged by hand.

float64; tests/oracles/merging.py generates with dictionaries of pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.config import SweepConfig
from kvcli.engine.cells import Cell
from kvcli.engine.pool import PoolCache
from kvcli.methods.context import Context
from kvcli.models.wrapper import Model
from tests.engine import tiny
from tests.oracles.generating import RULES, Heads, Rule, cap, rule_of
from tests.oracles.merging import D2O, CaM, Merged, Merging, generate
from tests.oracles.rkv import RKV

NEW = 20
EVICTORS = [
    "h2o",
    "streaming_llm",
    "tova",
    "scissorhands:history=20,recent=4",
    "rkv:window=4",
    "scope:recent=3",
    "shotkv",
]
STYLES = ["merge", "merge:weights=cosine,beta=0.3", "merge:style=cam", "merge:style=cam,window=5"]
RATIO: dict[str, Any] = {"decode_ratios": ("0.3",)}
THIRDS: dict[str, Any] = {"decode_budgets": (4,), "decode_interval": 3}


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    """models(kv_heads): a float64 model whose norms stay in float64."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    made: dict[int, Model] = {}
    yield lambda kv_heads: made.setdefault(kv_heads, tiny.tiny_llama(torch.float64, kv_heads=kv_heads, layers=2))
    patch.undo()


@pytest.fixture(autouse=True)
def _no_end_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset())


def prompts_of(lengths: list[int]) -> tiny.PromptSet:
    prompts = tiny.prompt_set(lengths)
    return dataclasses.replace(prompts, task=dataclasses.replace(prompts.task, max_new_tokens=NEW))


Steps = list[list[list[dict[int, tuple[Tensor, Tensor]]]]]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Per step, layer and KV head: what row 0 holds after the step's eviction, position -> key, value."""
    steps: Steps = []
    settle = PoolCache.settle

    def watched(self: PoolCache, layer: int, attention: Tensor | None) -> None:
        settle(self, layer, attention)
        if layer == 0:
            steps.append([])
        kept, place = self.layers[layer], self.layers[layer].slots.position[0].tolist()
        steps[-1].append([
            {p: (kept._keys[0, g, s].clone(), kept._values[0, g, s].clone()) for s, p in enumerate(head) if p >= 0}
            for g, head in enumerate(place)
        ])  # fmt: skip

    monkeypatch.setattr(PoolCache, "settle", watched)
    return steps


def rule(text: str, heads: int, kv_heads: int) -> Rule:
    if text.startswith("rkv"):
        return RKV(heads, kv_heads, window=4)
    assert text.partition(":")[0] in RULES
    return rule_of(text, heads, kv_heads)


def merging(text: str, model: Model, sample: str, n: int) -> Merging:
    """The oracle of a merge's settings, with the draws that its sample has."""
    settings = dict(pair.split("=") for pair in text.partition(":")[2].split(",") if pair)
    if settings.pop("style", "d2o") == "d2o":
        return D2O(settings.get("weights", "exp"), float(settings.get("beta", 0.7)))
    kv_heads, layers = model.shapes.kv_heads[0], model.shapes.layers

    def draw(salt: str, layer: int) -> torch.Generator:
        return Context.generator(_Sample(sample), salt, layer)  # type: ignore[arg-type]

    keys = [
        torch.randint(1 << 62, (kv_heads,), generator=draw("merge while generating", i)).tolist() for i in range(layers)
    ]
    draws = [torch.rand(kv_heads, n, generator=draw("merge", i)).double().numpy() for i in range(layers)]
    return CaM(keys, draws, int(settings.get("window", 32)))


@dataclasses.dataclass
class _Sample:
    sample_id: str
    seed: int = 0


def by_hand(model: Model, ids: list[int], cell: Cell, kept: list[Heads], sample: str, steps: int = NEW) -> Merged:
    """The oracle's answer to one cell and prompt. kept: one entry in a layer whose heads are alike."""
    evictor, _, merge = cell.method.partition("+")
    heads, kv_heads = model.shapes.heads, model.shapes.kv_heads[0]
    whole = [layer * kv_heads if len(layer) == 1 else layer for layer in kept]
    own = rule(evictor, heads, kv_heads)
    decode = cell.decode or {}
    start = {"ratio": cell.ratio} if cell.ratio is not None else {"budget": cell.budget}
    given = {"decode_ratio": decode.get("ratio"), "decode_budget": decode.get("budget")}
    return generate(
        model.hf, ids, whole, own, merging(merge, model, sample, len(ids)), steps,
        lambda t: cap(t, len(ids), own.separate, least=own.least, **start, **given),
        interval=decode["interval"], first_token=cell.first_token,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kv_heads", "first_token", "axis"), [(1, "compressed", THIRDS), (2, "prefill", RATIO), (4, "compressed", RATIO)]
)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("evictor", EVICTORS)
def test_every_step_holds_the_pairs_that_were_merged_by_hand(
    models: Any, held: Steps, evictor: str, style: str, kv_heads: int, first_token: str, axis: dict[str, Any]
) -> None:
    """One row: keys and values of every layer and KV head after every step, and the tokens."""
    model, prompts, method = models(kv_heads), prompts_of([37]), f"{evictor}+{style}"
    config = SweepConfig(methods=(method,), ratios=("0.4",), first_token=(first_token,), full=False, **axis)
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0
    (record,) = sink.records
    (cell,) = tiny.plan_of(config, prompts).cells.values()
    run = by_hand(model, prompts.prompts[0].ids, cell, sink.maps[cell.id, "s0"], "s0")
    assert record["output_ids"] == run.tokens
    assert len(run.tokens) == NEW
    assert len(held) == len(run.after)
    for found, wanted in zip(held, run.after, strict=True):
        for one, other in zip(found, wanted, strict=True):
            for a, b in zip(one, other, strict=True):
                assert sorted(a) == sorted(b)
                for p in a:
                    assert np.allclose(a[p][0].numpy(), b[p][0], rtol=0, atol=1e-9)
                    assert np.allclose(a[p][1].numpy(), b[p][1], rtol=0, atol=1e-9)
    left = [len(head) for head in run.after[-1][0]]
    assert max(left) < len(run.after[0][0][0]) + NEW - 6  # many have left


METHODS = ("h2o+merge", "tova+merge:style=cam", "streaming_llm+merge:style=cam", "scope:recent=3+merge")


@pytest.fixture(scope="module")
def mixed(models: Any) -> tuple[SweepConfig, tiny.PromptSet, dict[Any, dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset())
        config = SweepConfig(
            methods=(*METHODS, "h2o", "streaming_llm"), ratios=("0.3", "0.6"), decode_ratios=("off", "0.3"),
            first_token=("compressed", "prefill"),
        )  # fmt: skip
        prompts = prompts_of([37, 50, 21])
        sink, outcome = tiny.run(models(2), config, prompts)
        assert outcome.errors == 0
        return config, prompts, sink.by_key()


@pytest.mark.parametrize(("prefill_rows", "decode_rows"), [(1, 1), (3, 5)])
def test_a_row_generates_the_same_alone_and_beside_others(
    models: Any, mixed: Any, prefill_rows: int, decode_rows: int
) -> None:
    config, prompts, records = mixed
    other, _ = tiny.run(models(2), config, prompts, prefill_rows=prefill_rows, decode_rows=decode_rows)
    assert {k: tiny.same(r) for k, r in other.by_key().items()} == {k: tiny.same(r) for k, r in records.items()}


def test_rows_of_many_prompts_in_one_batch_are_each_merged_as_by_hand(models: Any, mixed: Any) -> None:
    config, prompts, records = mixed
    plan = tiny.plan_of(config, prompts)
    sink, _ = tiny.run(models(2), config, prompts)
    compared = 0
    for (cell_id, sample), record in records.items():
        cell = plan.cells[cell_id]
        if cell.decode is None or "merge" not in cell.method:
            continue
        ids = prompts.prompts[int(sample[1:])].ids
        run = by_hand(models(2), ids, cell, sink.maps[cell_id, sample], sample)
        assert record["output_ids"] == run.tokens, (cell.method, cell.ratio, cell.first_token, sample)
        compared += 1
    assert compared == len(METHODS) * 2 * 2 * 3


def test_merging_costs_nothing_and_changes_the_text(mixed: Any, models: Any) -> None:
    """The same bytes as without a merge; and other tokens than without a merge, or with the prompt's alone."""
    config, prompts, records = mixed
    cells = tiny.plan_of(config, prompts).cells
    by = {
        (cells[c].method, cells[c].ratio, cells[c].first_token, cells[c].decode is None, s): r
        for (c, s), r in records.items()
    }
    parted = {"without": 0, "prompt alone": 0}
    for (method, *where, off, sample), record in by.items():
        evictor, _, merge = method.partition("+")
        if merge and evictor in ("h2o", "streaming_llm"):
            plain = by[evictor, *where, off, sample]
            assert record["kv_bytes"]["end"] == plain["kv_bytes"]["end"]
            parted["without"] += record["output_ids"] != plain["output_ids"]
            parted["prompt alone"] += not off and record["output_ids"] != by[method, *where, True, sample]["output_ids"]
    assert min(parted.values()) > 4


@pytest.mark.parametrize("style", STYLES)
def test_where_nothing_leaves_nothing_changes(models: Any, held: Steps, style: str) -> None:
    """r_p = r_d = 1: the text of the full cache, and every pair bit by bit what the evictor alone stores."""
    model, prompts = models(2), prompts_of([37])
    config = SweepConfig(methods=("h2o", f"h2o+{style}"), ratios=("1",), decode_ratios=("1",))
    seen, answers = [], {}
    for method in ("h2o", f"h2o+{style}"):
        held.clear()
        sink, outcome = tiny.run(model, dataclasses.replace(config, methods=(method,)), prompts)
        assert outcome.errors == 0
        answers.update({r["method"]: r["output_ids"] for r in sink.records})
        seen.append([layer for step in held for layer in step])
    assert len({tuple(ids) for ids in answers.values()}) == 1 and len(answers) == 3
    for plain, merged in zip(*seen, strict=True):
        for a, b in zip(plain, merged, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(x, y) for p in a for x, y in zip(a[p], b[p], strict=True))


def test_draws_follow_the_seed(models: Any) -> None:
    config = SweepConfig(
        methods=("streaming_llm+merge:style=cam", "streaming_llm+merge"), ratios=("0.3",), decode_ratios=("0.3",),
        seeds=(0, 1), full=False,
    )  # fmt: skip
    sink, _ = tiny.run(models(2), config, prompts_of([37, 50, 21]))
    by: dict[Any, list[list[int]]] = {}
    for r in sink.records:
        by.setdefault((r["method"], r["sample_id"]), []).append(r["output_ids"])
    assert [len(by["streaming_llm+merge", f"s{i}"]) for i in range(3)] == [1, 1, 1]
    assert any(a != b for a, b in (by["streaming_llm+merge:style=cam", f"s{i}"] for i in range(3)))
