"""The yardstick itself: oracle attention against torch, and comparisons that reject what they must reject."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvcli.methods.catalog import build
from tests.oracles.harness import context_for, select
from tests.oracles.picks import Top, Units
from tests.oracles.prompts import Prompt, budget, cut_window, layout

PromptOf = Callable[..., Prompt]


@pytest.mark.parametrize("group", [1, 2, 4])
def test_oracle_attention_is_torchs(prompt_of: PromptOf, group: int) -> None:
    prompt = prompt_of(17, group)
    for layer in range(prompt.layers):
        q = torch.tensor(prompt.queries[layer])
        k = torch.tensor(prompt.keys[layer]).repeat_interleave(group, 0)
        logits = (q @ k.mT * prompt.scaling).masked_fill(torch.ones(17, 17, dtype=torch.bool).triu(1), float("-inf"))
        np.testing.assert_allclose(prompt.attention[layer], logits.softmax(-1).numpy(), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(prompt.column_sums()[layer], logits.softmax(-1).sum(1).numpy(), rtol=1e-12)
        asked = prompt.positions("question")
        np.testing.assert_allclose(prompt.column_sums("question")[layer], logits.softmax(-1)[:, asked].sum(1).numpy())


@pytest.mark.parametrize("window", [1, 4, 32])
def test_contexts_window_attention_is_the_oracles(prompt_of: PromptOf, window: int) -> None:
    """What methods read from the captured queries is the oracle's attention to float32's precision."""
    prompt = prompt_of(64, 4)
    ctx = context_for(build(f"snapkv:window={window}"), prompt)
    for layer in range(prompt.layers):
        seen = ctx.window_attention(layer, window).numpy()
        np.testing.assert_allclose(seen, prompt.attention[layer][:, 64 - window :], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["shots", "context", "mixed", "union", "open", "plain"])
@pytest.mark.parametrize("n", [1, 2, 5, 17, 64, 65, 200])
def test_layouts_cover_the_prompt(kind: str, n: int) -> None:
    regions = layout(kind, n)
    assert [p for _, start, end, _ in regions for p in range(start, end)] == list(range(n))


def test_top_allows_near_ties_only() -> None:
    pick = Top({9}, {0: 1.0, 1: 2.0, 2: 2.0 - 1e-5, 3: 1.5, 4: 1.5}, 2)
    assert pick.kept() == [1, 2, 9]
    assert not pick.objection([1, 2, 9])
    one = Top({9}, {0: 1.0, 1: 2.0, 2: 2.0 - 1e-5, 3: 1.5, 4: 1.5}, 1)
    assert not one.objection([2, 9])
    assert one.objection([3, 9])
    assert one.objection([1, 2])
    assert one.objection([1, 2, 9])
    tied = Top({9}, {3: 1.5, 4: 1.5}, 1)
    assert tied.kept() == [3, 9]
    assert tied.objection([4, 9])


def test_units_allow_near_ties_only() -> None:
    units = [[0, 1], [2, 3], [4, 5]]
    assert not Units({6}, units, [1.0, 1.0 + 1e-6, 0.5], 3).objection([0, 1, 6])
    assert Units({6}, units, [1.0, 1.1, 0.5], 3).objection([0, 1, 6])
    assert Units({6}, units, [1.0, 1.0, 0.5], 3).objection([2, 3, 6])
    assert Units({6}, units, [1.0, 1.0, 0.5], 4).objection([0, 1, 2, 6])


def test_units_skip_or_stop() -> None:
    units = [[0], [1, 2, 3], [4, 5]]
    assert Units({6}, units, [1.0, 3.0, 2.0], 4).taken() == [1]
    assert Units({6}, units, [1.0, 3.0, 2.0], 3).taken() == [2]
    assert Units({6}, units, [1.0, 3.0, 2.0], 2).taken() == [0]
    assert Units({6}, units, [1.0, 3.0, 2.0], 3, stop=True).taken() == []


def test_window_rule() -> None:
    assert cut_window(32, 100, 100) == (32, False)
    assert cut_window(32, 100, 64) == (32, False)
    assert cut_window(32, 100, 63) == (31, True)
    assert cut_window(32, 100, 1) == (1, True)
    assert cut_window(1, 100, 1) == (1, False)
    assert cut_window(32, 20, 20) == (20, False)
    assert cut_window(32, 100, 10, strict=True) == (32, False)


def test_budget_rule() -> None:
    assert [budget(r, n) for r, n in [("0.1", 1000), ("0.5", 5), ("0.1", 5), ("0.1", 4), ("0.1", 1), ("1", 7)]] == [
        100, 3, 1, 1, 1, 7,
    ]  # fmt: skip


def test_selection_shares_nothing_with_the_oracle(prompt_of: PromptOf) -> None:
    """A wrong setting is seen: the comparison would fail if the method ignored its settings."""
    prompt = prompt_of(200)
    plain, _ = select("snapkv", prompt, "0.3")
    for other in ("snapkv:window=16", "snapkv:kernel=3", "snapkv:pool=avg", "snapkv:reduce=max"):
        assert select(other, prompt, "0.3")[0] != plain, other
