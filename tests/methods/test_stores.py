"""What all stores owe: real bytes, growth, order, and that nothing depends on when the last prompt token came."""

from __future__ import annotations

import pytest
import torch

from kvcli.methods.catalog import find, names
from tests.methods import storing

TRANSFORMS = ["kivi", "think", "quant", "lowrank", "minicache"]
TEXTS = [
    *TRANSFORMS, "kivi:bits=4", "kivi:group=8,residual=16", "quant:dtype=int4", "quant:dtype=int4,group=6",
    "quant:dtype=fp8", "think:prune=0.7,window=5", "lowrank:keys=0.5,values=0.25,group=1",
    "minicache:start=0,gamma=0.5",
]  # fmt: skip
SIZES = [1, 2, 31, 32, 33, 64, 97]


@pytest.mark.parametrize("form", storing.FORMS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_payload_is_the_storage_of_all_tensors(text: str, form: str) -> None:
    for n in (1, 33, 97):
        ctx = storing.context(text, n)
        layers = storing.stored(text, ctx, storing.kept(form, ctx))
        assert storing.payload(layers) == storing.real_bytes(layers), n
        for pairs in storing.new_pairs(ctx, 40):
            storing.feed(layers, pairs)
        assert storing.payload(layers) == storing.real_bytes(layers), n


@pytest.mark.parametrize("form", storing.FORMS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_store_without_the_last_pair_plus_that_pair_is_the_whole_store(text: str, form: str) -> None:
    """The last prompt token is fed again in the compressed first-token mode."""
    for n in SIZES:
        ctx = storing.context(text, n)
        positions = storing.kept(form, ctx)
        whole = storing.stored(text, ctx, positions)
        fed = storing.stored(text, ctx, storing.without_last(positions))
        storing.feed(fed, storing.pair_at(ctx, n - 1))
        assert storing.payload(fed) == storing.payload(whole), n
        assert storing.equal(storing.heads_of(fed), storing.heads_of(whole)), n


@pytest.mark.parametrize("form", storing.FORMS)
@pytest.mark.parametrize("text", TEXTS)
def test_pairs_are_read_in_their_order_and_near_what_they_were(text: str, form: str) -> None:
    """Every row read is nearer to its own pair than to any other: random pairs of 64 channels lie far apart."""
    ctx = storing.context(text, 70, dim=64)
    positions = storing.kept(form, ctx)
    layers = storing.stored(text, ctx, positions)
    wanted = storing.plain_heads(ctx, positions)
    for pairs in storing.new_pairs(ctx, 40):
        storing.feed(layers, pairs)
        wanted = [
            [(torch.cat([k, nk[h]]), torch.cat([v, nv[h]])) for h, (k, v) in enumerate(layer)]
            for layer, (nk, nv) in zip(wanted, pairs, strict=True)
        ]
    if text.startswith(("lowrank", "minicache", "think:prune=0.7")):
        new = [[(k[-40:], v[-40:]) for k, v in layer] for layer in wanted]
        read = [[(k[-40:], v[-40:]) for k, v in layer] for layer in storing.heads_of(layers)]
        assert storing.equal(read, new)
        return
    for layer, plain in zip(storing.heads_of(layers), wanted, strict=True):
        for read_pair, pair in zip(layer, plain, strict=True):
            for read, own in zip(read_pair, pair, strict=True):
                assert read.shape == own.shape
                nearest = torch.cdist(read, own).argmin(1)
                assert (nearest == torch.arange(len(own))).double().mean() > 0.97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_read_has_the_models_dtype_and_the_payload_does_not_depend_on_it(text: str, dtype: torch.dtype) -> None:
    ctx, exact = storing.context(text, 80, dtype=dtype), storing.context(text, 80)
    layers = storing.stored(text, ctx, storing.kept("all", ctx))
    for pairs in storing.new_pairs(ctx, 35):
        storing.feed(layers, pairs)
    assert {x.dtype for layer in storing.heads_of(layers) for pair in layer for x in pair} == {dtype}
    if not text.startswith("minicache"):  # which tokens stay unmerged may depend on rounding
        other = storing.stored(text, exact, storing.kept("all", exact))
        for pairs in storing.new_pairs(exact, 35):
            storing.feed(other, pairs)
        assert storing.payload(layers) == storing.payload(other)
    assert storing.payload(layers) == storing.real_bytes(layers)


@pytest.mark.parametrize("text", TEXTS)
def test_storing_and_reading_change_nothing_of_the_prompt(text: str) -> None:
    ctx = storing.context(text, 60)
    before = [x.clone() for x in (*ctx.keys, *ctx.values)]
    layers = storing.stored(text, ctx, storing.kept("all", ctx))
    for pairs in storing.new_pairs(ctx, 35):
        storing.feed(layers, pairs)
    first = storing.heads_of(layers)
    assert storing.equal(first, storing.heads_of(layers))
    assert all(torch.equal(a, b) for a, b in zip(before, (*ctx.keys, *ctx.values), strict=True))
    held = {t.untyped_storage().data_ptr() for blocks in layers for _, s in blocks for t in s.tensors() if t.numel()}
    assert held.isdisjoint({x.untyped_storage().data_ptr() for x in (*ctx.keys, *ctx.values)})


@pytest.mark.parametrize("text", TEXTS)
def test_two_stores_of_one_prompt_grow_apart(text: str) -> None:
    """A store is one row's own: what one row generates must not reach another."""
    ctx = storing.context(text, 64)
    one, two = (storing.stored(text, ctx, storing.kept("all", ctx)) for _ in range(2))
    alone = storing.heads_of(two)
    for pairs in storing.new_pairs(ctx, 33):
        storing.feed(one, pairs)
    assert storing.equal(storing.heads_of(two), alone)


@pytest.mark.parametrize("text", TRANSFORMS)
def test_fewer_bytes_than_16_bit(text: str) -> None:
    ctx = storing.context(text, 400, dim=64)
    full = 400 * 2 * 2 * 64 * 2 * ctx.layers
    assert storing.payload(storing.stored(text, ctx, storing.kept("all", ctx))) < 0.83 * full


def test_every_transform_is_held_here() -> None:
    assert {name for name in names() if find(name).kind == "transform"} == set(TRANSFORMS)
