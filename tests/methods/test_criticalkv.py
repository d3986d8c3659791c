"""CriticalKV against plain loops: both stages, the projection of each query head, adaptive heads."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcli.cache.budget import Budget
from kvcli.engine.selecting import select
from kvcli.errors import KvcliError
from kvcli.methods.catalog import build
from kvcli.methods.context import Context
from tests.methods.test_adakv import base_answer
from tests.methods.test_method_properties import QUICK, prompts, ratios
from tests.oracles.criticalkv import criticalkv, value_weights
from tests.oracles.harness import budget_for, context_for, lists
from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Array, Prompt, budget, random_prompt, tied_prompt

RATIOS = ["0.02", "0.1", "0.25", "0.3", "0.5", "0.77", "0.9", "1"]
SETTINGS: list[dict[str, Any]] = [
    {}, {"first": 0.0}, {"first": 1.0}, {"first": 0.25}, {"first": 0.29}, {"eps": 0.5}, {"heads": "adaptive"},
    {"heads": "adaptive", "first": 0.25},
]  # fmt: skip
BASES = ["snapkv:window=8", "snapkv", "snapkv:window=4,kernel=3,reduce=max", "pyramidkv"]
HIDDEN = 12


def projections(prompt: Prompt, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    width = prompt.heads * prompt.values[0].shape[2]
    return [rng.standard_normal((HIDDEN, width)) for _ in range(prompt.layers)]


def context(method: Any, prompt: Prompt, matrices: list[Array], **more: Any) -> Context:
    ctx = context_for(method.inner, prompt, **more)
    ctx.o_proj = lambda layer: torch.tensor(matrices[layer])
    return ctx


def text_of(base: str, settings: dict[str, Any]) -> str:
    name, _, rest = base.partition(":")
    parts = [f"base={name}", *[f"base.{p}" for p in rest.split(",") if p], *[f"{k}={v}" for k, v in settings.items()]]
    return "criticalkv:" + ",".join(parts)


def chosen(text: str, prompt: Prompt, ratio: str, strict: bool = False) -> tuple[list[list[list[int]]], set[str]]:
    method = build(text)
    selection = method.select(context(method, prompt, projections(prompt)), budget_for(prompt, ratio, strict))
    return lists(selection, prompt.kv_heads), set(selection.flags)


def expected(base: str, settings: dict[str, Any], prompt: Prompt, ratio: str, strict: bool = False) -> Answer:
    answer, newest, sizes = base_answer(base, prompt, budget(ratio, prompt.n), strict)
    scores = [
        [[pick.scores[p] / newest for p in range(prompt.n - newest)] for pick in layer if isinstance(pick, Top)]
        for layer in answer.picks
    ]
    return criticalkv(prompt, projections(prompt), scores, sizes, newest, answer.flags, **settings)


def check(base: str, settings: dict[str, Any], prompt: Prompt, ratio: str, strict: bool = False) -> None:
    kept, flags = chosen(text_of(base, settings), prompt, ratio, strict)
    wanted = expected(base, settings, prompt, ratio, strict)
    where = (base, settings, prompt.name, ratio)
    for layer, picks in zip(kept, wanted.picks, strict=True):
        for actual, pick in zip(layer, picks, strict=True):
            assert not pick.objection(actual), (where, pick.objection(actual))
    assert flags == wanted.flags, where


@pytest.mark.parametrize("n", [1, 2, 5, 17, 64])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_positions_agree_with_the_loops(settings: dict[str, Any], n: int) -> None:
    for kv_heads, group in ((2, 2), (3, 1), (2, 4)):
        prompt = random_prompt(n, kv_heads=kv_heads, group=group, layers=2, dim=4)
        for ratio in RATIOS:
            check("snapkv:window=8", settings, prompt, ratio)


def test_the_first_stage_is_counted_on_exact_decimals() -> None:
    """0.29 of 100 free pairs are 29; as floats they are 28."""
    for seed in range(6):
        prompt = random_prompt(216, kv_heads=2, group=1, layers=1, dim=4, seed=seed)
        check("snapkv:window=8", {"first": 0.29}, prompt, "0.5")


@pytest.mark.parametrize("n", [5, 17, 90])
@pytest.mark.parametrize("base", BASES)
def test_every_attention_base_agrees(base: str, n: int) -> None:
    prompt = random_prompt(n, kv_heads=2, group=2, layers=3, dim=4)
    for settings in ({}, {"heads": "adaptive"}):
        for ratio in RATIOS:
            check(base, settings, prompt, ratio)
            check(base, settings, prompt, ratio, strict=True)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_even_attention_is_decided_by_values_then_position(settings: dict[str, Any]) -> None:
    """All scores tie, and all values are zero: positions alone decide."""
    for n in (5, 16, 33):
        prompt = tied_prompt(n)
        for ratio in RATIOS:
            kept, _ = chosen(text_of("snapkv:window=2", settings), prompt, ratio)
            wanted = expected("snapkv:window=2", settings, prompt, ratio)
            assert kept == [[pick.kept() for pick in layer] for layer in wanted.picks]


def test_half_goes_to_the_base_and_half_to_the_products() -> None:
    """Attention ranks 0, 1, 2, ...; key 30 has by far the heaviest value, key 31 the next."""
    n, window = 41, 1
    prompt = random_prompt(n, kv_heads=1, group=1, layers=1, dim=4)
    values = prompt.values[0] * 0 + 0.01
    values[0, 30], values[0, 31] = 1e6, 1e5
    heavy = Prompt(prompt.queries, prompt.keys, [values], prompt.scaling, prompt.layout)
    method = build("criticalkv:base.window=1,base.kernel=1")
    ctx = context(method, heavy, [np.ones((HIDDEN, 4))])
    falling = torch.linspace(0.9, 0.1, n - window)[None].double()
    ctx._made["snap_scores", 0, window, 1, "max", "mean"] = falling
    kept = lists(method.select(ctx, Budget.of_size(5, n, 1, 1)), 1)
    assert kept == [[[0, 1, 30, 31, 40]]]
    assert lists(build("snapkv:window=1,kernel=1").select(ctx, Budget.of_size(5, n, 1, 1)), 1) == [[[0, 1, 2, 3, 40]]]
    odd = lists(method.select(ctx, Budget.of_size(6, n, 1, 1)), 1)  # 5 free pairs: 2 by score, 3 by product
    assert odd == [[[0, 1, 2, 30, 31, 40]]]


def test_the_weight_is_the_mean_of_the_query_heads_l1_norms() -> None:
    prompt = random_prompt(20, kv_heads=2, group=3, layers=2, dim=4)
    method = build("criticalkv")
    matrices = projections(prompt)
    ctx = context(method, prompt, matrices)
    method.select(ctx, budget_for(prompt, "0.5"))
    for layer in range(2):
        made = ctx._made["L1 of W_o v", layer]
        np.testing.assert_allclose(made.numpy(), value_weights(prompt, matrices, layer), rtol=1e-12)


def test_weights_of_bfloat16_values_are_float32() -> None:
    prompt = random_prompt(30, kv_heads=2, group=2, layers=1, dim=4)
    method = build("criticalkv")
    ctx = context(method, prompt, [m.astype(np.float32) for m in projections(prompt)], dtype=torch.bfloat16)
    method.select(ctx, budget_for(prompt, "0.5"))
    assert ctx._made["L1 of W_o v", 0].dtype == torch.float32


def test_eps_weighs_against_the_mean_over_the_window() -> None:
    """With eps = 0.01 the choice is another one than with sums of 8 queries in place of means."""
    prompt = random_prompt(64, kv_heads=2, group=2, layers=3, dim=4)
    differs = 0
    for ratio in ("0.25", "0.3", "0.5"):
        check("snapkv:window=8", {"eps": 0.01}, prompt, ratio)
        kept = chosen("criticalkv:base.window=8,eps=0.01", prompt, ratio)[0]
        differs += kept != chosen("criticalkv:base.window=8,eps=0.00125", prompt, ratio)[0]
    assert differs


def test_scope_and_needs() -> None:
    assert build("criticalkv").budget_scope == "head"
    assert build("criticalkv:heads=adaptive").budget_scope == "layer"
    assert build("criticalkv:base=pyramidkv").budget_scope == "model"
    assert build("criticalkv:base=pyramidkv,heads=adaptive").budget_scope == "model"
    assert build("criticalkv:base.window=8").needs() == {"window:8", "o_proj"}


def test_first_one_is_the_base_itself() -> None:
    prompt = random_prompt(90, kv_heads=2, group=2)
    plain = build("snapkv")
    for ratio in RATIOS:
        base = plain.select(context_for(plain, prompt), budget_for(prompt, ratio))
        assert chosen("criticalkv:first=1", prompt, ratio)[0] == lists(base, 2)


def test_adaptive_heads_keep_the_layers_total() -> None:
    prompt = random_prompt(97, kv_heads=5, group=1, layers=2, dim=4)
    method = build("criticalkv:base.window=4,heads=adaptive")
    ctx = context(method, prompt, projections(prompt))
    uneven = 0
    for size in range(1, 98):
        kept = lists(method.select(ctx, Budget.of_size(size, 97, 2, 5)), 5)
        assert [sum(map(len, layer)) for layer in kept] == [5 * size] * 2, size
        uneven += len({len(head) for head in kept[0]}) > 1
    assert uneven > 50


def test_the_engine_accepts_every_answer() -> None:
    for base in BASES:
        for settings in SETTINGS:
            prompt = random_prompt(60, kv_heads=3, layers=2, dim=4)
            method = build(text_of(base, settings))
            for ratio in RATIOS:
                ctx = context(method, prompt, projections(prompt))
                select(method, ctx, Budget.of_ratio(Decimal(ratio), 60, 2, 3))


def test_a_family_without_a_known_projection_is_one_message() -> None:
    prompt = random_prompt(40)
    method = build("criticalkv")
    with pytest.raises(KvcliError, match="output projection") as error:
        method.select(context_for(method.inner, prompt), budget_for(prompt, "0.5"))  # type: ignore[attr-defined]
    assert error.value.given == "--method criticalkv" and error.value.fix


@pytest.mark.parametrize("base", ["knorm", "keydiff"])
def test_a_base_with_scores_below_zero_is_refused(base: str) -> None:
    with pytest.raises(KvcliError, match="below zero"):
        chosen(f"criticalkv:base={base}", random_prompt(40), "0.5")


@pytest.mark.parametrize(
    "text, message",
    [
        ("criticalkv:epsilon=1", "epsilon"), ("criticalkv:first=2", "out of range"), ("criticalkv:base=full", "rank"),
        ("criticalkv:heads=some", "not one of its values"), ("criticalkv:base=keydiff,base.block=4", "in steps"),
        ("criticalkv:base=adakv", "does not rank keys"),
    ],
)  # fmt: skip
def test_unknown_and_unused_settings_are_errors(text: str, message: str) -> None:
    with pytest.raises(KvcliError, match=message):
        build(text)


@given(prompt=prompts(), ratio=ratios, strict=st.booleans(), settings=st.sampled_from(SETTINGS))
@QUICK
def test_any_prompt_agrees_and_is_sound(prompt: Prompt, ratio: str, strict: bool, settings: dict[str, Any]) -> None:
    check("snapkv:window=3", settings, prompt, ratio, strict)
    text = text_of("snapkv:window=3", settings)
    kept, flags = chosen(text, prompt, ratio, strict)
    size = budget_for(prompt, ratio, strict)
    for head in (head for layer in kept for head in layer):
        assert head == sorted(set(head)) and head[-1] == prompt.n - 1 and head[0] >= 0
    if "over_budget" not in flags:
        assert {sum(map(len, layer)) for layer in kept} == {size.layer_total}
        assert settings.get("heads") or {len(head) for layer in kept for head in layer} == {size.per_head}
    assert chosen(text, prompt, "1", strict) == ([[list(range(prompt.n))] * prompt.kv_heads] * prompt.layers, set())
