"""Knorm against plain loops: norms in float32, ties by position, skipped layers counted in the total."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcli.cache.budget import Budget
from kvcli.errors import KvcliError
from kvcli.methods.catalog import build
from tests.methods.test_method_properties import QUICK, prompts, ratios
from tests.oracles.harness import budget_for, context_for, lists
from tests.oracles.knorm import knorm, layer_sizes
from tests.oracles.prompts import Prompt, budget, random_prompt, tied_prompt

RATIOS = ["0.02", "0.1", "0.25", "0.3", "0.5", "0.77", "0.9", "1"]
SKIPS = ["0,1", "none", "0", "2", "0,2,3"]


def chosen(text: str, prompt: Prompt, ratio: str, strict: bool = False) -> tuple[list[list[list[int]]], set[str]]:
    method = build(text)
    selection = method.select(context_for(method, prompt), budget_for(prompt, ratio, strict))
    return lists(selection, prompt.kv_heads), set(selection.flags)


def check(prompt: Prompt, ratio: str, skip: str, strict: bool = False) -> None:
    kept, flags = chosen(f"knorm:skip_layers='{skip}'", prompt, ratio, strict)
    wanted = knorm(prompt, budget(ratio, prompt.n), skip_layers=skip, strict=strict)
    for layer, picks in zip(kept, wanted.picks, strict=True):
        for actual, pick in zip(layer, picks, strict=True):
            assert not pick.objection(actual), (prompt.name, ratio, skip, pick.objection(actual))
    assert flags == wanted.flags, (prompt.name, ratio, skip)


@pytest.mark.parametrize("n", [1, 2, 5, 17, 64, 200])
@pytest.mark.parametrize("layers", [4, 7])
@pytest.mark.parametrize("skip", SKIPS)
def test_positions_agree_with_the_loops(skip: str, layers: int, n: int) -> None:
    for group in (1, 2):
        prompt = random_prompt(n, group=group, layers=layers)
        for ratio in RATIOS:
            check(prompt, ratio, skip)
            check(prompt, ratio, skip, strict=True)


@pytest.mark.parametrize("n", [5, 17, 64])
def test_equal_norms_keep_the_first_positions(n: int) -> None:
    prompt = tied_prompt(n)
    for ratio in RATIOS:
        kept, _ = chosen("knorm:skip_layers=none", prompt, ratio)
        size = budget(ratio, n)
        assert kept == [[[*range(size - 1), n - 1]] * 2] * 2


# "layers 0 and 1 uncompressed as the authors evaluate, the other layers' budgets lowered so that the total holds"


@pytest.mark.parametrize("layers", [8, 16, 28, 32])
def test_layers_0_and_1_stay_whole_and_the_total_holds(layers: int) -> None:
    prompt = random_prompt(40, kv_heads=1, group=1, layers=layers, dim=4)
    for ratio in ("0.4", "0.5", "0.9"):
        kept, flags = chosen("knorm", prompt, ratio)
        sizes = [len(layer[0]) for layer in kept]
        assert sizes[:2] == [40, 40] and not flags
        assert max(sizes[2:]) - min(sizes[2:]) <= 1 and sum(sizes[2:]) < (layers - 2) * budget(ratio, 40)
        assert sum(sizes) == layers * budget(ratio, 40)


def test_a_small_budget_leaves_half_to_the_other_layers() -> None:
    """4 layers at 0.3 of 100: the total is 120, less than two whole layers; the others keep 15 each."""
    prompt = random_prompt(100, kv_heads=1, group=1, layers=4, dim=4)
    kept, flags = chosen("knorm", prompt, "0.3")
    assert [len(layer[0]) for layer in kept] == [45, 45, 15, 15]
    assert flags == {"fallback"}
    kept, flags = chosen("knorm", prompt, "0.3", strict=True)
    assert [len(layer[0]) for layer in kept] == [100, 100, 1, 1]
    assert flags == {"over_budget"}


def test_sizes_never_fall_as_the_ratio_grows() -> None:
    """No jump where the skipped layers begin to be whole."""
    for layers in (1, 2, 3, 4, 6, 12):
        before = [0] * layers
        for size in range(1, 101):
            sizes, _ = layer_sizes(100, size, layers, {0, 1})
            held = build("knorm").sizes(Budget.of_size(size, 100, layers, 2), 1, 0)  # type: ignore[attr-defined]
            assert [s + 1 for s in held] == sizes
            assert sum(sizes) == size * layers and max(sizes) <= 100 and min(sizes) >= 1
            assert sum(sizes[:2]) >= sum(before[:2]) and sum(sizes[2:]) >= sum(before[2:]) - 1
            before = sizes


# "Key norms in bfloat16: about three quarters of the scores tie [...] Score in float32, ties by position."


def test_bfloat16_keys_are_scored_in_float32() -> None:
    prompt = random_prompt(400, kv_heads=2, group=1, layers=1, dim=64)
    rounded = [torch.tensor(k).bfloat16() for k in prompt.keys]
    coarse = rounded[0].norm(dim=-1)
    assert coarse.unique().numel() < 0.5 * coarse.numel()  # the trap: in bfloat16 most norms tie
    exact = Prompt(
        prompt.queries, [k.double().numpy() for k in rounded], prompt.values, prompt.scaling, prompt.layout, "bf16"
    )
    method = build("knorm:skip_layers=none")
    ctx = context_for(method, exact, dtype=torch.bfloat16)
    assert ctx.keys[0].dtype == torch.bfloat16
    for ratio in RATIOS:
        kept = lists(method.select(ctx, budget_for(exact, ratio)), 2)
        wanted = knorm(exact, budget(ratio, 400), skip_layers="none")
        assert not any(p.objection(k) for layer, ps in zip(kept, wanted.picks, strict=True)
                       for k, p in zip(layer, ps, strict=True))  # fmt: skip


def test_float64_keys_are_scored_in_float64() -> None:
    """Norms that only float64 tells apart."""
    keys = np.zeros((1, 6, 4))
    keys[0, :, 0] = [1, 1 + 1e-12, 1 - 1e-12, 1 - 2e-12, 1 + 2e-12, 5]
    prompt = Prompt([np.ones((1, 6, 4))], [keys], [keys], 0.5, random_prompt(6).layout)
    assert chosen("knorm:skip_layers=none", prompt, "0.5")[0] == [[[2, 3, 5]]]


@given(prompt=prompts(), ratio=ratios, skip=st.sampled_from(["0,1", "none", "0"]), strict=st.booleans())
@QUICK
def test_any_prompt_agrees_and_keeps_the_models_total(prompt: Prompt, ratio: str, skip: str, strict: bool) -> None:
    check(prompt, ratio, skip, strict)
    kept, flags = chosen(f"knorm:skip_layers='{skip}'", prompt, ratio, strict)
    total = sum(len(head) for layer in kept for head in layer)
    limit = budget_for(prompt, ratio).model_total
    assert total == limit or (strict and total > limit and flags == {"over_budget"})
    assert all(head == sorted(set(head)) and head[-1] == prompt.n - 1 for layer in kept for head in layer)
    whole = [[list(range(prompt.n))] * prompt.kv_heads] * prompt.layers
    assert chosen(f"knorm:skip_layers='{skip}'", prompt, "1", strict) == (whole, set())


# "Unknown or unused settings are an error."


@pytest.mark.parametrize("text", ["x", "0;1", "-1", "0,,1", "1.5"])
def test_skip_layers_must_be_layer_numbers(text: str) -> None:
    with pytest.raises(KvcliError, match="layer numbers"):
        build(f"knorm:skip_layers='{text}'")


def test_a_layer_that_the_model_lacks_is_an_error() -> None:
    with pytest.raises(KvcliError, match="skip layer 4, the model has 4"):
        chosen("knorm:skip_layers=4", random_prompt(20, layers=4), "0.5")


def test_skip_layers_has_one_spelling() -> None:
    assert build("knorm:skip_layers='1, 0,1'") == build("knorm")
    assert build("knorm").budget_scope == "model"


def test_norms_are_made_once_per_prompt() -> None:
    prompt = random_prompt(30, layers=3)
    method = build("knorm")
    ctx = context_for(method, prompt)
    for ratio in RATIOS:
        method.select(ctx, Budget.of_ratio(Decimal(ratio), 30, 3, 2))
    assert sorted(ctx._made) == [("key norms", layer) for layer in range(3)]
