"""Prompt-phase methods, index for index, against the slow loops in tests/oracles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.oracles.harness import assert_agrees, assert_agrees_exactly, select
from tests.oracles.prompts import Array, Prompt, random_prompt, tied_prompt

PromptOf = Callable[..., Prompt]

RATIOS = [f"0.{i}" for i in range(1, 10)] + ["0.25", "0.02", "1"]
LENGTHS = [5, 17, 64, 65, 200]
GROUPS = [1, 2, 4]
WINDOWED = [
    "snapkv", "snapkv:window=8", "snapkv:window=1,kernel=1", "snapkv:window=16,kernel=5,pool=avg",
    "snapkv:window=4,kernel=3,reduce=max", "snapkv:window=64,kernel=99",
    "pyramidkv", "pyramidkv:window=32,pool=avg", "pyramidkv:window=4,kernel=3,beta=2", "pyramidkv:beta=1,reduce=max",
    "chunkkv", "chunkkv:window=4", "chunkkv:window=8,chunk=3", "chunkkv:window=8,reuse=2", "chunkkv:window=1,chunk=1",
    "scope:prefill=snapkv", "scope:prefill=snapkv,reduce=max,window=4",
    "scissorhands", "scissorhands:history=7", "scissorhands:history=50,recent=1,reduce=max",
]  # fmt: skip
POSITIONAL = ["streaming_llm", "streaming_llm:sinks=0", "streaming_llm:sinks=1", "streaming_llm:sinks=20"]
LAST = ["tova"]
SUMMED = ["h2o", "h2o:reduce=max", "scope", "scope:reduce=max,window=3"]
SHOTS = [
    "shotkv", "shotkv:scope=all-layers", "shotkv:queries=question", "shotkv:fit=stop",
    "shotkv:scope=all-layers,queries=question,fit=stop",
]  # fmt: skip
WINDOWED_SHOTS = ["shotkv:queries=window", "shotkv:queries=window,window=3,scope=all-layers"]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("text", [*POSITIONAL, *SUMMED, *LAST, *WINDOWED])
def test_tokens_agree(prompt_of: PromptOf, text: str, group: int, n: int) -> None:
    for ratio in RATIOS:
        assert_agrees(text, prompt_of(n, group), ratio)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("text", [*WINDOWED, "scope"])
def test_strict_windows_agree(prompt_of: PromptOf, text: str, n: int) -> None:
    """--strict-window keeps the whole window and says over_budget instead of cutting."""
    for ratio in RATIOS:
        assert_agrees(text, prompt_of(n, 2), ratio, strict=True)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("regions", ["shots", "context", "mixed", "union", "open", "plain"])
@pytest.mark.parametrize("text", [*SHOTS, *WINDOWED_SHOTS])
def test_shots_agree(prompt_of: PromptOf, text: str, regions: str, n: int) -> None:
    for ratio in RATIOS:
        for group in (1, 2) if n < 200 else (4,):
            assert_agrees(text, prompt_of(n, group, regions), ratio)


@pytest.mark.parametrize("text", [*SUMMED, *SHOTS])
def test_float32_sums_agree(prompt_of: PromptOf, text: str) -> None:
    """As the engine captures them: float32."""
    for ratio in RATIOS:
        assert_agrees(text, prompt_of(65, 4), ratio, dtype=torch.float32)


@pytest.mark.parametrize("layers", [1, 2, 5, 12])
@pytest.mark.parametrize("text", ["pyramidkv", "chunkkv:window=8,reuse=3", "shotkv:scope=all-layers"])
def test_depth_agrees(text: str, layers: int) -> None:
    prompt = random_prompt(65, kv_heads=1, group=2, layers=layers, seed=3)
    for ratio in RATIOS:
        assert_agrees(text, prompt, ratio)


@pytest.mark.parametrize("kv_heads, group", [(1, 1), (1, 8), (8, 1), (3, 2)])
@pytest.mark.parametrize(
    "text", ["h2o", "snapkv:window=8", "pyramidkv", "chunkkv:window=8", "shotkv", "tova", "scissorhands", "scope"]
)
def test_head_shapes_agree(text: str, kv_heads: int, group: int) -> None:
    prompt = random_prompt(40, kv_heads=kv_heads, group=group, layers=2, seed=4)
    for ratio in RATIOS:
        assert_agrees(text, prompt, ratio)


# Ties: scores exact in any precision, so the position alone decides and nothing is tolerated.


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", ["snapkv", "pyramidkv"])
def test_even_attention_ties_by_position(kind: str, n: int) -> None:
    """Zero keys: all keys tie; a window of two sums two equal numbers, without rounding differences."""
    for window in (1, 2):
        for ratio in RATIOS:
            assert_agrees_exactly(f"{kind}:window={window}", tied_prompt(n), ratio)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("text", ["tova", "scissorhands", "scissorhands:history=3", "scope:prefill=snapkv,window=2"])
def test_even_attention_is_nobodys_favour(text: str, n: int) -> None:
    """An even share is not below 1/t: all keys tie, and the first stay."""
    for ratio in RATIOS:
        assert_agrees_exactly(text, tied_prompt(n), ratio)


@pytest.mark.parametrize("n", [4, 16, 64, 256])
@pytest.mark.parametrize("chunk", [3, 10, 16])
def test_even_chunks_tie_by_position(chunk: int, n: int) -> None:
    """One query spreads 1/n, a power of two: the means of chunks of any length are exactly equal."""
    for ratio in RATIOS:
        assert_agrees_exactly(f"chunkkv:window=1,chunk={chunk}", tied_prompt(n), ratio)


def test_ties_keep_the_first_positions() -> None:
    kept, _ = select("snapkv:window=2", tied_prompt(20), "0.5")
    assert kept == [[[0, 1, 2, 3, 4, 5, 6, 7, 18, 19]] * 2] * 2
    kept, _ = select("chunkkv:window=2,chunk=3", tied_prompt(20), "0.5")
    assert kept == [[[0, 1, 2, 3, 4, 5, 18, 19]] * 2] * 2
    even = [np.ones((4, 20))] * 2
    kept, _ = select("h2o", tied_prompt(20), "0.5", column_sums=even)
    assert kept == [[[0, 1, 2, 3, 4, 15, 16, 17, 18, 19]] * 2] * 2


def _few_values(prompt: Prompt, seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 3, (prompt.heads, prompt.n)).astype(float) for _ in range(prompt.layers)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("text", SUMMED)
def test_tied_sums_by_position(text: str, n: int, dtype: torch.dtype) -> None:
    for seed in range(3):
        prompt = tied_prompt(n)
        for ratio in RATIOS:
            assert_agrees_exactly(text, prompt, ratio, column_sums=_few_values(prompt, seed), dtype=dtype)


@pytest.mark.parametrize("regions", ["shots", "context", "mixed", "union"])
@pytest.mark.parametrize("text", SHOTS)
def test_tied_units_by_position(text: str, regions: str) -> None:
    """One value per prompt, so that all units tie at their mean: the earliest that fit are taken."""
    for n in LENGTHS:
        prompt = tied_prompt(n, regions=regions)
        for ratio in RATIOS:
            for value in (0.0, 1.0):
                sums = [np.full((prompt.heads, n), value)] * prompt.layers
                assert_agrees_exactly(text, prompt, ratio, column_sums=sums)
