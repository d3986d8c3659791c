"""LagKV against plain loops: partitions, its floor, and what it says below it."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcli.cache.budget import Budget
from kvcli.engine.selecting import select
from kvcli.methods.catalog import build
from tests.methods.test_method_properties import QUICK, prompts, ratios
from tests.oracles.harness import budget_for, context_for, lists
from tests.oracles.lagkv import lagkv
from tests.oracles.prompts import Prompt, budget, random_prompt, tied_prompt

RATIOS = ["0.02", "0.1", "0.25", "0.3", "0.5", "0.77", "0.9", "1"]
SETTINGS: list[dict[str, int]] = [
    {"sinks": 4, "lag": 8}, {"sinks": 0, "lag": 5}, {"sinks": 16, "lag": 16}, {"sinks": 1, "lag": 1}, {},
]  # fmt: skip


def text_of(settings: dict[str, int]) -> str:
    return "lagkv" + (":" if settings else "") + ",".join(f"{k}={v}" for k, v in settings.items())


def chosen(text: str, prompt: Prompt, ratio: str) -> tuple[list[list[list[int]]], set[str]]:
    method = build(text)
    selection = method.select(context_for(method, prompt), budget_for(prompt, ratio))
    return lists(selection, prompt.kv_heads), set(selection.flags)


def check(prompt: Prompt, ratio: str, settings: dict[str, int]) -> None:
    kept, flags = chosen(text_of(settings), prompt, ratio)
    wanted = lagkv(prompt, budget(ratio, prompt.n), **settings)
    for layer, picks in zip(kept, wanted.picks, strict=True):
        for actual, pick in zip(layer, picks, strict=True):
            assert not pick.objection(actual), (settings, prompt.name, ratio, pick.objection(actual))
    assert flags == wanted.flags, (settings, prompt.name, ratio)


@pytest.mark.parametrize("n", [1, 2, 5, 17, 21, 64, 65, 100])
@pytest.mark.parametrize("settings", SETTINGS, ids=text_of)
def test_positions_agree_with_the_loops(settings: dict[str, int], n: int) -> None:
    for group in (1, 2):
        prompt = random_prompt(n, group=group, layers=2, seed=1)
        for ratio in RATIOS:
            check(prompt, ratio, settings)


def test_the_default_setting_agrees_at_900_tokens() -> None:
    prompt = random_prompt(900, kv_heads=2, group=1, layers=1, dim=6)
    for ratio in RATIOS:
        check(prompt, ratio, {})


@pytest.mark.parametrize("n", [20, 41, 64])
def test_equal_states_keep_the_first_of_each_partition(n: int) -> None:
    """All states zero: no channel has a range, all scores tie."""
    prompt, settings = tied_prompt(n), {"sinks": 4, "lag": 8}
    for ratio in RATIOS:
        kept, _ = chosen(text_of(settings), prompt, ratio)
        assert kept == [[pick.kept() for pick in layer] for layer in lagkv(prompt, budget(ratio, n), **settings).picks]
    held = chosen("lagkv:sinks=4,lag=8", tied_prompt(36), "0.5")[0][0][0]  # 18 of 36: 12 stay anyway, 6 in 3 partitions
    assert held == [0, 1, 2, 3, 4, 5, 12, 13, 20, 21, *range(28, 36)]


# "A ratio outside the domain gives [...] `unreachable` with the nearest reachable setting, never a silent other ratio."


def test_the_floor_at_900_tokens_is_029() -> None:
    prompt = random_prompt(900, kv_heads=1, group=1, layers=2, dim=4)
    method = build("lagkv")
    ctx = context_for(method, prompt)
    below = {"unreachable", "over_budget"}
    for ratio, size, flags in (
        ("0.1", 260, below), ("0.28", 260, below), ("0.29", 261, set()), ("0.3", 270, set()), ("0.5", 450, set()),
    ):  # fmt: skip
        selection = select(method, ctx, Budget.of_ratio(Decimal(ratio), 900, 2, 1))
        assert {len(head) for layer in lists(selection, 1) for head in layer} == {size}, ratio
        assert selection.flags == flags, ratio
    assert round(260 / 900, 2) == 0.29


@pytest.mark.parametrize("text, n", [("lagkv", 271), ("lagkv:lag=1024", 2063)])
def test_a_short_prompt_is_noop_and_unreachable(text: str, n: int) -> None:
    prompt = random_prompt(n, kv_heads=1, group=1, layers=1, dim=4)
    method = build(text)
    selection = select(method, context_for(method, prompt), Budget.of_ratio(Decimal("0.5"), n, 1, 1))
    assert lists(selection, 1) == [[list(range(n))]]
    assert selection.flags == {"noop", "unreachable", "over_budget"}
    longer = random_prompt(n + 1, kv_heads=1, group=1, layers=1, dim=4)
    selection = select(method, context_for(method, longer), Budget.of_ratio(Decimal("0.9"), n + 1, 1, 1))
    assert not selection.flags and len(lists(selection, 1)[0][0]) == budget("0.9", n + 1)


def test_every_partition_keeps_the_same_number_but_for_the_rest() -> None:
    prompt = random_prompt(400, kv_heads=2, group=1, layers=2)
    for ratio in ("0.3", "0.5", "0.81"):
        kept, _ = chosen("lagkv:sinks=4,lag=32", prompt, ratio)
        for head in (head for layer in kept for head in layer):
            counts = [sum(start <= p < start + 32 for p in head) for start in range(4, 4 + 11 * 32, 32)]
            assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)
            assert len(head) == budget(ratio, 400)


def test_keys_and_values_both_count() -> None:
    prompt = random_prompt(60)
    shuffled = [v[:, np.random.default_rng(0).permutation(60)] for v in prompt.values]
    other = Prompt(prompt.queries, prompt.keys, shuffled, prompt.scaling, prompt.layout)
    turned = Prompt(prompt.queries, prompt.values, prompt.keys, prompt.scaling, prompt.layout)
    plain = chosen("lagkv:sinks=4,lag=8", prompt, "0.5")[0]
    assert chosen("lagkv:sinks=4,lag=8", other, "0.5")[0] != plain
    assert chosen("lagkv:sinks=4,lag=8", turned, "0.5")[0] == plain


def test_a_constant_channel_makes_no_score_infinite() -> None:
    prompt = random_prompt(60, layers=1)
    keys = prompt.keys[0].copy()
    keys[..., 0] = 2.0
    keys[:, ::3, 0] = 3.0
    keys[:, 12:20, 0] = 2.0
    flat = Prompt(prompt.queries, [keys], prompt.values, prompt.scaling, prompt.layout)
    for ratio in RATIOS:
        check(flat, ratio, {"sinks": 4, "lag": 8})


def test_bfloat16_states_are_scored_in_float32() -> None:
    prompt = random_prompt(200, kv_heads=1, group=1, layers=1, dim=32)
    keys, values = (torch.tensor(x[0]).bfloat16() for x in (prompt.keys, prompt.values))
    exact = Prompt(prompt.queries, [keys.double().numpy()], [values.double().numpy()], prompt.scaling, prompt.layout)
    method = build("lagkv:sinks=4,lag=32")
    kept = lists(method.select(context_for(method, exact, dtype=torch.bfloat16), budget_for(exact, "0.5")), 1)
    pick = lagkv(exact, 100, sinks=4, lag=32).picks[0][0]
    assert not pick.objection(kept[0][0])


@given(prompt=prompts(), ratio=ratios, strict=st.booleans(), settings=st.sampled_from(SETTINGS))
@QUICK
def test_any_prompt_agrees_and_is_sound(prompt: Prompt, ratio: str, strict: bool, settings: dict[str, int]) -> None:
    check(prompt, ratio, settings)
    method, size = build(text_of(settings)), budget_for(prompt, ratio, strict)
    selection = method.select(context_for(method, prompt), size)
    for head in (head for layer in lists(selection, prompt.kv_heads) for head in layer):
        assert head == sorted(set(head)) and head[-1] == prompt.n - 1 and head[0] >= 0
        assert len(head) == size.per_head or (len(head) > size.per_head and "unreachable" in selection.flags)
    full = method.select(context_for(method, prompt), budget_for(prompt, "1"))
    assert lists(full, prompt.kv_heads) == [[list(range(prompt.n))] * prompt.kv_heads] * prompt.layers
    assert not full.flags
