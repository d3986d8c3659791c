"""MiniCache: the oracle's directions and outliers, lengths restored, bytes counted once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.methods import storing
from tests.oracles.minicache import angle, minicache


@pytest.mark.parametrize("form", storing.FORMS)
@pytest.mark.parametrize(("t", "gamma"), [(0.6, 0.05), (0.25, 0.4), (0.6, 0.0), (1.0, 0.05)])
def test_what_is_read_is_the_oracles(form: str, t: float, gamma: float) -> None:
    text = f"minicache:t={t},gamma={gamma}"
    ctx = storing.context(text, 60, layers=5)
    positions = storing.kept(form, ctx)
    plain = storing.plain_heads(ctx, positions)
    read = storing.heads_of(storing.stored(text, ctx, positions))
    for layer in (0, 1, 4):  # the shallow half, and the deepest layer, which has no partner
        assert storing.equal([read[layer]], [plain[layer]])
    for h in range(2):
        for which in (0, 1):
            first, second = plain[2][h][which].numpy(), plain[3][h][which].numpy()
            if len(first) > 1:
                one, two, _ = minicache(first[:-1], second[:-1], t=t, gamma=gamma)
                assert np.allclose(read[2][h][which][:-1].numpy(), one, atol=1e-9)
                assert np.allclose(read[3][h][which][:-1].numpy(), two, atol=1e-9)
            assert np.array_equal(read[2][h][which][-1].numpy(), first[-1])
            assert np.array_equal(read[3][h][which][-1].numpy(), second[-1])


def test_lengths_are_restored_and_directions_lie_on_the_arc() -> None:
    """A merged pair's direction is t of their angle away from the first layer's and 1 - t from the second's."""
    ctx = storing.context("minicache", 80, layers=2)
    layers = storing.stored("minicache:start=0", ctx, storing.kept("all", ctx))
    read, plain = storing.heads_of(layers), storing.plain_heads(ctx, storing.kept("all", ctx))
    seen = 0
    for h in range(2):
        for which in (0, 1):
            first, second = plain[0][h][which][:-1].numpy(), plain[1][h][which][:-1].numpy()
            _, _, apart = minicache(first, second)
            for i in range(79):
                own = (first[i], second[i])
                new = [read[layer][h][which][i].numpy() for layer in (0, 1)]
                if i in apart:
                    assert all(np.array_equal(a, b) for a, b in zip(own, new, strict=True))
                    seen += 1
                    continue
                whole = angle(*own)
                for a, b, part in zip(own, new, (0.6, 0.4), strict=True):
                    assert math.isclose(float(np.linalg.norm(a)), float(np.linalg.norm(b)), rel_tol=1e-9)
                    assert math.isclose(angle(a, b), part * whole, rel_tol=1e-6)
    assert 4 <= seen < 40


def test_equal_layers_are_stored_exactly() -> None:
    ctx = storing.context("minicache", 40, layers=2)
    ctx.keys[1], ctx.values[1] = 2 * ctx.keys[0], 0.5 * ctx.values[0]
    positions = storing.kept("all", ctx)
    read = storing.heads_of(storing.stored("minicache:start=0", ctx, positions))
    assert storing.equal(read, storing.plain_heads(ctx, positions), rtol=1e-6, atol=0)


def test_zero_vectors_stay_zero() -> None:
    ctx = storing.context("minicache", 10, layers=2)
    ctx.keys[0][:, :4] = 0
    read = storing.heads_of(storing.stored("minicache:start=0", ctx, storing.kept("all", ctx)))
    assert all(bool((keys[:4] == 0).all()) and bool(keys.isfinite().all()) for keys, _ in read[0])


def test_bytes_are_one_direction_two_lengths_and_the_outliers() -> None:
    ctx = storing.context("minicache:gamma=0", 101, layers=4, dim=64)
    layers = storing.stored("minicache:gamma=0", ctx, storing.kept("all", ctx))
    one = 2 * 2 * 64 * 2
    whole, merged = 101 * one, 100 * (one + 2 * 2 * 2 * 2) + 2 * one
    assert storing.payload(layers) == 2 * whole + merged
    assert 0.75 < storing.payload(layers) / (4 * whole) < 0.78
    more = storing.stored("minicache", ctx, storing.kept("all", ctx))
    apart = sum(
        len(minicache(ctx.keys[2][h, :-1].numpy(), ctx.keys[3][h, :-1].numpy())[2])
        + len(minicache(ctx.values[2][h, :-1].numpy(), ctx.values[3][h, :-1].numpy())[2])
        for h in range(2)
    )
    assert storing.payload(more) == storing.payload(layers) + apart * (4 + 2 * 64 * 2)


def test_layers_that_hold_other_tokens_are_refused() -> None:
    ctx = storing.context("minicache", 40)
    more = [torch.arange(40)] * 3 + [torch.arange(5, 40)]
    with pytest.raises(ValueError, match="layers 2 and 3 kept different ones"):
        storing.stored("minicache", ctx, more)
    with pytest.raises(ValueError, match="layers 2 and 3 kept different ones"):
        storing.transform("minicache").check(ctx, [[40, 40]] * 3 + [[35, 35]])
    other = [torch.arange(39)] * 2 + [torch.arange(39), torch.cat([torch.arange(38), torch.tensor([39])])]
    with pytest.raises(ValueError, match="layers 2 and 3 kept different ones"):
        storing.stored("minicache", ctx, other)
    shallow = [torch.arange(10), torch.arange(40), torch.arange(20), torch.arange(20)]
    assert len(storing.stored("minicache", ctx, shallow)) == 4
