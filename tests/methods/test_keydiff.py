"""KeyDiff against plain loops, in one shot and block by block."""

from __future__ import annotations

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
from tests.oracles.keydiff import keydiff, scores
from tests.oracles.prompts import Prompt, budget, random_prompt, tied_prompt

RATIOS = ["0.02", "0.1", "0.25", "0.3", "0.5", "0.77", "0.9", "1"]
TEXTS = {"keydiff": 0, "keydiff:block=1": 1, "keydiff:block=7": 7, "keydiff:block=32": 32, "keydiff:block=500": 500}


def chosen(text: str, prompt: Prompt, ratio: str) -> tuple[list[list[list[int]]], set[str]]:
    method = build(text)
    selection = method.select(context_for(method, prompt), budget_for(prompt, ratio))
    return lists(selection, prompt.kv_heads), set(selection.flags)


def check(text: str, prompt: Prompt, ratio: str) -> None:
    kept, flags = chosen(text, prompt, ratio)
    wanted = keydiff(prompt, budget(ratio, prompt.n), block=TEXTS[text])
    for layer, picks in zip(kept, wanted.picks, strict=True):
        for actual, pick in zip(layer, picks, strict=True):
            assert not pick.objection(actual), (text, prompt.name, ratio, pick.objection(actual))
    assert flags == wanted.flags


@pytest.mark.parametrize("n", [1, 2, 5, 17, 64, 90])
@pytest.mark.parametrize("text", TEXTS)
def test_positions_agree_with_the_loops(text: str, n: int) -> None:
    for group in (1, 2):
        prompt = random_prompt(n, group=group, layers=2, seed=3)
        for ratio in RATIOS:
            check(text, prompt, ratio)


@pytest.mark.parametrize("text", ["keydiff", "keydiff:block=8"])
def test_equal_keys_keep_the_first_positions(text: str) -> None:
    for prompt in (tied_prompt(20), tied_prompt(64)):
        for ratio in RATIOS:
            size = budget(ratio, prompt.n)
            assert chosen(text, prompt, ratio)[0] == [[[*range(size - 1), prompt.n - 1]] * 2] * 2


def test_one_block_of_the_whole_prompt_is_one_shot() -> None:
    prompt = random_prompt(60)
    for ratio in RATIOS:
        assert chosen("keydiff:block=60", prompt, ratio) == chosen("keydiff", prompt, ratio)


def test_blocks_are_another_choice_than_one_shot() -> None:
    prompt = random_prompt(200)
    assert chosen("keydiff:block=16", prompt, "0.2") != chosen("keydiff", prompt, "0.2")


def test_a_key_evicted_in_an_early_block_never_comes_back() -> None:
    """The first block's second key is like its first; later blocks turn the anchor away, too late for it."""
    keys = np.zeros((1, 6, 2))
    keys[0] = [[1, 0.01], [1, 0], [0, 1], [-1, 0.2], [-1, 0.1], [-1, 0]]
    prompt = Prompt([np.ones((1, 6, 2))], [keys], [keys], 1.0, random_prompt(6).layout)
    first = scores(keys[0].tolist(), [0, 1, 2])
    gone = min(first, key=lambda p: first[p])
    for size in ("0.34", "0.5"):
        held = chosen("keydiff:block=3", prompt, "0.34")[0][0][0]
        assert gone not in held, size
    assert gone in chosen("keydiff", prompt, "0.5")[0][0][0]


def test_the_length_of_a_key_does_not_count() -> None:
    prompt = random_prompt(50)
    factor = np.random.default_rng(1).uniform(0.1, 9, (2, 50, 1))
    longer = Prompt(prompt.queries, [k * factor for k in prompt.keys], prompt.values, prompt.scaling, prompt.layout)
    assert chosen("keydiff", longer, "0.3") == chosen("keydiff", prompt, "0.3")
    assert chosen("keydiff:block=7", longer, "0.3")[0] == chosen("keydiff:block=7", prompt, "0.3")[0]


def test_bfloat16_keys_are_scored_in_float32() -> None:
    prompt = random_prompt(300, kv_heads=1, group=1, layers=1, dim=64)
    rounded = torch.tensor(prompt.keys[0]).bfloat16()
    exact = Prompt(prompt.queries, [rounded.double().numpy()], prompt.values, prompt.scaling, prompt.layout)
    for text in ("keydiff", "keydiff:block=50"):
        method = build(text)
        ctx = context_for(method, exact, dtype=torch.bfloat16)
        kept = lists(method.select(ctx, budget_for(exact, "0.3")), 1)
        pick = keydiff(exact, 90, block=TEXTS.get(text, 50)).picks[0][0]
        assert not pick.objection(kept[0][0])


@pytest.mark.parametrize("text", TEXTS)
@given(prompt=prompts(), ratio=ratios, strict=st.booleans())
@QUICK
def test_any_prompt_agrees_and_each_head_keeps_its_budget(text: str, prompt: Prompt, ratio: str, strict: bool) -> None:
    check(text, prompt, ratio)
    method, size = build(text), budget_for(prompt, ratio, strict)
    kept = lists(method.select(context_for(method, prompt), size), prompt.kv_heads)
    for head in (head for layer in kept for head in layer):
        assert head == sorted(set(head)) and len(head) == size.per_head and head[-1] == prompt.n - 1
    full = method.select(context_for(method, prompt), budget_for(prompt, "1"))
    assert lists(full, prompt.kv_heads) == [[list(range(prompt.n))] * prompt.kv_heads] * prompt.layers


def test_the_context_is_not_written_to() -> None:
    prompt = random_prompt(40)
    for text in TEXTS:
        method = build(text)
        ctx = context_for(method, prompt)
        before = [k.clone() for k in ctx.keys]
        first = lists(method.select(ctx, Budget.of_size(9, 40, 3, 2)), 2)
        again = lists(method.select(ctx, Budget.of_size(9, 40, 3, 2)), 2)
        assert first == again and all(torch.equal(a, b) for a, b in zip(before, ctx.keys, strict=True))


def test_the_iterative_form_gives_no_scores_away() -> None:
    method = build("keydiff:block=8")
    with pytest.raises(KvcliError, match="evicts in steps"):
        method.scores(context_for(method, random_prompt(20)), 0, 1, 0)  # type: ignore[attr-defined]
