"""AdaKV against plain loops: exact layer totals, ties, both rules, and settings that have an effect."""

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
from kvcli.methods.catalog import build, expand
from tests.methods.test_method_properties import QUICK, prompts, ratios
from tests.oracles import keydiff, knorm, pyramidkv, snapkv
from tests.oracles.adakv import adakv, head_counts, largest_remainder
from tests.oracles.harness import budget_for, context_for, lists
from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Prompt, budget, cut_window, random_prompt, tied_prompt

RATIOS = ["0.02", "0.1", "0.25", "0.3", "0.5", "0.77", "0.9", "1"]
LENGTHS = [1, 2, 5, 17, 64, 120]
RULES: list[dict[str, Any]] = [
    {}, {"floor": "0.5"}, {"floor": "0.0"}, {"floor": "1.0"}, {"rule": "safeguard"},
    {"rule": "safeguard", "floor": "0.5"}, {"normalize": True},
]  # fmt: skip
BASES = ["snapkv", "snapkv:window=8", "snapkv:window=4,pool=avg,kernel=3", "pyramidkv", "knorm", "keydiff"]


def text_of(base: str, rule: dict[str, Any]) -> str:
    name, _, rest = base.partition(":")
    settings = [f"base={name}", *[f"base.{pair}" for pair in rest.split(",") if pair]]
    return "adakv:" + ",".join([*settings, *[f"{k}={str(v).lower()}" for k, v in rule.items()]])


def base_answer(base: str, prompt: Prompt, size: int, strict: bool = False) -> tuple[Answer, int, list[int]]:
    """The base oracle's own choice (its scores are the competing keys'), the newest tokens it protects, its sizes."""
    name, _, rest = base.partition(":")
    settings = {k: int(v) if v.isdigit() else v for k, v in (pair.split("=") for pair in rest.split(",") if pair)}
    function = {
        "snapkv": snapkv.snapkv,
        "pyramidkv": pyramidkv.pyramidkv,
        "knorm": knorm.knorm,
        "keydiff": keydiff.keydiff,
    }
    answer = function[name](prompt, size, strict=strict, **settings)  # type: ignore[operator]
    window = {"snapkv": 32, "pyramidkv": 8}.get(name, 1)
    newest, _ = cut_window(int(settings.get("window", window)), prompt.n, size, strict)
    return answer, newest, [layer[0].count for layer in answer.picks]  # type: ignore[union-attr]


def expected(base: str, rule: dict[str, Any], prompt: Prompt, ratio: str, strict: bool = False) -> Answer:
    answer, newest, sizes = base_answer(base, prompt, budget(ratio, prompt.n), strict)
    scores = []
    for layer in answer.picks:
        tops = [pick for pick in layer if isinstance(pick, Top)]
        scores.append([[top.scores[p] for p in range(prompt.n - newest)] for top in tops])
    return adakv(scores, sizes, newest, 0, prompt.n, answer.flags, **rule)


def chosen(text: str, prompt: Prompt, ratio: str, strict: bool = False) -> tuple[list[list[list[int]]], set[str]]:
    method = build(text)
    selection = method.select(context_for(method, prompt), budget_for(prompt, ratio, strict))
    return lists(selection, prompt.kv_heads), set(selection.flags)


def check(base: str, rule: dict[str, Any], prompt: Prompt, ratio: str, strict: bool = False) -> None:
    kept, flags = chosen(text_of(base, rule), prompt, ratio, strict)
    wanted = expected(base, rule, prompt, ratio, strict)
    where = (base, rule, prompt.name, ratio)
    for layer, picks in zip(kept, wanted.picks, strict=True):
        for actual, pick in zip(layer, picks, strict=True):
            assert not pick.objection(actual), (where, pick.objection(actual))
    assert flags == wanted.flags, where


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_positions_agree_with_the_loops(rule: dict[str, Any], n: int) -> None:
    for kv_heads, group in ((2, 2), (4, 1), (3, 2)):
        prompt = random_prompt(n, kv_heads=kv_heads, group=group, layers=2, seed=2)
        for ratio in RATIOS:
            check("snapkv:window=8", rule, prompt, ratio)
            check("snapkv:window=8", rule, prompt, ratio, strict=True)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("base", BASES)
def test_every_base_agrees(base: str, n: int) -> None:
    prompt = random_prompt(n, kv_heads=4, group=2, layers=4)
    for rule in ({}, {"rule": "safeguard"}):
        for ratio in RATIOS:
            check(base, rule, prompt, ratio)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("n", [5, 16, 33])
def test_even_attention_ties_by_position_then_head(rule: dict[str, Any], n: int) -> None:
    """All scores tie: heads get the same budget, and the layer's odd pair goes to the first head."""
    for kv_heads in (2, 3):
        prompt = tied_prompt(n, kv_heads=kv_heads)
        for ratio in RATIOS:
            kept, _ = chosen(text_of("snapkv:window=2", rule), prompt, ratio)
            wanted = expected("snapkv:window=2", rule, prompt, ratio)
            assert kept == [[pick.kept() for pick in layer] for layer in wanted.picks]
            assert all(layer == [layer[0]] * kv_heads for layer in kept)


# "rounded by largest remainder so that the layer total is exact"


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_layer_total_is_exact(rule: dict[str, Any]) -> None:
    prompt = random_prompt(97, kv_heads=5, group=1, layers=2, dim=4)
    method = build(text_of("snapkv:window=4", rule))
    ctx = context_for(method, prompt)
    for size in range(1, 98):
        kept = lists(method.select(ctx, Budget.of_size(size, 97, 2, 5)), 5)
        assert [sum(map(len, layer)) for layer in kept] == [5 * size] * 2, size


def test_rounding_each_head_for_itself_would_miss_the_total() -> None:
    """The authors' rounding: 0.8 * c_h + floor(0.2 * B), each rounded."""
    missed = 0
    for size in range(1, 60):
        prompt = random_prompt(97, kv_heads=5, group=1, layers=1, dim=4)
        answer, newest, sizes = base_answer("snapkv:window=4", prompt, size)
        scores = [[pick.scores[p] for p in range(97 - newest)] for pick in answer.picks[0]]  # type: ignore[union-attr]
        counts = [int(c) for c in head_counts(scores, sizes[0], floor="0.0")]
        rounded = [round(0.8 * c + int(0.2 * sizes[0])) for c in counts]
        missed += sum(rounded) != 5 * sizes[0]
        assert sum(head_counts(scores, sizes[0])) == 5 * sizes[0]
    assert missed > 20


def test_the_budget_is_eight_tenths_of_the_count_and_two_of_the_mean() -> None:
    """One head attends to a few keys, the other evenly: with B = 10, c is the layer's best 20."""
    scores = [[10.0, 9.0, 8.0, *[0.0] * 47], [1.0] * 50]
    assert head_counts(scores, 10, floor="0.0") == [3, 17]
    ctx = context_for(build("adakv"), random_prompt(51, layers=1, group=1))
    method = build("adakv:base=keydiff")
    ctx._made["similarity to the anchor", 0] = -torch.tensor([[*row, 0.0] for row in scores])
    kept = lists(method.select(ctx, Budget.of_size(11, 51, 1, 2)), 2)
    assert [len(head) for head in kept[0]] == [1 + 4, 1 + 16]  # 0.8 * 3 + 2 = 4.4, 0.8 * 17 + 2 = 15.6
    assert kept[0][0] == [0, 1, 2, 3, 50] and kept[0][1] == [*range(16), 50]


def test_the_safeguard_keeps_a_fifth_of_every_head() -> None:
    """Head 0's keys score below all of head 1's: it keeps exactly its fifth."""
    ctx = context_for(build("adakv"), random_prompt(51, layers=1, group=1))
    low, high = [-5.0 - i for i in range(50)], [1.0] * 50
    ctx._made["similarity to the anchor", 0] = -torch.tensor([[*low, 0.0], [*high, 0.0]])
    kept = lists(build("adakv:base=keydiff,rule=safeguard").select(ctx, Budget.of_size(21, 51, 1, 2)), 2)
    assert [len(head) for head in kept[0]] == [1 + 4, 1 + 36]
    assert kept[0][0] == [0, 1, 2, 3, 50]
    none = lists(build("adakv:base=keydiff,rule=safeguard,floor=0").select(ctx, Budget.of_size(21, 51, 1, 2)), 2)
    assert [len(head) for head in none[0]] == [1, 1 + 40]


# "AdaKV's `--floor` written to one config key and read from another: no effect. Unknown or unused settings are an
# error."


def test_floor_has_an_effect() -> None:
    prompt = random_prompt(120, kv_heads=4, group=2, layers=1)
    spread = []
    for floor in ("0", "0.2", "0.5", "1"):
        kept, _ = chosen(f"adakv:base.window=8,floor={floor}", prompt, "0.3")
        sizes = [len(head) for head in kept[0]]
        spread.append(max(sizes) - min(sizes))
    assert spread[0] > spread[1] > spread[2] > spread[3] == 0


def test_floor_one_is_the_base_itself() -> None:
    prompt = random_prompt(120, kv_heads=4, group=2)
    for ratio in RATIOS:
        assert chosen("adakv:floor=1", prompt, ratio) == chosen("snapkv", prompt, ratio)
        assert chosen("adakv:floor=1,rule=safeguard", prompt, ratio) == chosen("snapkv", prompt, ratio)


def test_settings_of_the_base_have_an_effect() -> None:
    prompt = random_prompt(120, kv_heads=4, group=2)
    plain = chosen("adakv", prompt, "0.5")[0]
    for text in (
        "adakv:base.window=8", "adakv:base.kernel=3", "adakv:base.pool=avg", "adakv:base.reduce=max",
        "adakv:base=pyramidkv", "adakv:rule=safeguard", "adakv:floor=0.4", "adakv:normalize=true",
    ):  # fmt: skip
        assert chosen(text, prompt, "0.5")[0] != plain, text
    assert build("adakv:base.window=8").settings()["base.window"] == 8


@pytest.mark.parametrize(
    "text, message",
    [
        ("adakv:flor=0.2", "flor"), ("adakv:window=8", "window"), ("adakv:base.windw=8", "windw"),
        ("adakv:floor=1.5", "out of range"), ("adakv:rule=even", "not one of its values"),
        ("adakv:base=streaming_llm", "does not rank keys"), ("adakv:base=adakv", "does not rank keys"),
        ("adakv:base=keydiff,base.block=8", "evicts in steps"), ("adakv:rule=safeguard,normalize=true", "no effect"),
    ],
)  # fmt: skip
def test_unknown_and_unused_settings_are_errors(text: str, message: str) -> None:
    with pytest.raises(KvcliError, match=message):
        build(text)


def test_scores_below_zero_cannot_be_weighed() -> None:
    with pytest.raises(KvcliError, match="below zero"):
        chosen("adakv:base=knorm,normalize=true", random_prompt(40), "0.5")


def test_the_scope_is_the_layer_or_the_bases_model() -> None:
    assert build("adakv").budget_scope == "layer"
    assert build("adakv:base=pyramidkv").budget_scope == build("adakv:base=knorm").budget_scope == "model"
    assert [str(m) for m in expand(["adakv:base=snapkv,floor=0.2,base.window=32"])] == ["adakv"]


def test_the_engine_accepts_every_answer() -> None:
    for base in BASES:
        prompt = random_prompt(60, kv_heads=3, layers=4)
        method = build(text_of(base, {}))
        for ratio in RATIOS:
            select(method, context_for(method, prompt), Budget.of_ratio(Decimal(ratio), 60, 4, 3))


@given(
    prompt=prompts(), ratio=ratios, strict=st.booleans(), rule=st.sampled_from(RULES), base=st.sampled_from(BASES[:4])
)
@QUICK
def test_any_prompt_agrees_and_is_sound(
    prompt: Prompt, ratio: str, strict: bool, rule: dict[str, Any], base: str
) -> None:
    check(base, rule, prompt, ratio, strict)
    kept, flags = chosen(text_of(base, rule), prompt, ratio, strict)
    for head in (head for layer in kept for head in layer):
        assert head == sorted(set(head)) and head[-1] == prompt.n - 1 and head[0] >= 0
    size = budget_for(prompt, ratio, strict)
    method = build(text_of(base, rule))
    totals = {"layer": [sum(map(len, layer)) for layer in kept]}
    totals["model"] = [sum(totals["layer"])]
    assert set(totals[method.budget_scope]) == {size.total(method.budget_scope)} or "over_budget" in flags
    whole = [[list(range(prompt.n))] * prompt.kv_heads] * prompt.layers
    assert chosen(text_of(base, rule), prompt, "1", strict) == (whole, set())


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 100))
@QUICK
def test_largest_remainders_add_up(counts: list[int], percent: int) -> None:
    from fractions import Fraction

    floor, mean = Fraction(percent, 100), sum(counts) // len(counts)
    counts[0] += mean * len(counts) - sum(counts) if counts[0] + mean * len(counts) >= sum(counts) else 0
    ideal = [(1 - floor) * c + floor * Fraction(sum(counts), len(counts)) for c in counts]
    parts = largest_remainder(ideal, sum(counts))
    assert sum(parts) == sum(counts) and all(abs(p - i) < 1 for p, i in zip(parts, ideal, strict=True))
    assert np.all(np.array(parts) >= 0)
