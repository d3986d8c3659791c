"""HeadKV: head budgets and kept keys against exact fractions and plain loops."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcli.errors import KvcliError
from kvcli.methods.catalog import build
from kvcli.methods.context import Context
from kvcli.methods.headkv import head_sizes
from kvcli.models.profiles import HeadProfile
from tests.oracles.harness import budget_for, context_for, lists
from tests.oracles.headkv import head_budgets, headkv
from tests.oracles.prompts import Prompt, budget, random_prompt, tied_prompt

RATIOS = ["0.02", "0.1", "0.25", "0.3", "0.5", "0.77", "0.9", "1"]
TEXTS = ["headkv", "headkv:window=4,kernel=3", "headkv:window=5,beta=2,temp=0.5", "headkv:window=3,beta=10,pool=avg",
         "headkv:window=4,head_reduce=max,reduce=max,beta=1.2", "headkv:beta=1,temp=3,window=6",
         "headkv:temp=0,window=4"]  # fmt: skip


def scores_of(prompt: Prompt, seed: int = 0) -> list[list[float]]:
    """Few heads retrieve, many do not, some exactly nothing."""
    rng = random.Random(f"{prompt.name} {seed}")
    return [[rng.choice([0.0, 0.001, rng.random() ** 6]) for _ in range(prompt.heads)] for _ in range(prompt.layers)]


def with_profile(text: str, prompt: Prompt, scores: list[list[float]], per: str = "query") -> Context:
    """A context with the statistics the method names; the pass gives the profile."""
    method = build(text)
    plain = frozenset(n for n in method.needs() if not n.startswith("head_profile"))
    (need,) = method.needs() - plain

    class Plain:
        def needs(self) -> frozenset[str]:
            return plain

    profile = HeadProfile(tuple(map(tuple, scores)), per)
    return dataclasses.replace(context_for(Plain(), prompt), passes={need: lambda: profile})  # type: ignore[arg-type]


def settings_of(text: str) -> dict[str, Any]:
    pairs = (pair.split("=") for pair in text.partition(":")[2].split(",") if pair)
    return {k: int(v) if k in ("window", "kernel") else v for k, v in pairs}


def assert_agrees(text: str, prompt: Prompt, ratio: str, scores: list[list[float]], strict: bool = False) -> None:
    size = budget_for(prompt, ratio, strict)
    selection = build(text).select(with_profile(text, prompt, scores), size)
    wanted = headkv(prompt, budget(ratio, prompt.n), scores, strict=strict, **settings_of(text))
    kept = lists(selection, prompt.kv_heads)
    for layer, (heads, picks) in enumerate(zip(kept, wanted.picks, strict=True)):
        for head, (actual, pick) in enumerate(zip(heads, picks, strict=True)):
            why = pick.objection(actual)
            assert not why, f"{text} on {prompt.name} at {ratio}, layer {layer}, head {head}: {why}"
    assert set(selection.flags) == wanted.flags
    held = sum(len(head) for layer in kept for head in layer)
    assert held == size.model_total or "over_budget" in selection.flags


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("n, group", [(7, 1), (40, 2), (90, 4), (200, 2)])
@pytest.mark.parametrize("text", TEXTS)
def test_kept_keys_are_the_paper_s(prompt_of: Callable[..., Prompt], text: str, n: int, group: int, ratio: str) -> None:
    prompt = prompt_of(n, group)
    assert_agrees(text, prompt, ratio, scores_of(prompt))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_strict_window_may_exceed_the_budget_and_says_so(
    prompt_of: Callable[..., Prompt], ratio: str, strict: bool
) -> None:
    prompt = prompt_of(60)
    assert_agrees("headkv:window=20", prompt, ratio, scores_of(prompt), strict)


@pytest.mark.parametrize("scores", [0.0, 0.25])
@pytest.mark.parametrize("ratio", RATIOS)
def test_equal_heads_and_equal_keys(ratio: str, scores: float) -> None:
    """Heads that do not differ (or do not retrieve) share evenly, and of equal keys the first stay."""
    prompt = tied_prompt(30)
    assert_agrees("headkv:window=4", prompt, ratio, [[scores] * prompt.heads] * prompt.layers)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    scores=st.lists(st.sampled_from([0.0, 1e-9, 0.01, 0.3, 0.3, 7.0, 1e30]), min_size=1, max_size=12),
    free=st.integers(0, 60), more=st.integers(0, 60), beta=st.sampled_from(["1", "1.005", "1.5", "2", "20"]),
    temp=st.sampled_from(["0", "0.5", "1", "2"]),
)  # fmt: skip
def test_shares_add_up_and_stay_within_what_a_head_can_hold(
    scores: list[float], free: int, more: int, beta: str, temp: str
) -> None:
    most = free + more
    ideal = head_sizes(scores, free, most, float(beta), float(temp))
    assert sum(ideal) == pytest.approx(free * len(scores), abs=1e-6)
    assert all(-1e-9 <= x <= most + 1e-9 for x in ideal)
    least = free - free / float(beta)
    assert all(x >= least - 1e-9 for x in ideal), "every head has its own part"
    exact = head_budgets(scores, free, most, beta, temp)
    assert sum(exact) == free * len(scores)
    for x, whole in zip(ideal, exact, strict=True):
        assert abs(x - whole) < 1 + 1e-6


def test_the_window_lies_inside_the_budget() -> None:
    """A public implementation keeps it on top: 136 pairs at a nominal 128."""
    prompt = random_prompt(300, layers=2)
    scores = scores_of(prompt)
    size = dataclasses.replace(budget_for(prompt, "1"), per_head=128, ratio=None)
    kept = lists(build("headkv:window=8").select(with_profile("headkv:window=8", prompt, scores), size), 2)
    assert sum(len(head) for layer in kept for head in layer) == 128 * 2 * 2
    assert all(head[-8:] == list(range(292, 300)) for layer in kept for head in layer)


def test_a_head_that_retrieves_gets_more_over_all_layers() -> None:
    prompt = random_prompt(100, layers=3)
    scores = [[0.1] * 4, [0.1] * 4, [0.1, 0.1, 5.0, 0.1]]
    kept = lists(
        build("headkv:window=4").select(with_profile("headkv:window=4", prompt, scores), budget_for(prompt, "0.3")), 2
    )
    sizes = [len(head) for layer in kept for head in layer]
    assert sizes[5] == 100, "more than it can hold"
    assert max(sizes[:5]) < 30
    even = build("headkv:window=4,temp=0")
    kept = lists(even.select(with_profile("headkv:window=4", prompt, scores), budget_for(prompt, "0.3")), 2)
    assert {len(head) for layer in kept for head in layer} == {30}


def test_scores_of_a_sweep_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompt(80)
    asked: list[int] = []
    original = Context.window_attention
    monkeypatch.setattr(Context, "window_attention", lambda c, layer, w: asked.append(w) or original(c, layer, w))
    ctx = with_profile("headkv:window=4", prompt, scores_of(prompt))
    for ratio in ("0.2", "0.3", "0.5", "0.9"):
        build("headkv:window=4").select(ctx, budget_for(prompt, ratio))
    assert len(asked) == prompt.layers


def test_a_profile_of_another_shape_is_refused() -> None:
    prompt = random_prompt(20)
    for scores in ([[0.1] * 4] * 2, [[0.1] * 2] * 3):
        with pytest.raises(KvcliError, match="head profile is of"):
            build("headkv").select(with_profile("headkv", prompt, scores), budget_for(prompt, "0.5"))


def test_a_path_is_part_of_what_it_asks_for() -> None:
    assert build("headkv").needs() == {"window:32", "head_profile"}
    assert build("headkv:profile=./a=b/p.json").needs() == {"window:32", "head_profile:./a=b/p.json"}


def test_trained_gates_count_per_kv_head() -> None:
    """A number per KV head is taken as it is."""
    prompt = random_prompt(60, layers=2)
    per_kv = [[0.0, 1.0], [0.25, 0.5]]
    twice = [[x for x in row for _ in range(2)] for row in per_kv]
    size = budget_for(prompt, "0.4")
    one = build("headkv:window=4").select(with_profile("headkv:window=4", prompt, per_kv, "kv"), size)
    two = build("headkv:window=4").select(with_profile("headkv:window=4", prompt, twice), size)
    assert lists(one, 2) == lists(two, 2)
    assert all(isinstance(head, torch.Tensor) for layer in one.kept for head in layer)
