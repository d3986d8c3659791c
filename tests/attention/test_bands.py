"""Band sums against eager attention and plain loops: what each key receives from the queries close behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvcli.attention import backends, reference
from kvcli.attention import sums as sums_module
from kvcli.attention.capture import Needs, band
from kvcli.models.wrapper import Model
from tests.attention.test_capture import eager_attentions, random_prefix, random_qkv
from tests.engine import tiny
from tests.engine.asks import exact_model

WIDTHS = (1, 7, 40, 500)
NEEDS = Needs(frozenset({"all"}), 0, frozenset(WIDTHS))


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with exact_model() as model:
        yield model


def within_band(attention: Tensor, width: int) -> Tensor:
    """[H, n] of attention [H, n, n], by loops."""
    heads, n, _ = attention.shape
    sums = torch.zeros(heads, n, dtype=attention.dtype)
    for key in range(n):
        for query in range(key, min(n, key + width)):
            sums[:, key] += attention[:, query, key]
    return sums


@pytest.mark.parametrize("attn", ["blockwise", "sdpa", "reference"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_band_sums_equal_eager_attention(attn: str, kv_heads: int) -> None:
    """float32, atol 1e-6 + rtol 1e-5, for rows of different lengths in one padded batch."""
    model = tiny.tiny_llama(layers=2, kv_heads=kv_heads)
    model.attn = attn
    prompts = [tiny.prompt(n, n).ids for n in (70, 33, 12)]
    done = model.prefill(prompts, NEEDS, [0, 0, 0])
    for row, ids in enumerate(prompts):
        for layer, attention in enumerate(eager_attentions(model, ids)):
            for width in WIDTHS:
                got = done.capture.column_sums[band(width)][layer][row]
                torch.testing.assert_close(got[:, : len(ids)], within_band(attention, width), atol=1e-6, rtol=1e-5)
                assert not got[:, len(ids) :].any(), "padding keys received attention"


def by_loops(
    query: Tensor, key: Tensor, scaling: float, weight: Tensor, width: int, before: Tensor | None = None
) -> Tensor:
    """[B, H, P + S] in float64: queries [B, H, S, D] behind the keys `before` [H_kv, P, D]."""
    batch, heads, size, _ = query.shape
    group, first = heads // key.shape[1], 0 if before is None else before.shape[1]
    out = torch.zeros(batch, heads, first + size, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys = key[b, h // group] if before is None else torch.cat([before[h // group], key[b, h // group]])
            for i in range(size):
                seen = first + i + 1
                logits = [scaling * float(query[b, h, i].double() @ k.double()) for k in keys[:seen]]
                top = max(logits)
                total = sum(math.exp(x - top) for x in logits)
                for k in range(max(0, seen - width), seen):
                    out[b, h, k] += float(weight[b, i]) * math.exp(logits[k] - top) / total
    return out


@pytest.mark.parametrize("backend", ["blockwise", "sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size, prefix", [(1, 0), (37, 0), (3, 20), (37, 20), (20, 1)])
def test_every_backend_agrees_with_plain_loops(
    backend: str, dtype: torch.dtype, size: int, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not all one, several blocks of queries, bands that reach into the prefix and through it."""
    monkeypatch.setattr(backends, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(sums_module, "_BAND_BYTES", 1)
    query, key, value = random_qkv(dtype, size=size, dim=12)
    before = random_prefix(dtype, length=prefix, dim=12) if prefix else None
    weight = torch.rand(2, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    widths = {band(w): w for w in (1, 2, 18, 30, 100)}
    weights = {"all": weight, **dict.fromkeys(widths, weight)}
    _, sums = backends.prefill(query, key, value, 0.4, weights, backend, before, widths)
    room = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}[dtype]
    for name, width in widths.items():
        truth = by_loops(query, key, 0.4, weight, width, None if before is None else before[0])
        torch.testing.assert_close(sums[name].double(), truth, atol=room, rtol=0)
    torch.testing.assert_close(sums[band(100)], sums["all"], atol=room, rtol=0)


def test_a_later_keys_score_does_not_matter() -> None:
    """A key that no query of the block sees yet may be far above its logsumexp: nothing infinite reaches the sums."""
    query, key, _ = random_qkv(torch.float32, size=24, dim=8, batch=1)
    key[:, :, 20:] += 400 * query[:, ::2, :1]
    visible = reference.causal(24, 24)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    lse = scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
    sums = sums_module.banded(query, key, lse, 1.0, torch.ones(1, 24), 5)
    assert bool(sums.isfinite().all())
    p = reference.probabilities(query, key, 1.0, visible)
    torch.testing.assert_close(sums[0], within_band(p[0], 5), atol=1e-3, rtol=0)  # logits of thousands


@pytest.mark.parametrize("attn", ["blockwise", "sdpa"])
@pytest.mark.parametrize("chunk", [1, 7, 33, 99, 5000])
def test_chunks_and_prefixes_merge_exactly(
    exact: Model, attn: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "attn", attn)
    ids = tiny.prompt(100, 3).ids
    whole = exact.prefill([ids], NEEDS, [99]).dense(0)
    parts, _ = exact.prefill_one(ids, NEEDS, 99, chunk=chunk)
    for name, sums in whole.column_sums.items():
        for a, b in zip(sums, parts.column_sums[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_rows_behind_a_shared_prefix_have_their_own_bands(exact: Model) -> None:
    head = tiny.prompt(50, 9).ids
    tails = [tiny.prompt(n, n).ids for n in (5, 40, 17)]
    first = exact.prefill([head[:20]], NEEDS, [20]).dense(0)
    prefix = exact.prefill([head[20:]], NEEDS, [30], first).dense(0)
    shared = exact.prefill(tails, NEEDS, [0, 0, 0], prefix)
    for row, tail in enumerate(tails):
        alone = exact.prefill([head + tail], NEEDS, [0]).dense(0)
        for name, sums in alone.column_sums.items():
            for a, b in zip(sums, shared.dense(row).column_sums[name], strict=True):
                torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prefix", [0, 300])
def test_band_sums_on_a_gpu_agree_with_the_reference(dtype: torch.dtype, prefix: int) -> None:
    query, key, value = (x.cuda() for x in random_qkv(dtype, size=700, dim=64, heads=8))
    before = tuple(x.cuda() for x in random_prefix(dtype, length=prefix, dim=64)) if prefix else None
    widths = {band(w): w for w in (1, 200, 5000)}
    weights = {"all": torch.ones(2, 700, device="cuda"), **dict.fromkeys(widths, torch.ones(2, 700, device="cuda"))}
    _, sums = backends.prefill(query, key, value, 0.125, weights, "auto", before, widths)  # type: ignore[arg-type]
    joined = backends._joined(key, value, before)  # type: ignore[arg-type]
    _, truth = reference.prefill(query, *joined, 0.125, weights, widths)
    for name in weights:
        torch.testing.assert_close(sums[name], truth[name], atol=1e-4, rtol=1e-3)
