"""Quantised caches: the oracle, error bounds, generated tokens, and libraries that are missing or there."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from kvcli.errors import Exit, KvcliError
from kvcli.methods.catalog import build
from tests.methods import storing
from tests.oracles.quant import e4m3, quant

DTYPES = ["int8", "int4", "fp8"]


@pytest.mark.parametrize("dim", [8, 20, 64, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_and_its_bytes_are_the_oracles(dtype: str, dim: int) -> None:
    text = f"quant:dtype={dtype}"
    ctx = storing.context(text, 30, layers=1, dim=dim)
    layers = storing.stored(text, ctx, storing.kept("all", ctx))
    added = storing.new_pairs(ctx, 9)
    for pairs in added:
        storing.feed(layers, pairs)
    size = 0.0
    for h, (keys, values) in enumerate(storing.heads_of(layers)[0]):
        all_keys, all_values = (
            torch.cat([x[0][h], *(pairs[0][which][h] for pairs in added)])
            for which, x in enumerate((ctx.keys, ctx.values))
        )
        want_keys, want_values, taken = quant(all_keys.numpy(), all_values.numpy(), dtype=dtype)
        close = {"rtol": 2e-7, "atol": 0} if dtype == "fp8" else {"rtol": 0, "atol": 1e-12}
        assert np.mean(~np.isclose(keys.numpy(), want_keys, **close)) <= (0.001 if dtype == "fp8" else 0)
        assert np.mean(~np.isclose(values.numpy(), want_values, **close)) <= (0.001 if dtype == "fp8" else 0)
        size += taken
    assert storing.payload(layers) == size


@pytest.mark.parametrize(("dtype", "share"), [("int8", 8.5 / 16), ("int4", 4.5 / 16), ("fp8", (8 + 16 / 64) / 16)])
def test_prompt_and_generated_pairs_take_the_same_share_of_16_bit(dtype: str, share: float) -> None:
    text = f"quant:dtype={dtype}"
    ctx = storing.context(text, 50, layers=1, dim=64, dtype=torch.float32)
    layers = storing.stored(text, ctx, storing.kept("all", ctx))
    token = 2 * 2 * 64 * 2
    assert storing.payload(layers) == 50 * token * share
    for new, pairs in enumerate(storing.new_pairs(ctx, 20), 1):
        storing.feed(layers, pairs)
        assert storing.payload(layers) == (50 + new) * token * share


@pytest.mark.parametrize(("dtype", "codes"), [("int8", 255), ("int4", 15)])
def test_no_element_is_further_off_than_half_a_step(dtype: str, codes: int) -> None:
    text = f"quant:dtype={dtype}"
    ctx = storing.context(text, 40, layers=1, dim=64)
    read = storing.heads_of(storing.stored(text, ctx, storing.kept("all", ctx)))[0]
    for which, plain in enumerate((ctx.keys[0], ctx.values[0])):
        off = (torch.stack([pair[which] for pair in read]) - plain).abs()
        step = (plain.amax(-1) - plain.amin(-1)) / codes
        assert bool((off.amax(-1) <= step / 2 + 1e-12).all())
        assert bool((off.amax(-1) > step / 4).all())


def test_8_bit_floats_are_off_by_a_16th_at_most() -> None:
    """Half of the step of 3 bits of mantissa; below the smallest normal number half of the smallest step."""
    ctx = storing.context("quant:dtype=fp8", 40, layers=1, dim=64)
    read = storing.heads_of(storing.stored("quant:dtype=fp8", ctx, storing.kept("all", ctx)))[0]
    for which, plain in enumerate((ctx.keys[0], ctx.values[0])):
        off = (torch.stack([pair[which] for pair in read]) - plain).abs()
        scale = plain.abs().amax(-1, keepdim=True) / 448
        assert bool((off <= torch.maximum(plain.abs() / 16, scale * 2**-10) * (1 + 1e-6)).all())
        assert bool(
            (torch.stack([p[which] for p in read]).abs().amax(-1) / plain.abs().amax(-1) - 1).abs().max() < 1e-6
        )


def test_the_oracles_8_bit_floats_are_the_known_ones() -> None:
    """By hand: the largest, the smallest, ties to even, and what is larger than the largest."""
    known = {448.0: 448.0, 500.0: 448.0, 2**-9: 2**-9, 2**-10: 0.0, 1.0625: 1.0, 1.1875: 1.25, -17.0: -16.0, 0.0: 0.0}
    assert {x: e4m3(x) for x in known} == known


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("quant:backend=quanto,dtype=fp8", "quanto has no fp8 cache", "backend=own"),
        ("quant:backend=quanto", "quanto's cache has 2 and 4 bits only", "dtype=int4"),
    ],
)
def test_what_a_library_cannot_do_is_refused(text: str, what: str, fix: str) -> None:
    with pytest.raises(KvcliError, match=what) as found:
        build(text)
    assert found.value.fix == fix


@pytest.mark.parametrize(
    ("backend", "line"), [("quanto", "pip install 'optimum-quanto>=0.2.5'"), ("hqq", "pip install 'hqq>=0.2.1'")]
)
def test_a_missing_library_is_refused_with_the_line_that_installs_it(
    backend: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(KvcliError, match=f"{backend} is not installed") as found:
        build(f"quant:backend={backend},dtype=int4")
    assert found.value.fix == line
    assert found.value.code == Exit.ENVIRONMENT


def there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"quant:backend={backend},dtype={dtype},residual=8", marks=marks)
        for backend, dtype, module in (
            ("quanto", "int4", "optimum.quanto"), ("hqq", "int4", "hqq"), ("hqq", "int8", "hqq"))
        for marks in [pytest.mark.skipif(not there(module), reason=f"{module} is not installed")]
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", storing.FORMS)
def test_a_library_stores_and_reads_all_pairs(text: str, form: str) -> None:
    for n in (1, 2, 40):
        ctx = storing.context(text, n, layers=2, dim=32, dtype=torch.float32)
        positions = storing.kept(form, ctx)
        layers = storing.stored(text, ctx, positions)
        wanted = storing.plain_heads(ctx, positions)
        for pairs in storing.new_pairs(ctx, 21):
            storing.feed(layers, pairs)
            wanted = [
                [(torch.cat([k, nk[h]]), torch.cat([v, nv[h]])) for h, (k, v) in enumerate(layer)]
                for layer, (nk, nv) in zip(wanted, pairs, strict=True)
            ]
        most = 0.05 if "int8" in text else 0.5
        assert storing.equal(storing.heads_of(layers), wanted, rtol=0, atol=most)
        assert not storing.equal(storing.heads_of(layers), wanted)
        assert storing.payload(layers) == storing.real_bytes(layers)
        assert storing.payload(layers) < sum(k.numel() * 4 for layer in wanted for k, _ in layer)
