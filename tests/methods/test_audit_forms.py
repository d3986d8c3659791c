"""Transforms, readers and merges against their oracles at many lengths, head counts and forms of kept sets, and where
scores tie. float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from kvcli.cache.rows import head_positions
from kvcli.methods.base import Reader
from kvcli.methods.catalog import build
from kvcli.methods.composed import merge_of
from tests.methods import storing
from tests.oracles.harness import context_for
from tests.oracles.kivi import kivi
from tests.oracles.lowrank import best_of_rank, rotated, side_by_side
from tests.oracles.merge import cam, d2o
from tests.oracles.minicache import minicache
from tests.oracles.prompts import random_prompt
from tests.oracles.quant import quant
from tests.oracles.quest import quest

# Transforms: short and long prompts, one to four KV heads, every form of a kept set.

FREQUENCIES = [1e4 ** -(2 * j / 16) for j in range(8)]


@pytest.mark.parametrize("n", [1, 2, 3, 9, 33, 97])
@pytest.mark.parametrize("kv_heads", [1, 3, 4])
def test_low_rank_of_any_length_is_the_best_of_its_rank(kv_heads: int, n: int) -> None:
    """Also where there are fewer tokens than the rank: then it is exact."""
    text = "lowrank:keys=0.25,values=0.5,group=2"
    ctx = storing.context(text, n, kv_heads=kv_heads, layers=2, seed=n)
    for layer, read in enumerate(storing.heads_of(storing.stored(text, ctx, storing.kept("all", ctx)))):
        places = list(range(n - 1))
        keys = [rotated(ctx.keys[layer][h, :-1].numpy(), [-p for p in places], FREQUENCIES) for h in range(kv_heads)]
        values = [ctx.values[layer][h, :-1].numpy() for h in range(kv_heads)]
        rank = int(0.25 * 16 * kv_heads + 0.5)
        keys = side_by_side(keys, min(rank, 16 * kv_heads))
        parts = [values[i : i + 2] for i in range(0, kv_heads, 2)]
        values = [
            v for part in parts for v in (side_by_side(part, 16) if len(part) == 2 else [best_of_rank(part[0], 8)])
        ]
        for h in range(kv_heads):
            assert np.allclose(read[h][0][:-1].numpy(), rotated(keys[h], places, FREQUENCIES), atol=1e-7)
            assert np.allclose(read[h][1][:-1].numpy(), values[h], atol=1e-7)
            assert torch.equal(read[h][0][-1], ctx.keys[layer][h, -1])


@pytest.mark.parametrize("n", [2, 3, 4, 20, 97])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_shared_directions_of_any_length_are_the_oracles(kv_heads: int, n: int) -> None:
    ctx = storing.context("minicache:start=0,gamma=0.2", n, kv_heads=kv_heads, layers=3, seed=n)
    positions = storing.kept("all", ctx)
    plain = storing.plain_heads(ctx, positions)
    read = storing.heads_of(storing.stored("minicache:start=0,gamma=0.2", ctx, positions))
    assert storing.equal([read[2]], [plain[2]]), "an odd layer out stays as it is"
    for h in range(kv_heads):
        for which in (0, 1):
            pair = [plain[layer][h][which][:-1].numpy() for layer in (0, 1)]
            wanted = minicache(pair[0], pair[1], gamma=0.2)[:2]
            for layer in (0, 1):
                assert np.allclose(read[layer][h][which][:-1].numpy(), wanted[layer], atol=1e-9)


def test_tokens_with_the_same_largest_angle_all_stay_apart() -> None:
    ctx = storing.context("minicache:start=0", 9, kv_heads=1, layers=2, dim=4)
    one, two = torch.tensor([1.0, 0, 0, 0]).double(), torch.tensor([0.0, 1, 0, 0]).double()
    for x in (*ctx.keys, *ctx.values):
        x[:] = one
    for i in (1, 4, 6):  # a right angle; all others are alike
        ctx.keys[1][0, i] = two
    layers = storing.stored("minicache:start=0", ctx, storing.kept("all", ctx))
    assert layers[0][0][1].halves[0].index.tolist() == [1, 4, 6]  # type: ignore[attr-defined]
    assert storing.equal(storing.heads_of(layers), storing.plain_heads(ctx, storing.kept("all", ctx)), rtol=1e-9)


@pytest.mark.parametrize("form", storing.FORMS)
@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize(
    "text", ["kivi:group=4,residual=8", "kivi:bits=4,group=8,residual=8", "quant", "quant:dtype=int4,group=6"]
)
def test_codes_of_every_form_of_kept_set_are_the_oracles(text: str, n: int, form: str) -> None:
    """Heads of other lengths are grouped alone; generated pairs follow each."""
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {
        k: int(v) if v.isdigit() else v for k, v in (p.split("=") for p in rest.split(",") if p)
    }
    ctx = storing.context(text, n, kv_heads=3, layers=2, dim=20, seed=2)
    positions = storing.kept(form, ctx)
    layers, wanted = storing.stored(text, ctx, positions), storing.plain_heads(ctx, positions)
    for pairs in storing.new_pairs(ctx, 11):
        storing.feed(layers, pairs)
        wanted = [
            [(torch.cat([k, nk[h]]), torch.cat([v, nv[h]])) for h, (k, v) in enumerate(layer)]
            for layer, (nk, nv) in zip(wanted, pairs, strict=True)
        ]
    size = 0.0
    for layer, plain in zip(storing.heads_of(layers), wanted, strict=True):
        for (keys, values), (own_keys, own_values) in zip(layer, plain, strict=True):
            oracle = kivi if name == "kivi" else quant
            want_keys, want_values, taken = oracle(own_keys.numpy(), own_values.numpy(), **settings)  # type: ignore[operator]
            assert np.allclose(keys.numpy(), want_keys, rtol=0, atol=1e-12)
            assert np.allclose(values.numpy(), want_values, rtol=0, atol=1e-12)
            size += taken
    assert storing.payload(layers) == size == storing.real_bytes(layers)


# A reader: groups of query heads, few pages, equal bounds.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("slots", [1, 4, 5, 31])
@pytest.mark.parametrize("kv_heads, group", [(1, 1), (1, 8), (3, 1), (2, 4)])
def test_pages_of_any_group_and_length_are_the_oracles(kv_heads: int, group: int, slots: int, tied: bool) -> None:
    """Keys and queries of -1, 0 and 1 make many equal bounds: of these the first pages are read."""
    method = build("quest:tokens=8,page=4,least=2,dense_layers=0")
    assert isinstance(method, Reader)
    rng = np.random.default_rng([kv_heads, group, slots, tied])
    draw = (lambda *s: rng.integers(-1, 2, s).astype(float)) if tied else (lambda *s: rng.standard_normal(s))
    for _ in range(5):
        query, keys = draw(kv_heads * group, 4), draw(kv_heads, slots, 4)
        filled = torch.ones(1, kv_heads, slots, dtype=torch.bool)
        chosen = method.read(0, torch.tensor(query)[None], torch.tensor(keys)[None], filled)
        wanted = quest(query, keys, [slots] * kv_heads, 8, 4, 2)
        if chosen is None:
            assert all(reads == set(range(slots)) for reads in wanted)
            continue
        assert [set(chosen[0, h].nonzero()[:, 0].tolist()) for h in range(kv_heads * group)] == wanted


# Merging behind a prompt: cosines that are exact and mostly equal.


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("n", [2, 12, 50])
@pytest.mark.parametrize("text", ["merge", "merge:weights=cosine", "merge:style=cam,window=8"])
def test_of_survivors_that_are_alike_the_first_takes_what_was_dropped(text: str, n: int, group: int) -> None:
    """Keys are plus or minus one axis: cosines are -1, 0 or 1 in any precision."""
    made = merge_of(build(f"h2o+{text}"))
    assert made is not None
    rng = np.random.default_rng([n, group])
    plain = random_prompt(n, kv_heads=2, group=group, layers=1, dim=4, regions="plain", seed=n)
    keys = np.eye(4)[rng.integers(0, 4, (2, n))] * rng.choice([-1.0, 1.0], (2, n, 1))
    prompt = dataclasses.replace(plain, keys=[keys])
    ctx = context_for(made, prompt)
    draws = torch.rand(2, n, generator=ctx.generator("merge", 0)).double().numpy()
    for form in storing.FORMS:
        kept = head_positions(storing.kept(form, ctx, n)[0], 2)
        places = [p.tolist() for p in kept]
        if "cam" in text:
            wanted = cam(prompt, 0, places, draws, 8)
        else:
            wanted = d2o(prompt, 0, places, "cosine" if "cosine" in text else "exp")
        for found, pair in zip(made.fold(ctx, 0, kept), wanted, strict=True):
            for a, b in zip(found, pair, strict=True):
                assert np.allclose(a.numpy(), b, rtol=0, atol=1e-12), (text, form)
