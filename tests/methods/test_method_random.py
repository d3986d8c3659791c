"""The random control arms: exact counts, what is protected, uniform draws, and what a draw may depend on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import chi2

from kvcli.methods.catalog import build
from tests.oracles.harness import Kept, budget_for, context_for, lists, select
from tests.oracles.prompts import Prompt, budget, random_prompt
from tests.oracles.shotkv import units_of

RATIOS = [f"0.{i}" for i in range(1, 10)] + ["0.02", "1"]
SURE = 1 - 1e-6


def _samples(text: str, prompt: Prompt, ratio: str, count: int) -> Iterator[Kept]:
    method, size = build(text), budget_for(prompt, ratio)
    for i in range(count):
        ctx = context_for(method, replace(prompt, name=f"sample {i}"))
        yield lists(method.select(ctx, size), prompt.kv_heads)


def _assert_uniform(draws: list[list[int]], of: list[int], size: int) -> None:
    """Each draw takes `size` of `of`: single and pairwise counts fit a draw without replacement."""
    m, n = len(of), len(draws)
    counts = np.zeros(m)
    pairs = np.zeros((m, m))
    place = {p: i for i, p in enumerate(of)}
    for draw in draws:
        assert len(draw) == size
        taken = [place[p] for p in draw]
        counts[taken] += 1
        for a, b in combinations(taken, 2):
            pairs[a, b] += 1
    share = size / m
    statistic = (m - 1) / m * float(((counts - n * share) ** 2).sum()) / (n * share * (1 - share))
    assert statistic < chi2.ppf(SURE, m - 1), f"chi-square {statistic:.1f}, counts {counts.tolist()}"
    assert statistic > chi2.ppf(1 - SURE, m - 1), f"too even to be random: chi-square {statistic:.3f}"
    both = size * (size - 1) / (m * (m - 1))
    if both:
        worst = np.abs(pairs[np.triu_indices(m, 1)] - n * both).max() / np.sqrt(n * both * (1 - both))
        assert worst < 5.5, f"a pair is {worst:.1f} standard deviations off"


@pytest.mark.parametrize("n", [1, 2, 5, 17, 64, 200])
@pytest.mark.parametrize("sinks, window", [(0, 1), (4, 8), (0, 32), (20, 1), (4, 1)])
def test_random_counts_and_protection(n: int, sinks: int, window: int) -> None:
    prompt = random_prompt(n, kv_heads=3, group=1)
    for ratio in RATIOS:
        size = budget(ratio, n)
        kept, flags = select(f"random:sinks={sinks},window={window}", prompt, ratio)
        heads = [head for layer in kept for head in layer]
        assert all(len(head) == size == len(set(head)) and head == sorted(head) for head in heads)
        assert all(head[0] >= 0 and head[-1] == n - 1 for head in heads)
        if size == n:
            assert not flags
            continue
        half = max(1, size // 2)
        newest = min(window, half)
        first = min(sinks, half - newest)
        fixed = {*range(first), *range(n - newest, n)}
        assert all(fixed <= set(head) for head in heads), (ratio, fixed)
        assert flags == ({"fallback"} if newest < min(window, n) or first < min(sinks, n - min(window, n)) else set())


def test_random_strict_window() -> None:
    prompt = random_prompt(40)
    kept, flags = select("random:window=16", prompt, "0.2", strict=True)
    assert kept == [[list(range(24, 40))] * 2] * 3
    assert flags == {"over_budget"}
    kept, flags = select("random:window=16", prompt, "0.5", strict=True)
    assert all(len(head) == 20 and set(range(24, 40)) < set(head) for layer in kept for head in layer)
    assert not flags


@pytest.mark.parametrize("sinks, window", [(0, 1), (2, 3)])
def test_random_is_uniform_over_the_rest(sinks: int, window: int) -> None:
    prompt = random_prompt(20, dim=1)
    rest = list(range(sinks, 20 - window))
    everywhere: list[list[int]] = []
    for kept in _samples(f"random:sinks={sinks},window={window}", prompt, "0.5", 400):
        everywhere += [[p for p in head if p in rest] for layer in kept for head in layer]
    assert len(everywhere) == 400 * 3 * 2
    _assert_uniform(everywhere, rest, 10 - sinks - window)


def test_random_heads_do_not_move_together() -> None:
    """The overlap of two heads' (or two layers') draws is what chance gives: 9 x 9 / 19 on average."""
    prompt = random_prompt(20, dim=1)
    overlap: dict[str, list[int]] = {"heads": [], "layers": [], "samples": []}
    before: list[int] = []
    for kept in _samples("random", prompt, "0.5", 400):
        one = set(kept[0][0][:-1])
        overlap["heads"].append(len(one & set(kept[0][1])))
        overlap["layers"].append(len(one & set(kept[1][0])))
        overlap["samples"].append(len(one & set(before)))
        before = kept[0][0][:-1]
    spread = np.sqrt(9 * 9 * 10 * 10 / (19 * 19 * 18))
    for name, sizes in overlap.items():
        assert abs(np.mean(sizes) - 81 / 19) < 5 * spread / np.sqrt(len(sizes)), name


@pytest.mark.parametrize("text", ["random", "random_shot"])
def test_a_draw_depends_on_seed_and_sample_only(text: str) -> None:
    one = random_prompt(200, seed=1)
    other = replace(one, name="another sample")
    first, _ = select(text, one, "0.5", seed=0)
    assert select(text, other, "0.5", seed=0)[0] != first
    assert select(text, one, "0.5", seed=1)[0] != first
    assert select(text, one, "0.5", seed=0)[0] == first
    same_name = replace(random_prompt(200, seed=2), name=one.name)
    assert select(text, same_name, "0.5", seed=0)[0] == first


def test_random_differs_between_heads_and_layers() -> None:
    kept, _ = select("random", random_prompt(200, kv_heads=4, layers=4), "0.3")
    assert len({tuple(head) for layer in kept for head in layer}) == 16


def test_random_shot_layers() -> None:
    """Layers draw apart as ShotKV chooses per layer; scope=all-layers draws once; heads of a layer are always alike."""
    prompt = random_prompt(200, layers=8)
    kept, _ = select("random_shot", prompt, "0.5")
    assert all(head == layer[0] for layer in kept for head in layer)
    assert len({tuple(layer[0]) for layer in kept}) > 1
    kept, _ = select("random_shot:scope=all-layers", prompt, "0.5")
    assert len({tuple(layer[0]) for layer in kept}) == 1


@pytest.mark.parametrize("fit", ["skip", "stop"])
@pytest.mark.parametrize("regions", ["shots", "context", "mixed", "union", "open", "plain"])
def test_random_shot_keeps_whole_units_within_the_budget(regions: str, fit: str) -> None:
    for n in (5, 17, 64, 200):
        prompt = random_prompt(n, regions=regions)
        fixed = {*prompt.positions("special", "system", "question"), n - 1}
        units = units_of(prompt)
        for ratio in RATIOS:
            size = budget(ratio, n)
            kept, flags = select(f"random_shot:fit={fit}", prompt, ratio)
            empty = False
            for layer in kept:
                here = set(layer[0])
                taken = [unit for unit in units if set(unit) <= here]
                assert here == fixed.union(*taken), f"n={n} ratio={ratio}: a unit was cut"
                assert len(here) <= size or here == fixed
                empty |= bool(units) and not (taken and len(fixed) <= size)
                if fit == "skip":
                    left = [u for u in units if u not in taken and len(here | set(u)) <= size]
                    assert not left, f"n={n} ratio={ratio}: unit {left[0]} still fits"
            assert ("over_budget" in flags) == (len(fixed) > size)
            assert ("fallback" in flags) == empty
            if size == n:
                assert not flags and kept == [[list(range(n))] * 2] * 3


def test_random_shot_is_uniform_over_shots() -> None:
    """Eight shots of four tokens, room for three."""
    layout = [("special", 0, 1, -1), *[("shot", 1 + 4 * i, 5 + 4 * i, i) for i in range(8)], ("question", 33, 40, -1)]
    prompt = replace(random_prompt(40, dim=1), layout=layout)
    draws = []
    for kept in _samples("random_shot", prompt, "0.5", 400):
        draws += [[i for i in range(8) if 1 + 4 * i in layer[0]] for layer in kept]
    assert len(draws) == 1200
    _assert_uniform(draws, list(range(8)), 3)
