"""One test for each known trap that concerns the prompt-phase methods of tier 1."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
import torch

from kvcli.cache.budget import Budget
from kvcli.errors import KvcliError
from kvcli.methods.catalog import build
from tests.oracles.h2o import h2o
from tests.oracles.harness import assert_agrees, budget_for, context_for, lists, oracle_answer, select
from tests.oracles.prompts import Prompt, budget, random_prompt, tied_prompt
from tests.oracles.pyramidkv import layer_budgets

TIER1 = [
    "random", "random_shot", "streaming_llm", "h2o", "snapkv:window=8", "pyramidkv", "chunkkv:window=8", "shotkv",
    "shotkv:queries=question", "shotkv:scope=all-layers",
]  # fmt: skip


def _sizes(kept: list[list[list[int]]]) -> list[int]:
    return [len(layer[0]) for layer in kept]


# "float truncation loses a token (int(1000 * (1 - 0.9)) = 99)"


def test_ratio_rounds_half_up_on_exact_decimals() -> None:
    assert int(1000 * (1 - 0.9)) == 99
    assert Budget.of_ratio(Decimal("0.1"), 1000, 1, 1).per_head == 100
    for n in range(1, 300):
        for percent in range(1, 101):
            ratio = f"{percent / 100:.2f}"
            assert Budget.of_ratio(Decimal(ratio), n, 1, 1).per_head == budget(ratio, n), (n, ratio)


@pytest.mark.parametrize("text", ["streaming_llm", "random", "snapkv", "pyramidkv", "h2o"])
def test_a_tenth_of_a_thousand_is_a_hundred(text: str) -> None:
    prompt = random_prompt(1000, kv_heads=1, group=1, layers=2, dim=2)
    kept, _ = select(text, prompt, "0.1", column_sums=[np.ones((1, 1000))] * 2)
    assert sum(_sizes(kept)) == 200
    assert text == "pyramidkv" or _sizes(kept) == [100, 100]


# "PyramidKV silently equals SnapKV in kvpress for every kept ratio < 0.5 up to 2,048 tokens"; "Conserve the sum."


@pytest.mark.parametrize("n, layers", [(200, 3), (900, 16), (2048, 32)])
def test_pyramidkv_is_not_snapkv(n: int, layers: int) -> None:
    prompt = random_prompt(n, kv_heads=1, group=1, layers=layers, dim=2)
    for ratio in ("0.1", "0.3", "0.49"):
        pyramid, flags = select("pyramidkv", prompt, ratio)
        flat, _ = select("snapkv:window=8", prompt, ratio)
        sizes = _sizes(pyramid)
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > budget(ratio, n) > sizes[-1]
        assert sum(sizes) == sum(_sizes(flat)) == layers * budget(ratio, n)
        assert not flags


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7, 16, 28, 32])
def test_pyramidkv_conserves_the_total(layers: int) -> None:
    """Every layer's budget is the exact pyramid's, for sizes up to the whole prompt; the total never moves."""
    n, window = 150, 8
    for text, beta in (
        ("pyramidkv", "20"),
        ("pyramidkv:beta=2", "2"),
        ("pyramidkv:beta=1", "1"),
        ("pyramidkv:beta=3", "3"),
    ):
        prompt = random_prompt(n, kv_heads=1, group=1, layers=layers, dim=1)
        method = build(text)
        ctx = context_for(method, prompt)
        for size in [16, 17, 23, 24, 40, 64, 79, 80, 81, 120, 149, 150]:
            selection = method.select(ctx, Budget.of_size(size, n, layers, 1))
            sizes = _sizes(lists(selection, 1))
            assert sum(sizes) == layers * size, (text, size)
            assert max(sizes) <= n and min(sizes) >= window
            wanted = layer_budgets(layers, size - window, n - window, beta)
            assert sizes == [window + w for w in wanted], (text, size)


def test_pyramid_of_the_oracle() -> None:
    """The oracle's own budgets: by hand, and the sum, over many shapes."""
    assert layer_budgets(3, 20, 100, 20) == [39, 20, 1]
    assert layer_budgets(3, 20, 30, 20) == [30, 20, 10]
    assert layer_budgets(2, 10, 100, 20) == [20, 0]
    assert layer_budgets(5, 7, 100, 1) == [7, 7, 7, 7, 7]
    for layers in range(1, 34):
        for free in range(60):
            sizes = layer_budgets(layers, free, 60, 20)
            assert sum(sizes) == layers * free and min(sizes) >= 0 and max(sizes) <= 60


def test_pyramidkv_at_a_nominal_128_measures_128() -> None:
    """KVCache-Factory's integer division measures 133.5 here."""
    prompt = random_prompt(1024, kv_heads=1, group=1, layers=32, dim=1)
    method = build("pyramidkv")
    kept = lists(method.select(context_for(method, prompt), Budget.of_size(128, 1024, 32, 1)), 1)
    assert Fraction(sum(_sizes(kept)), 32) == 128


# "SnapKV padding its window with the maximum score: ties evict the window. Take the window out of the contest."


@pytest.mark.parametrize(
    "text, window", [("snapkv", 32), ("snapkv:window=8,pool=avg", 8), ("pyramidkv", 8), ("chunkkv:window=16", 16)]
)
def test_ties_never_evict_the_window(text: str, window: int) -> None:
    for n in (40, 65, 200):
        for ratio in ("0.02", "0.1", "0.3", "0.5", "0.9"):
            kept, _ = select(text, tied_prompt(n), ratio)
            w = min(window, max(1, budget(ratio, n) // 2))
            assert all(head[-w:] == list(range(n - w, n)) for layer in kept for head in layer), (n, ratio)


# "'H2O' with a non-causal softmax"; "a column mean without recent tokens (ObservedAttention): none of them is H2O."


def _noncausal_sums(prompt: Prompt) -> list[np.ndarray]:
    out = []
    for q, k in zip(prompt.queries, prompt.keys, strict=True):
        logits = torch.tensor(q) @ torch.tensor(k).repeat_interleave(prompt.group, 0).mT * prompt.scaling
        out.append(logits.softmax(-1).sum(1).numpy())
    return out


def test_h2o_sums_causal_attention() -> None:
    prompt = random_prompt(64)
    kept, _ = select("h2o", prompt, "0.3")
    causal = h2o(prompt, budget("0.3", 64)).kept()
    seen_by = np.arange(64, 0, -1)
    means = [sums / seen_by for sums in prompt.column_sums()]
    assert kept == causal
    for other in (_noncausal_sums(prompt), means):
        assert h2o(prompt, budget("0.3", 64), column_sums=other).kept() != causal


def test_h2o_keeps_the_recent_half_whatever_its_sums() -> None:
    sums = np.zeros((4, 20))
    sums[:, :10] = np.arange(10, 0, -1)
    kept, _ = select("h2o", random_prompt(20), "0.4", column_sums=[sums] * 3)
    assert kept == [[[0, 1, 2, 3, 16, 17, 18, 19]] * 2] * 3


def test_h2o_chooses_heavy_hitters_outside_the_recent_half() -> None:
    """Recent tokens with the largest sums take no heavy hitter's place."""
    kept, _ = select("h2o", random_prompt(20), "0.4", column_sums=[np.tile(np.arange(20.0), (4, 1))] * 3)
    assert kept == [[[12, 13, 14, 15, 16, 17, 18, 19]] * 2] * 3


# "ShotKV at small budgets: the eight GSM8K exemplars are each 8.5-15.3 % of the block, so at 10 % at most one fits."

EXEMPLARS = [240, 317, 176, 250, 270, 262, 280, 276]
"""Characters of eight exemplars as in KVFUNDABENCH.md 5.4-g: 176 to 317, 2,071 in all."""


def _eight_shots(question: int) -> Prompt:
    start, layout = 1, [("special", 0, 1, -1)]
    for i, characters in enumerate(EXEMPLARS):
        layout.append(("shot", start, start + characters // 4, i))
        start += characters // 4
    layout.append(("question", start, start + question, -1))
    n = start + question
    rng = np.random.default_rng(question)
    keys = [rng.standard_normal((2, n, 1)) for _ in range(4)]
    return Prompt([np.repeat(k, 2, 0) for k in keys], keys, keys, 1.0, layout, f"eight shots, question {question}")


@pytest.mark.parametrize("fit", ["skip", "stop"])
@pytest.mark.parametrize("question", [1, 5, 40])
def test_shotkv_never_cuts_a_shot(question: int, fit: str) -> None:
    prompt = _eight_shots(question)
    rng = np.random.default_rng(1)
    sums = [rng.random((4, prompt.n)) for _ in range(4)]
    shots = [list(range(a, b)) for kind, a, b, _ in prompt.layout if kind == "shot"]
    for percent in range(2, 101, 2):
        ratio = f"{percent / 100:.2f}"
        kept, flags = select(f"shotkv:fit={fit}", prompt, ratio, column_sums=sums)
        for layer in kept:
            inside = [len(set(shot) & set(layer[0])) for shot in shots]
            assert all(c in (0, len(shot)) for c, shot in zip(inside, shots, strict=True)), (ratio, inside)
            assert len(layer[0]) <= budget(ratio, prompt.n) or flags == {"over_budget", "fallback"}


def test_shotkv_at_ten_percent_keeps_at_most_one_of_eight() -> None:
    small, large = _eight_shots(5), _eight_shots(40)
    rng = np.random.default_rng(1)
    sums = [rng.random((4, small.n)) for _ in range(4)]
    kept, flags = select("shotkv", small, "0.1", column_sums=sums)
    shortest = next(set(range(a, b)) for kind, a, b, i in small.layout if i == 2)
    fixed = {0, *range(small.n - 5, small.n)}
    assert [set(layer[0]) for layer in kept] == [fixed | shortest] * 4
    assert not flags
    first_is_long = [s.copy() for s in sums]
    for s in first_is_long:
        s[:, 1:61] = 10
    kept, flags = select("shotkv:fit=stop", small, "0.1", column_sums=first_is_long)
    assert [set(layer[0]) for layer in kept] == [fixed] * 4
    assert flags == {"fallback"}
    sums = [rng.random((4, large.n)) for _ in range(4)]
    kept, flags = select("shotkv", large, "0.1", column_sums=sums)
    assert [set(layer[0]) for layer in kept] == [{0, *range(large.n - 40, large.n)}] * 4
    assert flags == {"fallback"}
    kept, flags = select("shotkv", large, "0.02", column_sums=sums)
    assert [set(layer[0]) for layer in kept] == [{0, *range(large.n - 40, large.n)}] * 4
    assert flags == {"fallback", "over_budget"}


def test_shotkv_counts_a_last_token_inside_a_unit_once() -> None:
    """Without a question the protected last token belongs to a shot: it must not cost that shot twice."""
    layout = [("special", 0, 1, -1), ("shot", 1, 5, 0), ("shot", 5, 10, 1)]
    prompt = random_prompt(10)
    prompt = Prompt(prompt.queries, prompt.keys, prompt.values, prompt.scaling, layout, "no question")
    first = np.tile([1.0] * 5 + [0.0] * 5, (4, 1))
    for text in ("shotkv", "random_shot"):
        kept, flags = select(text, prompt, "1", column_sums=[first] * 3)
        assert kept == [[list(range(10))] * 2] * 3 and not flags
    kept, _ = select("shotkv", prompt, "0.6", column_sums=[1 - first] * 3)
    assert kept == [[[0, 5, 6, 7, 8, 9]] * 2] * 3


# "Per-sequence state kept on the method or on a shared config: only the first sample is compressed."


@pytest.mark.parametrize("text", TIER1)
def test_two_samples_in_a_row_give_what_each_gives_alone(text: str) -> None:
    prompts = [
        random_prompt(n, regions=r, seed=s) for n, r, s in [(64, "shots", 0), (30, "mixed", 1), (64, "shots", 2)]
    ]
    alone = [select(text, p, "0.4") for p in prompts]
    method = build(text)
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):
        for i in order:
            selection = method.select(context_for(method, prompts[i]), budget_for(prompts[i], "0.4"))
            assert (lists(selection, 2), set(selection.flags)) == alone[i]


@pytest.mark.parametrize("text", TIER1)
def test_one_context_serves_all_ratios_and_methods(text: str) -> None:
    """Selecting changes nothing that a method reads: earlier ratios and other methods leave no trace."""
    prompt = random_prompt(64, regions="mixed")
    method, other = build(text), build("snapkv:window=8")
    shared = context_for(method, prompt)
    shared.window_queries = context_for(other, prompt).window_queries
    before = [
        t.clone() for t in (*shared.keys, *shared.values, *shared.window_queries, *chain(*shared.column_sums.values()))
    ]
    for ratio in ("0.9", "0.1", "0.5", "0.1"):
        other.select(shared, budget_for(prompt, ratio))
        selection = method.select(shared, budget_for(prompt, ratio))
        assert (lists(selection, 2), set(selection.flags)) == select(text, prompt, ratio)
    after = [*shared.keys, *shared.values, *shared.window_queries, *chain(*shared.column_sums.values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# "Keys repeated per query head before storing: 4x memory"; "Scores are reduced over the GQA group".


@pytest.mark.parametrize("text", ["h2o", "snapkv:window=8", "pyramidkv"])
def test_scores_are_reduced_over_the_gqa_group(text: str) -> None:
    prompt = random_prompt(64, kv_heads=2, group=4)
    kept, _ = select(text, prompt, "0.3")
    assert all(len(layer) == 2 for layer in kept)
    assert any(layer[0] != layer[1] for layer in kept)
    assert_agrees(text, prompt, "0.3")


# "Unknown or unused settings are an error."


@pytest.mark.parametrize(
    "text",
    ["snapkv:windows=8", "h2o:window=8", "chunkkv:kernel=7", "snapkv:window=0", "snapkv:window=-1", "snapkv:kernel=4",
     "snapkv:pool=sum", "pyramidkv:beta=0.5", "chunkkv:chunk=0", "shotkv:scope=head", "shotkv:fit=cut",
     "streaming_llm:sinks=-1", "random:window=0"],
)  # fmt: skip
def test_settings_that_mean_nothing_are_errors(text: str) -> None:
    with pytest.raises(KvcliError):
        build(text)


# One rule for protected tokens; the flags that go with it.


def test_cuts_are_flagged() -> None:
    prompt = random_prompt(100)
    assert select("snapkv", prompt, "0.64")[1] == set()
    assert select("snapkv", prompt, "0.63")[1] == {"fallback"}
    assert select("snapkv", prompt, "0.1", strict=True)[1] == {"over_budget"}
    assert select("pyramidkv", prompt, "0.16")[1] == set()
    assert select("pyramidkv", prompt, "0.15")[1] == {"fallback"}
    assert select("chunkkv", prompt, "0.63")[1] == {"fallback"}
    assert select("streaming_llm", prompt, "0.08")[1] == set()
    assert select("streaming_llm", prompt, "0.07")[1] == {"fallback"}


def test_chunkkv_says_when_no_chunk_fits() -> None:
    """Room for nine beside the window and chunks of ten: only the window stays, 4 of 13."""
    prompt = random_prompt(64)
    kept, flags = select("chunkkv:window=4", prompt, "0.2")
    assert kept == [[[60, 61, 62, 63]] * 2] * 3
    assert flags == oracle_answer("chunkkv:window=4", prompt, "0.2").flags == {"fallback"}


def test_chunkkv_never_cuts_a_chunk() -> None:
    prompt = random_prompt(95, kv_heads=2)
    for percent in range(10, 101, 5):
        ratio = f"{percent / 100:.2f}"
        kept, _ = select("chunkkv:window=8", prompt, ratio)
        w = 8 if budget(ratio, 95) >= 16 else budget(ratio, 95) // 2
        for layer in kept:
            assert layer[0] == layer[1] and len(layer[0]) <= budget(ratio, 95)
            for start in range(0, 95 - w, 10):
                chunk = set(range(start, min(start + 10, 95 - w)))
                assert len(chunk & set(layer[0])) in (0, len(chunk)), (ratio, start)
