"""Stores of random prompts, for the tests of transforms."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcli.cache.rows import Kept, Row, head_positions
from kvcli.cache.stored import Layers
from kvcli.engine.asking import stored_layers
from kvcli.methods.base import Transform
from kvcli.methods.catalog import build
from kvcli.methods.context import Context
from kvcli.models.rope import RopeHandle
from tests.oracles.harness import context_for
from tests.oracles.prompts import random_prompt

FORMS = ("all", "layer", "head", "ragged")


def transform(text: str) -> Transform:
    made = build(text)
    assert isinstance(made, Transform)
    return made


def context(
    text: str,
    n: int,
    *,
    kv_heads: int = 2,
    layers: int = 4,
    dim: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Context:
    prompt = random_prompt(n, kv_heads=kv_heads, layers=layers, dim=dim, seed=seed, regions="plain")
    frequencies = 1e4 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return dataclasses.replace(context_for(build(text), prompt, dtype=dtype), rope=RopeHandle(frequencies))


def kept(form: str, ctx: Context, seed: int = 0) -> Kept:
    """Positions of one of the forms that a selection may have; the last one always among them."""
    rng = random.Random(f"{form}:{ctx.n}:{seed}")

    def some(count: int) -> Tensor:
        return torch.tensor([*sorted(rng.sample(range(ctx.n - 1), count - 1)), ctx.n - 1])

    few = max(1, ctx.n * 2 // 3)
    if form == "all":
        return [torch.arange(ctx.n)] * ctx.layers
    if form == "layer":
        return [some(few)] * ctx.layers
    if form == "head":
        return [torch.stack([some(few) for _ in range(ctx.kv_heads)])] * ctx.layers
    return [[some(rng.randint(1, ctx.n)) for _ in range(ctx.kv_heads)]] * ctx.layers


def without_last(positions: Kept) -> Kept:
    return [[p[:-1] for p in layer] if isinstance(layer, list) else layer[..., :-1] for layer in positions]


def stored(text: str | Transform, ctx: Context, positions: Kept) -> Layers:
    made = transform(text) if isinstance(text, str) else text
    return stored_layers(made, ctx, Row(ctx.keys, ctx.values, positions), positions)


def feed(layers: Layers, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """One more pair per layer: keys and values [H_kv, 1, D]."""
    with torch.inference_mode():
        for blocks, (keys, values) in zip(layers, pairs, strict=True):
            for heads, store in blocks:
                store.append(keys[heads], values[heads])


def pair_at(ctx: Context, position: int) -> list[tuple[Tensor, Tensor]]:
    place = slice(position, position + 1)
    return [(k[:, place], v[:, place]) for k, v in zip(ctx.keys, ctx.values, strict=True)]


def new_pairs(ctx: Context, count: int, seed: int = 5) -> list[list[tuple[Tensor, Tensor]]]:
    """Pairs of `count` generated tokens, layer by layer."""
    generator = torch.Generator().manual_seed(seed)

    def one(like: Tensor) -> Tensor:
        return torch.randn(like.shape[0], 1, like.shape[-1], generator=generator, dtype=torch.float64).to(like.dtype)

    return [[(one(k), one(v)) for k, v in zip(ctx.keys, ctx.values, strict=True)] for _ in range(count)]


def heads_of(layers: Layers) -> list[list[tuple[Tensor, Tensor]]]:
    """[layer][KV head]: keys and values [K, D] that attention reads."""
    with torch.inference_mode():
        return [
            [(k, v) for _, store in blocks for k, v in zip(*store.dense(), strict=True)] for blocks in layers
        ]  # fmt: skip


def plain_heads(ctx: Context, positions: Kept) -> list[list[tuple[Tensor, Tensor]]]:
    """The same of the pairs as they are."""
    return [
        [(ctx.keys[i][h, p], ctx.values[i][h, p]) for h, p in enumerate(head_positions(form, ctx.kv_heads))]
        for i, form in enumerate(positions)
    ]


def payload(layers: Layers) -> int:
    return sum(store.payload() for blocks in layers for _, store in blocks)


def real_bytes(layers: Layers) -> int:
    """Bytes of the distinct storages behind all tensors, those of wider floats counted as 16 bit."""
    sizes: dict[int, int] = {}
    for _, store in itertools.chain(*layers):
        for t in store.tensors():
            wide = t.is_floating_point() and t.itemsize > 2
            bytes_ = t.untyped_storage().nbytes()
            sizes[t.untyped_storage().data_ptr()] = bytes_ * 2 // t.itemsize if wide else bytes_
    return sum(sizes.values())


def equal(a: list[list[tuple[Tensor, Tensor]]], b: list[list[tuple[Tensor, Tensor]]], **close: Any) -> bool:
    flat = [itertools.chain(*itertools.chain(*x)) for x in (a, b)]
    return all(
        x.shape == y.shape and (torch.allclose(x, y, **close) if close else torch.equal(x, y))
        for x, y in zip(*flat, strict=True)
    )
