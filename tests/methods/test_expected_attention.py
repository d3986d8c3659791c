"""Expected attention: against plain loops, and on a real model against queries projected by the model itself."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.attention.capture import Needs
from kvcli.attention.moments import Moments
from kvcli.cache.budget import Budget
from kvcli.errors import KvcliError
from kvcli.methods.catalog import build
from kvcli.methods.context import Context
from kvcli.models.rope import RopeHandle
from tests.engine import tiny
from tests.oracles.expected_attention import expected_attention, moments
from tests.oracles.harness import budget_for, lists
from tests.oracles.prompts import Prompt, budget, random_prompt

RATIOS = ["0.02", "0.1", "0.25", "0.3", "0.5", "0.77", "0.9", "1"]
FREQUENCIES = [1.0, 0.3, 0.05, 0.002]
TEXTS = {
    "expected_attention": {},
    "expected_attention:sinks=0,future=1": {"sinks": 0, "future": 1},
    "expected_attention:covariance=false": {"covariance": "false"},
    "expected_attention:vnorm=false,future=7": {"vnorm": "false", "future": 7},
    "expected_attention:epsilon=0.01,sinks=20": {"epsilon": 0.01, "sinks": 20},
}


def context_of(
    prompt: Prompt, first: int, frequencies: list[float] = FREQUENCIES, dtype: torch.dtype = torch.float64
) -> Context:
    """Queries of the prompt stand for those before RoPE; their moments are the oracle's."""
    found = []
    for queries in prompt.queries:
        both = [moments(head, first) for head in queries]
        count = torch.tensor(max(0, prompt.n - first), dtype=dtype)
        mean, cov = (torch.tensor(np.stack(x), dtype=dtype) for x in zip(*both, strict=True))
        found.append(Moments(count, mean, cov * count))
    return Context(
        n=prompt.n, heads=prompt.heads, kv_heads=prompt.kv_heads, token_ids=list(range(prompt.n)), regions=[],
        keys=[torch.tensor(k, dtype=dtype) for k in prompt.keys],
        values=[torch.tensor(v, dtype=dtype) for v in prompt.values], column_sums={}, window_queries=[],
        scaling=[prompt.scaling] * prompt.layers, sample_id="s", seed=0, moments={first: found},
        rope=RopeHandle(torch.tensor(frequencies, dtype=torch.float64)),
    )  # fmt: skip


def assert_agrees(text: str, prompt: Prompt, ratio: str, *, strict: bool = False, **more: Any) -> None:
    frequencies = more.pop("frequencies", FREQUENCIES)
    wanted = TEXTS[text]
    context = context_of(prompt, wanted.get("sinks", 4), frequencies, **more)
    selection = build(text).select(context, budget_for(prompt, ratio, strict))
    answer = expected_attention(prompt, budget(ratio, prompt.n), frequencies, strict=strict, **wanted)
    for layer, picks in zip(lists(selection, prompt.kv_heads), answer.picks, strict=True):
        for head, pick in zip(layer, picks, strict=True):
            assert not pick.objection(head), f"{text} on {prompt.name} at {ratio}: {pick.objection(head)}"
            assert pick.forced <= set(head)
    assert selection.flags == answer.flags


@pytest.mark.parametrize("n", [1, 3, 5, 17, 65])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("text", TEXTS)
def test_selection_agrees_with_plain_loops(text: str, group: int, n: int) -> None:
    """Also where sinks do not fit into half of the budget, and where no query is left behind them."""
    prompt = random_prompt(n, group=group, layers=2)
    for ratio in RATIOS:
        assert_agrees(text, prompt, ratio)
        assert_agrees(text, prompt, ratio, strict=True)


def test_float32_statistics_agree() -> None:
    for ratio in RATIOS:
        assert_agrees("expected_attention", random_prompt(65, layers=2), ratio, dtype=torch.float32)


def test_heads_that_turn_in_part_agree() -> None:
    """A family that rotates the first dimensions of each head only."""
    for ratio in RATIOS:
        assert_agrees("expected_attention", random_prompt(40, layers=2), ratio, frequencies=FREQUENCIES[:3])


@given(n=st.integers(1, 30), kv_heads=st.integers(1, 3), percent=st.integers(1, 100), seed=st.integers(0, 9),
       text=st.sampled_from(list(TEXTS)))  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_arbitrary_prompts_agree(n: int, kv_heads: int, percent: int, seed: int, text: str) -> None:
    assert_agrees(text, random_prompt(n, kv_heads=kv_heads, layers=1, seed=seed), f"{percent / 100:.2f}")


def test_ties_keep_the_first_positions() -> None:
    """Equal keys and values: every key is expected alike."""
    zero = np.zeros((2, 20, 8))
    prompt = random_prompt(20, layers=1)
    tied = Prompt(prompt.queries, [zero], [zero + 1], 0.5, [], "tied")
    selection = build("expected_attention").select(context_of(tied, 4), budget_for(tied, "0.5"))
    assert lists(selection, 2) == [[[0, 1, 2, 3, 4, 5, 6, 7, 8, 19]] * 2]


def test_scores_are_made_once_for_all_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, method = random_prompt(60, layers=2), build("expected_attention")
    context, made = context_of(prompt, 4), []
    own = type(method)._scores
    monkeypatch.setattr(type(method), "_scores", lambda *a: made.append(a[2]) or own(*a))
    for percent in range(30, 100, 10):
        method.select(context, budget_for(prompt, f"0.{percent}"))
    assert made == [0, 1]


def test_the_prefill_names_only_what_the_method_reads() -> None:
    assert build("expected_attention").needs() == {"q_moments:4"}
    assert build("expected_attention:sinks=0").needs() == {"q_moments:0"}


def test_a_model_without_rotary_positions_is_refused() -> None:
    prompt = random_prompt(20)
    context = context_of(prompt, 4)
    context.rope = None
    with pytest.raises(KvcliError, match="no rotary positions"):
        build("expected_attention").select(context, budget_for(prompt, "0.5"))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("cut", [0, 2, 50])
def test_scores_of_a_real_model_are_those_of_its_own_projections(
    kv_heads: int, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From prompt to scores, with and without a shared prefix: queries are q_proj's, rotations the model's module's."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    model, n = tiny.tiny_llama(torch.float64, kv_heads=kv_heads), 90
    ids, method = tiny.prompt(n, 1).ids, build("expected_attention")
    needs = Needs.of(method.needs())
    prefix = model.prefill([ids[:cut]], needs, [0]).dense(0) if cut else None
    done = model.prefill([ids[cut:]], needs, [0], prefix)
    dense = done.dense(0)
    context = Context(
        n=n, heads=4, kv_heads=kv_heads, token_ids=ids, regions=[], keys=dense.keys, values=dense.values,
        column_sums={}, window_queries=[], scaling=done.capture.scaling, sample_id="s", seed=0, rope=model.rope,
        moments=dense.moments,
    )  # fmt: skip
    projected: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda m, i, out: projected.append(out[0].double()))
        for layer in model.hf.model.layers
    ]
    with torch.no_grad():
        model.hf(torch.tensor([ids]), use_cache=False)
        cos, sin = model.hf.model.rotary_emb(projected[0][None], torch.arange(n, n + 512)[None])
    for hook in hooks:
        hook.remove()
    cos, sin = cos[0].mean(0), sin[0].mean(0)
    dim = cos.shape[0]
    swap = torch.zeros(dim, dim, dtype=torch.float64)
    for j in range(dim // 2):
        swap[j, dim // 2 + j], swap[dim // 2 + j, j] = -1.0, 1.0
    rotation = torch.diag(cos) + torch.diag(sin) @ swap
    for layer, states in enumerate(projected):
        scores = method.scores(context, layer, 1, 4)  # type: ignore[attr-defined]
        queries = states[4:].view(n - 4, 4, dim)
        for g in range(kv_heads):
            total = torch.zeros(n - 4, dtype=torch.float64)
            keys = dense.keys[layer][g, 4:]
            for h in range(g * 4 // kv_heads, (g + 1) * 4 // kv_heads):
                mean, cov = rotation @ queries[:, h].mean(0), rotation @ queries[:, h].T.cov(correction=0) @ rotation.T
                logits = keys @ mean / math.sqrt(dim) + (keys @ cov * keys).sum(1) / dim / 2
                total += logits.softmax(0) / (4 // kv_heads)
            truth = (total * dense.values[layer][g, 4:].norm(dim=1))[:-1]
            torch.testing.assert_close(scores[g], truth, atol=0, rtol=1e-4)


def test_two_prompts_in_a_row_do_not_mix() -> None:
    method = build("expected_attention")

    def kept(n: int) -> list[list[list[int]]]:
        prompt = random_prompt(n, layers=2)
        size = Budget.of_ratio(Decimal("0.4"), n, 2, 2)
        return lists(method.select(context_of(prompt, 4), size), 2)

    first = kept(50)
    kept(31)
    assert kept(50) == first
