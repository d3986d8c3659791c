"""Properties of selections on arbitrary prompts, layouts, shapes and ratios."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcli.cache.budget import Budget
from kvcli.methods.base import Method
from kvcli.methods.catalog import build, find, names
from tests.oracles.harness import assert_agrees, budget_for, context_for, lists, oracle_answer
from tests.oracles.prompts import Layout, Prompt, random_prompt

DETERMINED = [
    "streaming_llm", "streaming_llm:sinks=9", "h2o", "h2o:reduce=max",
    "snapkv", "snapkv:window=3,kernel=3", "snapkv:pool=avg",
    "pyramidkv", "pyramidkv:window=3,beta=2", "chunkkv", "chunkkv:window=3,chunk=4", "chunkkv:window=2,reuse=2",
    "shotkv", "shotkv:scope=all-layers", "shotkv:queries=question", "shotkv:queries=window,window=3", "shotkv:fit=stop",
    "tova", "scissorhands", "scissorhands:history=5,recent=2", "scope", "scope:prefill=snapkv,window=3",
]  # fmt: skip
RANDOM = ["random", "random:sinks=4,window=8", "random_shot", "random_shot:scope=all-layers", "random_shot:fit=stop"]
QUICK = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def layouts(draw: st.DrawFn, n: int) -> Layout:
    """Any order of regions, shots in one or several places."""
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=8))) if n > 1 else []
    edges = [0, *cuts, n]
    kinds = draw(
        st.lists(
            st.sampled_from(["special", "system", "context", "shot", "shot", "shot", "question"]),
            min_size=len(edges) - 1,
            max_size=len(edges) - 1,
        )
    )
    shot = st.integers(0, 5)
    return [(k, a, b, draw(shot) if k == "shot" else -1) for k, (a, b) in zip(kinds, pairwise(edges), strict=True)]


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    n = draw(st.integers(1, 48))
    made = random_prompt(
        n,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 4])),
        layers=draw(st.integers(1, 4)),
        dim=4,
        seed=draw(st.integers(0, 3)),
    )
    layout = draw(layouts(n))
    return Prompt(made.queries, made.keys, made.values, made.scaling, layout, f"{made.name} {layout}")


ratios = st.integers(1, 100).map(lambda percent: f"{percent / 100:.2f}")


def _kept(method: Method, prompt: Prompt, size: Budget) -> tuple[list[list[list[int]]], frozenset[str]]:
    selection = method.select(context_for(method, prompt), size)
    return lists(selection, prompt.kv_heads), selection.flags


@pytest.mark.parametrize("text", [*DETERMINED, *RANDOM])
@given(prompt=prompts(), ratio=ratios, strict=st.booleans())
@QUICK
def test_a_selection_is_sound(text: str, prompt: Prompt, ratio: str, strict: bool) -> None:
    method, size = build(text), budget_for(prompt, ratio, strict)
    kept, flags = _kept(method, prompt, size)
    assert len(kept) == prompt.layers
    for head in (head for layer in kept for head in layer):
        assert head == sorted(set(head))
        assert head[0] >= 0 and head[-1] == prompt.n - 1
    assert flags <= {"fallback", "over_budget"}
    if size.everything:
        assert kept == [[list(range(prompt.n))] * prompt.kv_heads] * prompt.layers
    per_layer = [sum(map(len, layer)) for layer in kept]
    totals = {"head": [len(h) for layer in kept for h in layer], "layer": per_layer, "model": [sum(per_layer)]}
    largest = max(totals[method.budget_scope])
    assert largest <= size.total(method.budget_scope) or "over_budget" in flags


@pytest.mark.parametrize("text", [*DETERMINED, *RANDOM])
@given(prompt=prompts())
@QUICK
def test_ratio_one_is_the_identity(text: str, prompt: Prompt) -> None:
    kept, flags = _kept(build(text), prompt, budget_for(prompt, "1"))
    assert kept == [[list(range(prompt.n))] * prompt.kv_heads] * prompt.layers
    assert not flags


@pytest.mark.parametrize("text", DETERMINED)
@given(prompt=prompts(), ratio=ratios)
@QUICK
def test_arbitrary_prompts_agree_with_the_oracle(text: str, prompt: Prompt, ratio: str) -> None:
    assert_agrees(text, prompt, ratio)


@pytest.mark.parametrize("text", DETERMINED)
@given(prompt=prompts(), ratio=ratios)
@QUICK
def test_protected_tokens_stay(text: str, prompt: Prompt, ratio: str) -> None:
    kept, _ = _kept(build(text), prompt, budget_for(prompt, ratio))
    picks = oracle_answer(text, prompt, ratio).picks
    for layer, wanted in zip(kept, picks, strict=True):
        for head, pick in zip(layer, wanted, strict=True):
            assert pick.forced <= set(head)


@pytest.mark.parametrize("text", ["random_shot", "random_shot:scope=all-layers", "random_shot:fit=stop"])
@given(prompt=prompts(), ratio=ratios)
@QUICK
def test_random_shot_protects_what_shotkv_protects(text: str, prompt: Prompt, ratio: str) -> None:
    kept, flags = _kept(build(text), prompt, budget_for(prompt, ratio))
    fixed = {*prompt.positions("special", "system", "question"), prompt.n - 1}
    assert all(fixed <= set(head) for layer in kept for head in layer)
    assert ("over_budget" in flags) == (len(fixed) > budget_for(prompt, ratio).per_head)


@pytest.mark.parametrize(
    "text", ["h2o", "snapkv:window=3", "streaming_llm", "random", "tova", "scissorhands:recent=2", "scope:window=3"]
)
@given(prompt=prompts(), ratio=ratios)
@QUICK
def test_per_head_methods_use_the_whole_budget(text: str, prompt: Prompt, ratio: str) -> None:
    size = budget_for(prompt, ratio)
    kept, _ = _kept(build(text), prompt, size)
    assert {len(head) for layer in kept for head in layer} == {size.per_head}


@given(prompt=prompts(), ratio=ratios)
@QUICK
def test_head_order_does_not_matter(prompt: Prompt, ratio: str) -> None:
    """KV heads in another order give the same sets in that order."""
    turn = np.roll(np.arange(prompt.kv_heads), 1)
    q_turn = (turn[:, None] * prompt.group + np.arange(prompt.group)).ravel()
    turned = Prompt(
        [q[q_turn] for q in prompt.queries], [k[turn] for k in prompt.keys], [v[turn] for v in prompt.values],
        prompt.scaling, prompt.layout, prompt.name,
    )  # fmt: skip
    for text in ("h2o", "snapkv:window=3"):
        kept, _ = _kept(build(text), prompt, budget_for(prompt, ratio))
        after, _ = _kept(build(text), turned, budget_for(turned, ratio))
        assert after == [[layer[i] for i in turn] for layer in kept]


def test_every_tier_1_prompt_method_is_held_here() -> None:
    """A method added to tier 1 needs an oracle or a place among the random ones."""
    held = {text.partition(":")[0] for text in [*DETERMINED, *RANDOM]}
    evictors = {name for name in names() if find(name).tier == 1 and find(name).kind == "evict"}
    assert evictors - held <= {"full", "pyramidinfer"}
