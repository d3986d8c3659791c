"""KIVI against its oracle, its error bound, and the traps of quantised caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcli.errors import KvcliError
from kvcli.methods._quantise import pack, unpack
from kvcli.methods.catalog import build
from tests.methods import storing
from tests.oracles.kivi import kivi

SETTINGS = [
    ("kivi", {}),
    ("kivi:bits=4", {"bits": 4}),
    ("kivi:group=8,residual=8", {"group": 8, "residual": 8}),
    ("kivi:group=4,residual=12,bits=4", {"group": 4, "residual": 12, "bits": 4}),
]


@pytest.mark.parametrize(("text", "settings"), SETTINGS)
@pytest.mark.parametrize("dim", [8, 20, 64])
@pytest.mark.parametrize(("n", "new"), [(1, 0), (12, 30), (31, 1), (32, 0), (33, 32), (70, 45)])
def test_what_is_read_and_its_bytes_are_the_oracles(
    text: str, settings: dict[str, int], dim: int, n: int, new: int
) -> None:
    ctx = storing.context(text, n, layers=1, dim=dim)
    layers = storing.stored(text, ctx, storing.kept("all", ctx))
    ((plain, *_),) = [storing.plain_heads(ctx, storing.kept("all", ctx))]
    added = storing.new_pairs(ctx, new)
    for pairs in added:
        storing.feed(layers, pairs)
    size = 0.0
    for h, (keys, values) in enumerate(storing.heads_of(layers)[0]):
        all_keys, all_values = (
            torch.cat([plain[h][which], *(pairs[0][which][h] for pairs in added)]) for which in (0, 1)
        )
        want_keys, want_values, taken = kivi(all_keys.numpy(), all_values.numpy(), **settings)
        assert np.allclose(keys.numpy(), want_keys, rtol=0, atol=1e-12)
        assert np.allclose(values.numpy(), want_values, rtol=0, atol=1e-12)
        size += taken
    assert storing.payload(layers) == size


@pytest.mark.parametrize(("bits", "share"), [(2, 0.1875), (4, 0.3125)])
def test_quantised_pairs_take_the_papers_share_of_16_bit(bits: int, share: float) -> None:
    """Generated pairs too: of 320 more tokens each costs exactly the share."""
    text = f"kivi:bits={bits}"
    assert build("kivi").settings() == {"bits": 2, "group": 32, "residual": 32}
    ctx = storing.context(text, 64, layers=1, dim=64, dtype=torch.float32)
    layers = storing.stored(text, ctx, storing.kept("all", ctx))
    before, token = storing.payload(layers), 2 * 2 * 64 * 2
    whole = 32 * 64 * 2 * 2  # the newest 32 values; all 64 keys are in full blocks
    assert before == 64 * token * share + whole * (1 - share)
    for pairs in storing.new_pairs(ctx, 320):
        storing.feed(layers, pairs)
    assert storing.payload(layers) - before == 320 * token * share


@pytest.mark.parametrize("bits", [2, 4])
def test_no_element_is_further_off_than_half_a_step(bits: int) -> None:
    text = f"kivi:bits={bits}"
    ctx = storing.context(text, 96, layers=1, dim=64)
    keys, values = (torch.stack(x) for x in zip(*storing.heads_of(storing.stored(text, ctx, storing.kept("all", ctx)))[0], strict=True))  # fmt: skip  # noqa: E501
    blocks = ctx.keys[0].unflatten(1, (3, 32))
    step = (blocks.amax(2) - blocks.amin(2)) / (2**bits - 1)
    off = (keys - ctx.keys[0]).abs().unflatten(1, (3, 32)).amax(2)
    assert bool((off <= step / 2 + 1e-12).all())
    assert bool((off > step / 4).all())  # of 32 numbers one lies near the middle between two codes
    groups = ctx.values[0].unflatten(-1, (2, 32))
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    off = (values - ctx.values[0]).abs().unflatten(-1, (2, 32)).amax(-1)
    assert bool((off[:, :64] <= step[:, :64] / 2 + 1e-12).all())
    assert bool((off[:, 64:] == 0).all())  # the newest 32 values are whole


def test_equal_numbers_are_stored_exactly() -> None:
    ctx = storing.context("kivi", 64, layers=1, dim=32)
    ctx.keys[0].fill_(0.1)
    ctx.values[0].fill_(-3.7)
    for keys, values in storing.heads_of(storing.stored("kivi", ctx, storing.kept("all", ctx)))[0]:
        assert bool((keys == 0.1).all())
        assert bool((values == -3.7).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_codes_come_back_and_take_their_bits(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for width in range(1, 40):
        codes = torch.randint(0, 2**bits, (2, 3, width), dtype=torch.uint8, generator=generator)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.shape[-1] == -(-width * bits // 8)
        assert torch.equal(unpack(packed, bits, width, torch.float64), codes.double())


def test_a_block_of_keys_is_quantised_when_it_is_full_and_a_value_when_it_is_the_33rd() -> None:
    ctx = storing.context("kivi", 31, layers=1, dim=32)
    layers = storing.stored("kivi", ctx, storing.kept("all", ctx))
    ((_, store),) = layers[0]
    held = []
    for pairs in storing.new_pairs(ctx, 34):
        storing.feed(layers, pairs)
        held.append((store.new_keys.shape[1], store.new_values.shape[1]))  # type: ignore[attr-defined]
    assert held[:3] == [(0, 32), (1, 32), (2, 32)]
    assert held[31:] == [(31, 32), (0, 32), (1, 32)]


def test_a_residual_that_no_groups_fill_is_refused() -> None:
    with pytest.raises(KvcliError, match="residual=40 is no multiple of group=32") as found:
        build("kivi:residual=40")
    assert found.value.fix == "residual=64"
    with pytest.raises(KvcliError, match="bits=8"):
        build("kivi:bits=8")
