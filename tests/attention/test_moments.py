"""Moments of the queries before RoPE: against the queries the model itself rotates, merged over any cut of a prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcli.attention import moments as moments_module
from kvcli.attention.capture import Dense, Needs
from kvcli.attention.moments import Moments
from kvcli.errors import KvcliError
from kvcli.models.rope import RopeHandle
from kvcli.models.wrapper import Model
from kvcli.testbed.model import build_tokenizer
from tests.engine import tiny
from tests.engine.asks import exact_model
from tests.models.test_families import LLAMA_LIKE, SUPPORTED, random_model

NEEDS = Needs(moments=frozenset({0, 4}))


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with exact_model() as model:
        yield model


def before_rope(model: Model, ids: list[int]) -> list[Tensor]:
    """Per layer [H, n, R] float64: the queries that the model's own code rotates (R of D dimensions)."""
    module = sys.modules[type(model.hf).__module__]
    own, found = module.apply_rotary_pos_emb, []

    def record(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(q[0].double().clone())
        return own(q, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "apply_rotary_pos_emb", record)
    try:
        with torch.no_grad():
            model.hf(torch.tensor([ids]), use_cache=False)
    finally:
        patch.undo()
    return found


def direct(queries: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean [H, R] and covariance [H, R, R] of [H, n, R], divided by n, by loops."""
    heads, n, dim = queries.shape
    q = queries.numpy()
    mean, cov = np.zeros((heads, dim)), np.zeros((heads, dim, dim))
    if not n:
        return mean, cov
    for h in range(heads):
        for i in range(n):
            mean[h] += q[h, i] / n
        for i in range(n):
            cov[h] += np.outer(q[h, i] - mean[h], q[h, i] - mean[h]) / n
    return mean, cov


def assert_moments(dense: Dense, truth: list[Tensor], room: float) -> None:
    """room: relative to the largest value; transformers rotates with float32 angles whatever the dtype."""
    for first, layers in dense.moments.items():
        for got, queries in zip(layers, truth, strict=True):
            mean, cov = direct(queries[:, first:])
            turned = mean.shape[-1]
            assert int(got.count) == max(0, queries.shape[1] - first)
            for a, b in ((got.mean[:, :turned], mean), (got.covariance()[:, :turned, :turned], cov)):
                scale = max(1.0, float(np.abs(b).max()))
                np.testing.assert_allclose(a.double().numpy(), b, atol=room * scale, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_moments_equal_those_of_the_queries_the_model_rotates(dtype: torch.dtype, kv_heads: int) -> None:
    """Rows of different lengths in one padded batch; the shortest has no query behind the first four."""
    model = tiny.tiny_llama(dtype, layers=2, kv_heads=kv_heads)
    prompts = [tiny.prompt(n, n).ids for n in (70, 33, 3)]
    done = model.prefill(prompts, NEEDS, [0, 0, 0])
    for row, ids in enumerate(prompts):
        dense = done.dense(row)
        assert {m.mean.dtype for layers in dense.moments.values() for m in layers} == {dtype}
        assert_moments(dense, before_rope(model, ids), 1e-5)


@pytest.mark.parametrize("family", sorted(set(SUPPORTED) - {"gpt2", "opt"}))
def test_moments_of_every_family_with_rotary_positions(family: str) -> None:
    """Also those that rotate a part of each head, or scale queries before they do."""
    model = Model(random_model(family, SUPPORTED[family]), build_tokenizer(), name=family)
    assert model.rope is not None
    ids = tiny.prompt(60, 5).ids
    dense = model.prefill([ids], NEEDS, [0]).dense(0)
    assert_moments(dense, before_rope(model, ids), 1e-5)


@pytest.mark.parametrize(
    "family, more",
    [("gpt2", {}), ("opt", {}), ("smollm3", {"no_rope_layers": [1, 0]}), ("cohere", LLAMA_LIKE)],
)
def test_where_the_rotation_cannot_be_undone_in_every_layer_is_refused(family: str, more: dict[str, Any]) -> None:
    """Learned positions, a layer without positions, heads whose neighbours turn together."""
    model = Model(random_model(family, {**SUPPORTED.get(family, {}), **more}), build_tokenizer(), name=family)
    with pytest.raises(KvcliError, match=f"family '{family}' the rotation of queries cannot be undone"):
        model.prefill([[5, 6, 7]], NEEDS, [0])
    model.prefill([[5, 6, 7]], Needs(), [0])


def test_a_handle_that_does_not_fit_is_found_out() -> None:
    """Other frequencies than the model's own."""
    model = tiny.tiny_llama(layers=2)
    assert model.rope is not None
    model.rope = RopeHandle(model.rope.inv_freq * 1.1)
    with pytest.raises(KvcliError, match="cannot be undone"):
        model.prefill([[5, 6, 7]], NEEDS, [0])


@pytest.mark.parametrize("chunk", [1, 3, 16, 99, 5000])
def test_chunks_and_blocks_merge_exactly(exact: Model, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first chunk shorter than what is left out; blocks of 16 queries."""
    ids = tiny.prompt(100, 3).ids
    whole = exact.prefill([ids], NEEDS, [99]).dense(0)
    monkeypatch.setattr(moments_module, "_BLOCK_BYTES", 1)
    parts, _ = exact.prefill_one(ids, NEEDS, 99, chunk=chunk)
    assert_same(whole, parts)


def assert_same(a: Dense, b: Dense) -> None:
    assert a.moments.keys() == b.moments.keys() != set()
    for first, layers in a.moments.items():
        for x, y in zip(layers, b.moments[first], strict=True):
            torch.testing.assert_close(x.count, y.count)
            torch.testing.assert_close(x.mean, y.mean, atol=1e-9, rtol=0)
            torch.testing.assert_close(x.scatter, y.scatter, atol=1e-8, rtol=0)


@pytest.mark.parametrize("cuts", [(20, 50), (2, 3), (4, 50)])
def test_rows_behind_a_shared_prefix_have_their_own_moments(exact: Model, cuts: tuple[int, int]) -> None:
    """A prefix on a prefix; also one that ends within the first four."""
    head = tiny.prompt(50, 9).ids[: cuts[1]]
    tails = [tiny.prompt(n, n).ids for n in (5, 40, 1)]
    first = exact.prefill([head[: cuts[0]]], NEEDS, [0]).dense(0)
    prefix = exact.prefill([head[cuts[0] :]], NEEDS, [0], first).dense(0)
    shared = exact.prefill(tails, NEEDS, [0, 0, 0], prefix)
    for row, tail in enumerate(tails):
        assert_same(exact.prefill([head + tail], NEEDS, [0]).dense(0), shared.dense(row))


def test_16_bit_queries_are_rotated_back_in_float32() -> None:
    """Rounding them to 16 bit on the way back would add a second error of the same size."""
    generator = torch.Generator().manual_seed(0)
    model = tiny.tiny_llama(layers=1)
    assert model.rope is not None
    query = torch.randn(1, 4, 200, 16, generator=generator).to(torch.bfloat16)
    ones = torch.ones(1, 200)
    found = moments_module.query_moments(query, 900, ones, model.unrotate)
    positions = torch.arange(900, 1100)
    exact = model.rope.move(query.double(), positions, torch.zeros_like(positions))
    mean, cov = direct(exact[0])
    assert found.mean.dtype == torch.float32
    np.testing.assert_allclose(found.mean[0].numpy(), mean, atol=1e-4)
    np.testing.assert_allclose(found.covariance()[0].numpy(), cov, atol=2e-4)


def test_a_large_mean_does_not_swallow_the_covariance() -> None:
    """float32: queries with a bias of 1000 and a spread of 1, in 40 parts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 4000, 8, generator=generator) + 1000
    total = None
    for part in x.split(100, 2):
        one = Moments.of(part, torch.ones(1, 100))
        total = one if total is None else total.merged(one)
    assert total is not None
    mean, cov = direct(x[0].double())
    np.testing.assert_allclose(total.mean[0].numpy(), mean, atol=1e-3)
    np.testing.assert_allclose(total.covariance()[0].numpy(), cov, atol=1e-3)


def test_empty_parts_change_nothing() -> None:
    x = torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole, none = (Moments.of(x, torch.full((1, 9), float(c), dtype=torch.float64)) for c in (1, 0))
    for merged in (whole.merged(none), none.merged(whole)):
        torch.testing.assert_close(merged.mean, whole.mean, atol=1e-14, rtol=0)
        torch.testing.assert_close(merged.scatter, whole.scatter, atol=1e-14, rtol=0)
    both = none.merged(none)
    assert not both.mean.any() and not both.covariance().any()
