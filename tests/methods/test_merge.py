"""Merging against an explicit merge, pair by pair, and what it must leave alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcli.cache.budget import Budget
from kvcli.cache.rows import head_positions
from kvcli.engine.asking import _merged
from kvcli.errors import KvcliError
from kvcli.methods.base import Merge
from kvcli.methods.catalog import build
from kvcli.methods.composed import merge_of
from kvcli.methods.context import Context
from tests.methods import storing
from tests.oracles.harness import context_for
from tests.oracles.merge import Heads, cam, d2o
from tests.oracles.prompts import Prompt, random_prompt

STYLES = ["merge", "merge:weights=cosine", "merge:style=cam", "merge:style=cam,window=5"]


def merging(text: str) -> Merge:
    made = merge_of(build(f"h2o+{text}"))
    assert made is not None
    return made


def draws(ctx: Context, layer: int) -> np.ndarray:
    return torch.rand(ctx.kv_heads, ctx.n, generator=ctx.generator("merge", layer)).double().numpy()


def expected(text: str, prompt: Prompt, ctx: Context, layer: int, kept: Sequence[Tensor]) -> Heads:
    lists = [p.tolist() for p in kept]
    if "cam" in text:
        return cam(prompt, layer, lists, draws(ctx, layer), 5 if "window" in text else 32)
    return d2o(prompt, layer, lists, "cosine" if "cosine" in text else "exp")


@pytest.mark.parametrize("form", storing.FORMS)
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("text", STYLES)
def test_what_is_kept_is_the_oracles(text: str, group: int, form: str) -> None:
    made = merging(text)
    for n, seed in ((2, 0), (9, 1), (60, 2), (75, 3)):
        prompt = random_prompt(n, group=group, layers=2, dim=8, regions="plain", seed=seed)
        ctx = context_for(made, prompt)
        for layer, positions in enumerate(storing.kept(form, ctx, seed)):
            kept = head_positions(positions, 2)
            wanted = expected(text, prompt, ctx, layer, kept)
            for found, pair in zip(made.fold(ctx, layer, kept), wanted, strict=True):
                for a, b in zip(found, pair, strict=True):
                    assert np.allclose(a.numpy(), b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", STYLES)
def test_the_last_pair_takes_nothing_and_the_prompt_stays_what_it_was(text: str) -> None:
    """Although the dropped keys lie nearest to the last one, which attends to them most."""
    made = merging(text)
    ctx = context_for(made, random_prompt(50, layers=1, dim=8, regions="plain"))
    ctx.keys[0][:, :15] = ctx.keys[0][:, -1:] * 1.01
    before = [x.clone() for x in (*ctx.keys, *ctx.values)]
    kept = [torch.arange(30, 50)] * 2
    folded = made.fold(ctx, 0, kept)
    for h, (keys, values) in enumerate(folded):
        assert torch.equal(keys[-1], ctx.keys[0][h, -1])
        assert torch.equal(values[-1], ctx.values[0][h, -1])
        assert not torch.equal(values[:-1], ctx.values[0][h, 30:-1])
    assert all(torch.equal(a, b) for a, b in zip(before, (*ctx.keys, *ctx.values), strict=True))


@pytest.mark.parametrize("text", STYLES)
def test_nothing_dropped_or_nobody_to_take_it_changes_nothing(text: str) -> None:
    made = merging(text)
    ctx = context_for(made, random_prompt(20, layers=1, dim=8, regions="plain"))
    for kept in ([torch.arange(20)] * 2, [torch.tensor([19])] * 2):
        for h, (keys, values) in enumerate(made.fold(ctx, 0, kept)):
            assert torch.equal(keys, ctx.keys[0][h, kept[h]])
            assert torch.equal(values, ctx.values[0][h, kept[h]])


def test_only_pairs_at_or_above_the_mean_likeness_are_folded_in() -> None:
    """By hand: two dropped keys, cosines 1 and 0.6 to the first kept one; the mean 0.8 lets one in."""
    made = merging("merge")
    ctx = context_for(made, random_prompt(5, kv_heads=1, group=1, layers=1, dim=2, regions="plain"))
    ctx.keys[0] = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.6, 0.8], [-1.0, 0.1], [0.0, 5.0]]]).double()
    ctx.values[0] = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [9.0, 9.0], [5.0, 5.0], [7.0, 7.0]]]).double()
    ((keys, values),) = made.fold(ctx, 0, [torch.tensor([0, 3, 4])])
    assert torch.allclose(keys, torch.tensor([[1.5, 0.0], [-1.0, 0.1], [0.0, 5.0]]).double())  # e : exp(1) = 1 : 1
    assert torch.allclose(values, torch.tensor([[2.0, 0.0], [5.0, 5.0], [7.0, 7.0]]).double())


def test_d2os_mean_lies_between_what_it_is_made_of() -> None:
    """Weights sum to one: no key grows longer than the longest that went in."""
    made = merging("merge")
    ctx = context_for(made, random_prompt(80, layers=1, dim=8, regions="plain"))
    kept = [torch.tensor([0, 20, 50, 79])] * 2
    for h, (keys, values) in enumerate(made.fold(ctx, 0, kept)):
        for new, own in ((keys, ctx.keys[0][h]), (values, ctx.values[0][h])):
            assert bool((new <= own.amax(0) + 1e-12).all())
            assert bool((new >= own.amin(0) - 1e-12).all())


def test_cams_values_give_back_the_dropped_attention_on_average() -> None:
    """Its theorem: over draws, the receivers' values carry what the last query read from the dropped pairs, as long as
    no probability is cut at 1. Queries are small here, so attention is nearly even."""
    prompt = random_prompt(40, kv_heads=1, group=1, layers=1, dim=8, regions="plain")
    prompt = dataclasses.replace(prompt, queries=[0.05 * q for q in prompt.queries])
    made = merging("merge:style=cam,window=30")
    kept = torch.tensor([0, *range(20, 40)])
    weights = torch.tensor(prompt.attention[0][0, -1])
    assert weights[1:20].max() < 1.3 * weights[20:39].mean()
    read, ctx = [], context_for(made, prompt)
    for seed in range(400):
        ((_, values),) = made.fold(dataclasses.replace(ctx, seed=seed), 0, [kept])
        read.append(weights[kept] @ values)
    full, dropped = weights @ ctx.values[0][0], weights[1:20] @ ctx.values[0][0, 1:20]
    off = (torch.stack(read).mean(0) - full).norm()
    assert off < 0.15 * dropped.norm()
    assert torch.stack(read).std(0).norm() > 0


def test_cams_draws_are_the_samples_own_and_follow_the_seed() -> None:
    made = merging("merge:style=cam")
    ctx = context_for(made, random_prompt(60, layers=2, dim=8, regions="plain"))
    kept = [torch.arange(40, 60)] * 2

    def values(**more: object) -> Tensor:
        return torch.stack([v for _, v in made.fold(dataclasses.replace(ctx, **more), 0, kept)])  # type: ignore[arg-type]

    assert torch.equal(values(), values())
    assert not torch.equal(values(), values(seed=1))
    assert not torch.equal(values(), values(sample_id="other"))


def test_only_cam_is_seeded_and_only_cam_needs_attention() -> None:
    assert build("snapkv+merge:style=cam").seeded is True
    assert build("snapkv+merge").seeded is False
    assert merging("merge").needs() == frozenset()
    assert merging("merge:style=cam").needs() == {"window:1"}
    assert type(merging("merge")).card()["seeded"] is True


@pytest.mark.parametrize("text", ["merge", "merge:style=cam"])
@pytest.mark.parametrize("method", ["snapkv:window=4", "h2o", "random"])
def test_rows_hold_the_folded_pairs_in_their_places(method: str, text: str) -> None:
    """As the engine lays them out: [H_kv, K, D], with the true order of positions."""
    built = build(f"{method}+{text}")
    prompt = random_prompt(50, layers=2, dim=8, regions="plain")
    ctx = context_for(built, prompt)
    kept = built.select(ctx, Budget.of_size(15, 50, 2, 2)).kept
    keys, values, chosen = _merged(merging(text), ctx, kept)
    for layer, form in enumerate(kept):
        heads = head_positions(form, 2)
        wanted = expected(text, prompt, ctx, layer, heads)
        for h, places in enumerate(head_positions(chosen[layer], 2)):
            assert np.allclose(keys[layer][h, places].numpy(), wanted[h][0], atol=1e-12)
            assert np.allclose(values[layer][h, places].numpy(), wanted[h][1], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text", STYLES)
def test_16_bit_pairs_are_merged_in_float32(text: str, dtype: torch.dtype) -> None:
    made = merging(text)
    prompt = random_prompt(60, layers=1, dim=16, regions="plain")
    exact, low = context_for(made, prompt), context_for(made, prompt, dtype=dtype)
    kept = [torch.arange(30, 60)] * 2
    for a, b in zip(made.fold(exact, 0, kept), made.fold(low, 0, kept), strict=True):
        for x, y in zip(a, b, strict=True):
            assert y.dtype == dtype
            far = (x - y.double()).abs() > 4 * torch.finfo(dtype).eps * x.abs().clamp_min(1)
            assert far.double().mean() < 0.1  # a pair at the threshold or at its probability may fall either way


@pytest.mark.parametrize("evictor", ["h2o", "streaming_llm", "duo_attention"])
def test_only_cam_makes_a_method_read_attention_while_generating(evictor: str) -> None:
    plain = build(evictor).decode_reads
    assert build(f"{evictor}+merge").decode_reads is bool(plain)
    assert build(f"{evictor}+merge:style=cam").decode_reads is True
    assert build(f"{evictor}+merge").decodes() is build(evictor).decodes()


@pytest.mark.parametrize("text", ["merge:style=cam,weights=cosine", "merge:style=cam,beta=0.2", "merge:window=8"])
def test_a_setting_of_the_other_style_is_refused(text: str) -> None:
    with pytest.raises(KvcliError, match="has no effect without style=") as found:
        build(f"h2o+{text}")
    build(f"h2o+{found.value.fix}")
