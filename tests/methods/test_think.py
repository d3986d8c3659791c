"""ThinK: the oracle's channels, removed for real, and nothing else changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcli.cache.rows import head_positions
from tests.methods import storing
from tests.oracles.harness import context_for
from tests.oracles.prompts import random_prompt
from tests.oracles.think import think


@pytest.mark.parametrize("form", storing.FORMS)
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(("n", "prune", "window"), [(20, "0.4", 32), (33, "0.4", 32), (90, "0.4", 32), (60, "0.29", 7)])
def test_channels_and_bytes_are_the_oracles(form: str, group: int, n: int, prune: str, window: int) -> None:
    text = f"think:prune={prune},window={window}"
    prompt = random_prompt(n, group=group, layers=2, dim=20, regions="plain", seed=group)
    ctx = context_for(storing.transform(text), prompt)
    positions = storing.kept(form, ctx)
    layers = storing.stored(text, ctx, positions)
    size = 0.0
    for layer, read in enumerate(storing.heads_of(layers)):
        for head, (keys, values) in enumerate(read):
            kept = head_positions(positions[layer], 2)[head].tolist()
            wanted, _, taken = think(prompt, layer, head, kept, prune=prune, window=window)
            assert np.array_equal(keys.numpy(), wanted), (layer, head)
            assert np.array_equal(values.numpy(), prompt.values[layer][head][kept])
            size += taken
    assert storing.payload(layers) == size


def test_removed_channels_are_not_stored() -> None:
    """Zeroed channels save nothing: the stored keys have D - int(0.4 D) channels."""
    ctx = storing.context("think", 100, layers=1, dim=64)
    layers = storing.stored("think", ctx, storing.kept("all", ctx))
    ((_, store),) = layers[0]
    assert store.old.shape == (2, 68, 64 - 25)  # type: ignore[attr-defined]
    assert store.old.untyped_storage().nbytes() == 2 * 68 * 39 * 8  # type: ignore[attr-defined]
    full = 100 * 2 * 64 * 2 * 2
    assert storing.payload(layers) == full - 68 * 25 * 2 * 2 + 2 * 39


def test_the_error_is_what_was_removed_and_the_least_that_the_score_sees() -> None:
    """Kept channels and values are untouched; the keys' error is the removed channels' norm."""
    ctx = storing.context("think", 80, layers=1, dim=32)
    layers = storing.stored("think", ctx, storing.kept("all", ctx))
    ((_, store),) = layers[0]
    for h, (keys, _) in enumerate(storing.heads_of(layers)[0]):
        own = ctx.keys[0][h]
        stay = store.kept[h].long()  # type: ignore[attr-defined]
        gone = torch.tensor([c for c in range(32) if c not in stay.tolist()])
        assert torch.equal(keys[:, stay], own[:, stay])
        assert bool((keys[:48, gone] == 0).all())
        assert torch.equal(keys[48:], own[48:])
        assert torch.allclose((keys - own).norm(), own[:48][:, gone].norm())
        asked = ctx.window_queries[0][h * 2 : h * 2 + 2, -32:].flatten(0, 1)
        score = asked.norm(dim=0) * own[:48].norm(dim=0)
        assert score[gone].max() < score[stay].min()


def test_channels_with_equal_scores_stay_from_the_first_on() -> None:
    ctx = storing.context("think:prune=0.5,window=4", 20, layers=1, dim=8)
    ctx.keys[0].fill_(1.0)
    ctx.window_queries[0].fill_(1.0)
    ((_, store),) = storing.stored("think:prune=0.5,window=4", ctx, storing.kept("all", ctx))[0]
    assert store.kept.tolist() == [[0, 1, 2, 3]] * 2  # type: ignore[attr-defined]


def test_pruning_nothing_and_everything() -> None:
    ctx = storing.context("think", 50, layers=1)
    whole = storing.stored("think:prune=0", ctx, storing.kept("all", ctx))
    assert storing.equal(storing.heads_of(whole), storing.plain_heads(ctx, storing.kept("all", ctx)))
    none = storing.heads_of(storing.stored("think:prune=1", ctx, storing.kept("all", ctx)))
    assert all(bool((keys[:18] == 0).all()) and bool((keys[18:] != 0).all()) for keys, _ in none[0])
