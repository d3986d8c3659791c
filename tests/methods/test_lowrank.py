"""Low rank: the best approximation of its rank, rotated back exactly, with its directions counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcli.cache.rows import head_positions
from tests.methods import storing
from tests.oracles.lowrank import best_of_rank, rotated, side_by_side

FREQUENCIES = [1e4 ** -(2 * j / 16) for j in range(8)]


@pytest.mark.parametrize("form", ["all", "layer", "head", "ragged"])
def test_what_is_read_is_the_oracles(form: str) -> None:
    """Heads that hold the same tokens are approximated together, other ones alone."""
    text = "lowrank:keys=0.5,values=0.25,group=2"
    ctx = storing.context(text, 60, kv_heads=4, layers=2)
    positions = storing.kept(form, ctx)
    together = form in ("all", "layer")
    for layer, read in enumerate(storing.heads_of(storing.stored(text, ctx, positions))):
        places = [p.tolist()[:-1] for p in head_positions(positions[layer], 4)]
        back = [rotated(ctx.keys[layer][h].numpy()[p], [-x for x in p], FREQUENCIES) for h, p in enumerate(places)]
        values = [ctx.values[layer][h].numpy()[p] for h, p in enumerate(places)]
        if together:
            keys = side_by_side(back, 32)
            values = [*side_by_side(values[:2], 8), *side_by_side(values[2:], 8)]
        else:
            keys, values = ([best_of_rank(x, rank) for x in xs] for xs, rank in ((back, 8), (values, 4)))
        for h, p in enumerate(places):
            assert np.allclose(read[h][0][:-1].numpy(), rotated(keys[h], p, FREQUENCIES), atol=1e-9)
            assert np.allclose(read[h][1][:-1].numpy(), values[h], atol=1e-9)
            assert torch.equal(read[h][0][-1], ctx.keys[layer][h, -1])
            assert torch.equal(read[h][1][-1], ctx.values[layer][h, -1])


def test_the_error_is_the_discarded_singular_values() -> None:
    text = "lowrank:keys=0.25,values=0.5,group=4"
    ctx = storing.context(text, 100, kv_heads=2, layers=1)
    read = storing.heads_of(storing.stored(text, ctx, storing.kept("all", ctx)))[0]
    places = torch.arange(99)
    assert ctx.rope is not None
    before = ctx.rope.move(ctx.keys[0][:, :99], places, torch.zeros_like(places))
    for which, plain, rank in ((0, before, 8), (1, ctx.values[0][:, :99], 16)):
        values = torch.linalg.svdvals(plain.transpose(0, 1).flatten(1))
        own = (ctx.keys, ctx.values)[which][0][:, :99]
        off = torch.stack([pair[which][:99] for pair in read]) - own
        assert torch.allclose(off.norm(), values[rank:].norm())  # a rotation changes no length


def test_full_rank_is_exact() -> None:
    text = "lowrank:keys=1,values=1"
    ctx = storing.context(text, 60, layers=1)
    positions = storing.kept("layer", ctx)
    read = storing.heads_of(storing.stored(text, ctx, positions))
    assert storing.equal(read, storing.plain_heads(ctx, positions), rtol=0, atol=1e-10)


def test_keys_are_of_lower_rank_before_their_rotation() -> None:
    """Why they are turned back: one vector, rotated by its positions, has rank 1 before and a high one after."""
    ctx = storing.context("lowrank:keys=0.03125,values=1", 80, layers=1)
    assert ctx.rope is not None
    one = ctx.keys[0][:, :1].expand(-1, 80, -1).contiguous()
    places = torch.arange(80)
    ctx.keys[0] = ctx.rope.move(one, torch.zeros_like(places), places)
    read = storing.heads_of(storing.stored("lowrank:keys=0.03125,values=1", ctx, storing.kept("all", ctx)))
    assert storing.equal(read, storing.plain_heads(ctx, storing.kept("all", ctx)), rtol=0, atol=1e-10)
    assert torch.linalg.matrix_rank(ctx.keys[0].transpose(0, 1).flatten(1)) > 10


@pytest.mark.parametrize(("form", "tables"), [("all", 0), ("layer", 4 * 65), ("head", 2 * 4 * 65)])
def test_bytes_are_coefficients_directions_and_positions(form: str, tables: int) -> None:
    """By hand: 2 KV heads of 16, keys of rank 5 of 32 (0.15625), values of rank 16 of 32."""
    ctx = storing.context("lowrank", 99 if form != "all" else 66, layers=1)
    layers = storing.stored("lowrank", ctx, storing.kept(form, ctx))
    rows, last = 65, 2 * 2 * 16 * 2
    if form == "head":  # each alone: rank round(2.5) = 3 of 16, and 8 of 16
        factors = 2 * 2 * (3 + 8) * (rows + 16)
    else:
        factors = 2 * (5 + 16) * (rows + 32)
    assert storing.payload(layers) == factors + tables + last


def test_a_prompt_is_decomposed_once_for_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = storing.context("lowrank", 50, layers=2)
    calls, svd = [], torch.linalg.svd

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return svd(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.linalg, "svd", counted)
    for _ in range(3):
        storing.stored("lowrank", ctx, storing.kept("all", ctx))
    assert len(calls) == 4
    storing.stored("lowrank:keys=0.5", ctx, storing.kept("all", ctx))
    assert len(calls) == 6  # other keys, the same values


def test_a_model_whose_keys_cannot_be_turned_is_refused() -> None:
    ctx = storing.context("lowrank", 20)
    ctx.rope = None
    with pytest.raises(ValueError, match="cannot be turned back"):
        storing.stored("lowrank", ctx, storing.kept("all", ctx))
