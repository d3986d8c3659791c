"""Oracle: its extra pass against transformers' own decoding and eager attention, its selection against plain loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcli.attention import received
from kvcli.attention.capture import Dense, Needs
from kvcli.cache.budget import Budget
from kvcli.config import SweepConfig
from kvcli.engine.prefilling import passes
from kvcli.methods.catalog import build
from kvcli.methods.context import Context
from kvcli.models.answering import LONGEST, Answered
from kvcli.models.wrapper import Model
from kvcli.testbed.model import build_tokenizer
from tests.engine import tiny
from tests.engine.asks import exact_model
from tests.models.test_families import SUPPORTED, random_model
from tests.oracles.harness import budget_for, context_for, lists
from tests.oracles.oracle_method import oracle
from tests.oracles.oracle_method import received as received_by_loops
from tests.oracles.prompts import Prompt, budget, random_prompt

RATIOS = ["0.02", "0.1", "0.25", "0.3", "0.5", "0.77", "0.9", "1"]


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with exact_model() as model:
        yield model


def dense_of(model: Model, ids: list[int]) -> Dense:
    return model.prefill([ids], Needs(), [len(ids) - 1]).dense(0)


def answered(model: Model, n: int, length: int, seed: int = 1) -> tuple[list[int], Answered]:
    prompt = tiny.prompt(n, seed)
    return prompt.ids, passes(model, dense_of(model, prompt.ids), prompt.ids, prompt.regions, length)["answer"]()


def own_answer(model: Model, ids: list[int], length: int) -> list[int]:
    """transformers' own greedy answer."""
    model.hf.set_attn_implementation("sdpa")
    given = torch.tensor([ids])
    with torch.no_grad():
        out = model.hf.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=length, do_sample=False, pad_token_id=0
        )
    return out[0, len(ids) :].tolist()


def eager(model: Model, text: list[int]) -> list[np.ndarray]:
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model.hf(torch.tensor([text]), output_attentions=True).attentions
    model.hf.set_attn_implementation(before)
    return [m[0].double().numpy() for m in maps]


def assert_sums(model: Model, ids: list[int], found: Answered, length: int, room: float) -> None:
    answer = own_answer(model, ids, length)
    assert found.tokens == len(answer)
    for got, attention in zip(found.sums, eager(model, [*ids, *answer[:-1]]), strict=True):
        truth = received_by_loops(attention, len(ids))
        np.testing.assert_allclose(got.double().numpy(), truth, atol=room, rtol=0)


@pytest.mark.parametrize("n, length", [(40, 8), (90, 1), (2, 5), (1, 4)])
def test_sums_equal_eager_attention_over_the_models_own_answer(exact: Model, n: int, length: int) -> None:
    ids, found = answered(exact, n, length)
    assert_sums(exact, ids, found, length, 1e-5)  # eager's softmax is float32
    total = torch.stack([s.sum(-1) for s in found.sums])
    assert bool((total <= found.tokens + 1e-6).all())


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_sums_of_other_head_counts(kv_heads: int) -> None:
    model = tiny.tiny_llama(kv_heads=kv_heads)
    ids, found = answered(model, 50, 6)
    assert {s.dtype for s in found.sums} == {torch.float32}
    assert_sums(model, ids, found, 6, 1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gpt2", "opt"])
def test_sums_in_other_families(family: str) -> None:
    model = Model(random_model(family, SUPPORTED[family]), build_tokenizer(), name=family)
    ids, found = answered(model, 50, 6, seed=2)
    assert_sums(model, ids, found, 6, 2e-5)


def test_sums_do_not_depend_on_blocks(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = answered(exact, 60, 40)
    monkeypatch.setattr(received, "_BLOCK_BYTES", 1)
    _, parts = answered(exact, 60, 40)
    for a, b in zip(whole.sums, parts.sums, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_answer_ends_as_the_task_says(exact: Model) -> None:
    """At a stop string, at the task's length, within the bound, and inside the model's context."""
    prompt = tiny.prompt(40, 1)
    dense = dense_of(exact, prompt.ids)
    whole = passes(exact, dense, prompt.ids, prompt.regions, 30)["answer"]().tokens
    word = exact.tokenizer.decode(own_answer(exact, prompt.ids, 30)[2:3]).strip()
    stopped = passes(exact, dense, prompt.ids, prompt.regions, 30, (word,))["answer"]().tokens
    assert 1 <= stopped <= 3 < whole
    assert passes(exact, dense, prompt.ids, prompt.regions, 10_000)["answer"]().tokens <= LONGEST
    model = Model(random_model("gpt2", SUPPORTED["gpt2"]), build_tokenizer(), name="gpt2")  # 256 learned positions
    long = tiny.prompt(250, 3)
    assert passes(model, dense_of(model, long.ids), long.ids, long.regions, 99)["answer"]().tokens == 7


def test_the_pass_leaves_the_prompt_as_it_was_and_behind_a_shared_prefix_finds_the_same(exact: Model) -> None:
    prompt = tiny.prompt(90, 4)
    dense = dense_of(exact, prompt.ids)
    before = [x.clone() for x in (*dense.keys, *dense.values)]
    first = passes(exact, dense, prompt.ids, prompt.regions, 8)["answer"]()
    assert all(torch.equal(a, b) for a, b in zip((*dense.keys, *dense.values), before, strict=True))
    behind = exact.prefill([prompt.ids[50:]], Needs(), [30], dense_of(exact, prompt.ids[:50])).dense(0)
    again = passes(exact, behind, prompt.ids, prompt.regions, 8)["answer"]()
    assert again.tokens == first.tokens
    for a, b in zip(first.sums, again.sums, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


# What it keeps.


def context_with(prompt: Prompt, sums: list[Tensor]) -> Context:
    context = context_for(build("snapkv"), prompt)
    return dataclasses.replace(context, passes={"answer": lambda: Answered(sums, 3)}, _made={})


def random_sums(prompt: Prompt, values: int, seed: int = 0) -> list[Tensor]:
    """Sums out of so many values: few of them tie often; multiples of 1/1024, so that their mean is exact."""
    rng = np.random.default_rng([prompt.n, values, seed])
    return list(torch.tensor(rng.integers(0, values, (prompt.layers, prompt.heads, prompt.n)) / 1024))


@pytest.mark.parametrize("values", [1, 3, 1 << 20])
@pytest.mark.parametrize("n", [1, 2, 9, 64])
def test_selection_agrees_with_plain_loops(n: int, values: int) -> None:
    for kv_heads, group, layers in ((1, 2, 1), (2, 2, 3), (3, 1, 2), (2, 4, 1)):
        prompt = random_prompt(n, kv_heads=kv_heads, group=group, layers=layers)
        sums = random_sums(prompt, values)
        for ratio in RATIOS:
            selection = build("oracle").select(context_with(prompt, sums), budget_for(prompt, ratio))
            answer = oracle([s.tolist() for s in sums], kv_heads, budget(ratio, n))
            assert lists(selection, kv_heads) == answer.kept(), (prompt.name, ratio)
            assert not selection.flags


def test_the_pass_runs_once_for_all_ratios_and_seeds() -> None:
    prompt, runs = random_prompt(30, layers=2), []
    context = context_with(prompt, [])
    found = Answered(random_sums(prompt, 1000), 3)
    context.passes = {"answer": lambda: runs.append(1) or found}
    for ratio in RATIOS:
        build("oracle").select(dataclasses.replace(context, seed=len(ratio)), budget_for(prompt, ratio))
    assert len(runs) == 1


def test_it_keeps_more_of_the_answers_attention_than_any_other_method(exact: Model) -> None:
    """What it is an upper bound of: the mass over each KV head's kept keys, the newest token's aside."""
    prompt = tiny.prompt(90, 4)
    needs = Needs.of({"column_sum", "window:32"})
    done = exact.prefill([prompt.ids], needs, [80])
    dense = done.dense(0)
    context = Context(
        n=90, heads=4, kv_heads=2, token_ids=prompt.ids, regions=prompt.regions, keys=dense.keys, values=dense.values,
        column_sums=dense.column_sums, window_queries=dense.window_queries, scaling=done.capture.scaling,
        sample_id="s", seed=0, passes=passes(exact, dense, prompt.ids, prompt.regions, 8),
    )  # fmt: skip
    size = Budget.of_ratio(Decimal("0.3"), 90, 3, 2)
    found = context.extra("answer")

    def mass(text: str) -> list[float]:
        kept = lists(build(text).select(context, size), 2)
        return [
            float(context.per_kv_head(found.sums[layer])[head, kept[layer][head]].sum())
            for layer in range(3)
            for head in range(2)
        ]

    best = mass("oracle")
    for text in ("snapkv", "h2o", "tova", "streaming_llm", "random"):
        assert all(a >= b - 1e-9 for a, b in zip(best, mass(text), strict=True)), text


def test_a_sweep_gives_the_pass_the_task_and_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the runner: the answer is at most as long as the task's, and ratio 1 is the full cache."""
    model, prompts, lengths = tiny.tiny_llama(), tiny.prompt_set([60, 45]), []
    from kvcli.engine import prefilling

    own = prefilling.answered

    def noted(*args: Any) -> Answered:
        lengths.append(len(args[3]))
        return own(*args)

    monkeypatch.setattr(prefilling, "answered", noted)
    config = SweepConfig(methods=("oracle",), ratios=("0.2", "0.5", "1"))
    sink, _ = tiny.run(model, config, prompts)
    assert len(lengths) == 2 and max(lengths) <= tiny.TASK.max_new_tokens
    by_sample = {}
    for record in sink.records:
        assert record["status"] == "ok"
        if record["method"] == "full" or record["ratio"] == "1":
            by_sample.setdefault(record["sample_id"], set()).add(tuple(record["output_ids"]))
    assert {len(outputs) for outputs in by_sample.values()} == {1}
