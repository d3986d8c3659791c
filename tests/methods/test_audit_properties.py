"""One property test for every method that evicts: totals at its scope, what it protects, sorted and unique positions,
and the identity at ratio 1, on arbitrary prompts with all statistics that a method may name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcli.attention.moments import Moments
from kvcli.cache.budget import Budget
from kvcli.engine.needs import GIVEN, HANDLES, PASSES
from kvcli.methods.base import Method
from kvcli.methods.catalog import build, find, own_names
from kvcli.methods.context import Context
from kvcli.models.answering import Answered
from kvcli.models.profiles import HeadProfile
from kvcli.models.reconstruction import Reconstruction
from kvcli.models.rope import RopeHandle
from tests.methods.test_method_properties import prompts, ratios
from tests.oracles.expected_attention import moments
from tests.oracles.harness import budget_for, context_for, lists
from tests.oracles.kvzip import repeated
from tests.oracles.prompts import Prompt, cut_window

QUICK = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
Protected = Callable[[Prompt, Budget], set[int]]


class Plain:
    """Stands for a method that names only what `context_for` can give."""

    def __init__(self, needs: frozenset[str]) -> None:
        self._needs = needs

    def needs(self) -> frozenset[str]:
        return self._needs


def outside(need: str) -> bool:
    return need in PASSES or need in HANDLES or need.startswith("q_moments") or GIVEN.fullmatch(need) is not None


def whole_context(method: Method, prompt: Prompt) -> Context:
    """All that the engine gives: statistics as the oracle computes them, random numbers for what a model answers."""
    needs = method.needs()
    ctx = context_for(Plain(frozenset(n for n in needs if not outside(n))), prompt)  # type: ignore[arg-type]
    rng = np.random.default_rng([prompt.n, prompt.heads])
    start, end = repeated(prompt.layout)
    per_head = [torch.tensor(rng.random((prompt.heads, prompt.n))) for _ in range(prompt.layers)]
    per_kv = [torch.tensor(rng.random((prompt.kv_heads, prompt.n))) for _ in range(prompt.layers)]
    profile = HeadProfile(tuple(tuple(rng.random(prompt.heads)) for _ in range(prompt.layers)))
    passes = {
        "reconstruction": lambda: Reconstruction(per_kv, start, end, chunks=1, worded=True),
        "answer": lambda: Answered(per_head, 3),
        "bands": lambda: lambda width: [band(torch.tensor(a), width) for a in prompt.attention],
        **{need: lambda: profile for need in needs if need.startswith("head_profile")},
    }
    width, dim = prompt.heads * prompt.values[0].shape[2], prompt.keys[0].shape[2]
    matrix = torch.tensor(rng.standard_normal((6, width)))
    first = [int(n.partition(":")[2] or 0) for n in needs if n.startswith("q_moments")]
    return dataclasses.replace(
        ctx, passes=passes, o_proj=lambda layer: matrix, token_text=lambda i: (".", "a", " ")[i % 3],
        rope=RopeHandle(1e4 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)),
        moments={f: [_moments(prompt, layer, f) for layer in range(prompt.layers)] for f in first}, _made={},
    )  # fmt: skip


def band(attention: torch.Tensor, width: int) -> torch.Tensor:
    """[H, n] of [H, n, n]: only queries less than `width` behind the key."""
    n = attention.shape[1]
    behind = torch.arange(n)[:, None] - torch.arange(n)
    return (attention * ((behind >= 0) & (behind < width))).sum(1)


def _moments(prompt: Prompt, layer: int, first: int) -> Moments:
    both = [moments(head, first) for head in prompt.queries[layer]]
    count = torch.tensor(max(0, prompt.n - first), dtype=torch.float64)
    mean, covariance = (torch.tensor(np.stack(x)) for x in zip(*both, strict=True))
    return Moments(count, mean, covariance * count)


def newest(count: int) -> Protected:
    """The newest tokens, at most half of the budget."""

    def protected(prompt: Prompt, size: Budget) -> set[int]:
        window, _ = cut_window(count, prompt.n, size.per_head, size.strict_window)
        return set(range(prompt.n - window, prompt.n))

    return protected


def ends(sinks: int) -> Protected:
    """First tokens, at most half of the budget, beside the newest one."""

    def protected(prompt: Prompt, size: Budget) -> set[int]:
        room = max(1, size.per_head // 2) - 1
        first = sinks if size.strict_window or size.everything else min(sinks, room)
        return {*range(max(0, min(first, prompt.n - 1))), prompt.n - 1}

    return protected


def recent_half(prompt: Prompt, size: Budget) -> set[int]:
    return set(range(prompt.n - max(1, size.per_head // 2), prompt.n))


def named_regions(prompt: Prompt, size: Budget) -> set[int]:
    return {*prompt.positions("system", "question", "special"), prompt.n - 1}


def special(prompt: Prompt, size: Budget) -> set[int]:
    return {*prompt.positions("special"), prompt.n - 1}


def partitions(sinks: int, lag: int) -> Protected:
    """LagKV's sinks, last whole partition and rest, whatever the budget."""

    def protected(prompt: Prompt, size: Budget) -> set[int]:
        first = min(sinks, prompt.n - 1)
        compressed = max(0, (prompt.n - first) // lag - 1) * lag
        return {*range(first), *range(first + compressed, prompt.n)}

    return protected


def windows(sinks: int, recent: int) -> Protected:
    """DuoAttention's: never cut."""

    def protected(prompt: Prompt, size: Budget) -> set[int]:
        return {p for p in range(prompt.n) if p < sinks or p >= prompt.n - recent}

    return protected


HELD: dict[str, Protected] = {
    "random": newest(1), "random:window=4": newest(4), "random_shot": named_regions, "streaming_llm": newest(1),
    "h2o": recent_half, "snapkv:window=3": newest(3), "pyramidkv:window=3": newest(3), "chunkkv:window=3": newest(3),
    "shotkv": named_regions, "shotkv:scope=all-layers": named_regions, "adakv:base.window=3": newest(3),
    "adakv:base=h2o": recent_half, "adakv:base=oracle,rule=safeguard": newest(1), "adakv:base=knorm": newest(1),
    "adakv:base=expected_attention,base.sinks=2": ends(2), "adakv:base=pyramidkv,base.window=2": newest(2),
    "adakv:base=lagkv,base.sinks=2,base.lag=4": partitions(2, 4), "criticalkv:base.window=3": newest(3),
    "criticalkv:heads=adaptive,base.window=3": newest(3), "criticalkv:base=h2o": recent_half,
    "criticalkv:base=oracle": newest(1), "criticalkv:base=expected_attention,base.vnorm=false": ends(4),
    "headkv:window=3": newest(3), "duo_attention:sinks=2,recent=5": windows(2, 5), "tova": newest(1),
    "scissorhands:recent=3": newest(3), "knorm": newest(1), "knorm:skip_layers=none": newest(1), "keydiff": newest(1),
    "keydiff:block=5": newest(1), "lagkv:sinks=2,lag=4": partitions(2, 4), "expected_attention": ends(4),
    "kvzip": newest(1), "scope:window=3": newest(3), "scope:prefill=snapkv,window=2": newest(2),
    "rkv:window=3": newest(3), "oracle": newest(1), "fastgen:recovery=0.5": special,
    "snapkv:window=3+merge": newest(3), "h2o+merge:style=cam+quant": recent_half, "tova+kivi": newest(1),
}  # fmt: skip
UNITS = ("shotkv", "random_shot", "chunkkv", "duo_attention", "lagkv", "adakv:base=lagkv")
"""These keep whole units or whole heads, or have a floor: a total below or above the budget is theirs."""
NO_RATIO = ("fastgen",)


def kept_of(method: Method, prompt: Prompt, size: Budget) -> tuple[list[list[list[int]]], frozenset[str]]:
    selection = method.select(whole_context(method, prompt), size)
    return lists(selection, prompt.kv_heads), selection.flags


def totals(kept: list[list[list[int]]], scope: str) -> set[int]:
    layers = [sum(map(len, layer)) for layer in kept]
    return {"head": {len(h) for layer in kept for h in layer}, "layer": set(layers), "model": {sum(layers)}}[scope]


@pytest.mark.parametrize("text", HELD)
@given(prompt=prompts(), ratio=ratios, strict=st.booleans())
@QUICK
def test_totals_protected_tokens_and_order(text: str, prompt: Prompt, ratio: str, strict: bool) -> None:
    method, size = build(text), budget_for(prompt, ratio, strict)
    kept, flags = kept_of(method, prompt, size)
    assert len(kept) == prompt.layers and {len(layer) for layer in kept} == {prompt.kv_heads}
    protected = HELD[text](prompt, size)
    for head in (head for layer in kept for head in layer):
        assert all(a < b for a, b in pairwise(head)), "sorted, none twice"
        assert head[0] >= 0 and head[-1] == prompt.n - 1
        assert protected <= set(head)
    if method.domain.kind == "none":
        assert text.startswith(NO_RATIO)
        return
    found, limit = totals(kept, method.budget_scope), size.total(method.budget_scope)
    if text.startswith(UNITS):
        assert max(found) <= limit or "over_budget" in flags
    else:
        assert found == {limit} or (max(found) > limit and strict and "over_budget" in flags)


@pytest.mark.parametrize("text", [text for text in HELD if not text.startswith(NO_RATIO)])
@given(prompt=prompts(), strict=st.booleans())
@QUICK
def test_ratio_one_is_the_identity(text: str, prompt: Prompt, strict: bool) -> None:
    kept, flags = kept_of(build(text), prompt, budget_for(prompt, "1", strict))
    assert kept == [[list(range(prompt.n))] * prompt.kv_heads] * prompt.layers
    assert not flags & {"over_budget", "unreachable"}


def test_every_method_that_evicts_is_held_here() -> None:
    evictors = {name for name in own_names() if find(name).kind == "evict"}
    assert evictors - {text.partition(":")[0].partition("+")[0] for text in HELD} == {"full"}
