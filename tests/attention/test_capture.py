"""Captured statistics against transformers' eager attention (equality 5), and every backend against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from kvcli.attention import backends, reference
from kvcli.attention.capture import Needs
from kvcli.attention.decode import decode
from kvcli.models.wrapper import Model
from tests.engine import tiny

NEEDS = Needs(frozenset({"all", "question"}), 16)


def random_qkv(
    dtype: torch.dtype, *, size: int, dim: int, heads: int = 4, kv_heads: int = 2, batch: int = 2
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(size * dim)

    def make(count: int) -> Tensor:
        return torch.randn(batch, count, size, dim, generator=generator, dtype=torch.float64).to(dtype)

    return make(heads), make(kv_heads), make(kv_heads)


def eager_attentions(model: Model, ids: list[int]) -> list[Tensor]:
    """Per layer [H, n, n] from transformers' own eager implementation."""
    model.hf.set_attn_implementation("eager")
    with torch.no_grad():
        return [a[0] for a in model.hf(torch.tensor([ids]), output_attentions=True).attentions]


@pytest.mark.parametrize("attn", ["blockwise", "sdpa", "reference"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_column_sums_and_windows_equal_eager_attention(attn: str, kv_heads: int) -> None:
    """float32, atol 1e-6 + rtol 1e-5, for rows of different lengths in one padded batch."""
    model = tiny.tiny_llama(layers=2, kv_heads=kv_heads)
    model.attn = attn
    prompts = [tiny.prompt(n, n).ids for n in (70, 33, 12)]
    starts = [60, 20, 11]
    done = model.prefill(prompts, NEEDS, starts)
    for row, ids in enumerate(prompts):
        n = len(ids)
        for layer, attention in enumerate(eager_attentions(model, ids)):
            sums = {"all": attention.sum(1), "question": attention[:, starts[row] :].sum(1)}
            for name, truth in sums.items():
                got = done.capture.column_sums[name][layer][row]
                torch.testing.assert_close(got[:, :n], truth, atol=1e-6, rtol=1e-5)
                assert not got[:, n:].any(), "padding keys received attention"
            queries = done.capture.window_queries[layer][row, :, -min(16, n) :]
            keys = done.keys[layer][row, :, :n]
            seen = reference.causal(queries.shape[1], n)
            p = reference.probabilities(queries[None], keys[None], done.capture.scaling[layer], seen)[0]
            torch.testing.assert_close(p, attention[:, -queries.shape[1] :], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("size", [1, 17, 130])
def test_backends_agree_with_the_reference(backend: str, dim: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BLOCK_BYTES", 40_000)  # several blocks, the last one short
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        query, key, value = random_qkv(dtype, size=size, dim=dim)
        weights = {
            "all": torch.ones(2, size, dtype=dtype),
            "some": (torch.arange(size) % 3 == 0).to(dtype).expand(2, -1),
        }
        out, sums = backends.prefill(query, key, value, dim**-0.5, weights, backend)
        truth, true_sums = reference.prefill(query, key, value, dim**-0.5, weights)
        torch.testing.assert_close(out, truth, atol=atol, rtol=0)
        for name in weights:
            torch.testing.assert_close(sums[name], true_sums[name], atol=atol * 10, rtol=0)


@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_column_sums_of_16_bit_models_are_exact(backend: str, dtype: torch.dtype) -> None:
    """Large logits: rounding them to 16 bit would move sums by percents, or overflow."""
    generator = torch.Generator().manual_seed(0)
    query = (torch.randn(1, 2, 200, 64, generator=generator) + 5).to(dtype)
    key = (torch.randn(1, 2, 200, 64, generator=generator) + 5).to(dtype)
    weights = {"all": torch.ones(1, 200)}
    _, sums = backends.prefill(query, key, key, 64**-0.5, weights, backend)
    _, truth = reference.prefill(query, key, key, 64**-0.5, weights)
    assert sums["all"].dtype == torch.float32
    rtol = 1e-4 if backend == "blockwise" else 5e-2  # the fused kernel's logsumexp is of 16-bit scores
    torch.testing.assert_close(sums["all"], truth["all"], rtol=rtol, atol=1e-3)


def test_decode_of_several_tokens_over_padded_rows_agrees_with_the_reference() -> None:
    query, key, value = random_qkv(torch.float64, size=9, dim=16)
    query = query[:, :, -3:]
    valid = torch.rand(2, 2, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    out = decode(query, key, value, 0.25, valid)
    seen = torch.ones(2, 2, 9, dtype=torch.bool)
    seen[:, :, :6] = valid
    visible = seen.repeat_interleave(2, 1)[:, :, None, :] & reference.causal(3, 9)
    p = reference.probabilities(query, key, 0.25, visible)
    torch.testing.assert_close(out, p @ value.repeat_interleave(2, 1), atol=1e-12, rtol=0)


def test_only_what_is_named_is_captured() -> None:
    model = tiny.tiny_llama(layers=1)
    done = model.prefill([tiny.prompt(20, 1).ids], Needs(), [0])
    assert done.capture.column_sums == {}
    assert done.capture.window_queries == []
    done = model.prefill([tiny.prompt(20, 1).ids], Needs.of(["window:4", "window:8"]), [0])
    assert done.capture.window_queries[0].shape[2] == 8
    with pytest.raises(ValueError, match="unknown statistic 'colum_sum'"):
        Needs.of(["colum_sum"])


def test_patch_is_undone_also_after_an_error() -> None:
    from kvcli.attention.patch import patched

    model = tiny.tiny_llama(layers=1)
    model.hf.set_attn_implementation("sdpa")
    before = model.hf.config._attn_implementation

    class Broken:
        def attend(self, *_: object) -> Tensor:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), patched(model.hf, Broken()):
        model.hf(torch.tensor([[1, 2]]))
    assert model.hf.config._attn_implementation == before
    model.hf(torch.tensor([[1, 2]]))
    with pytest.raises(RuntimeError, match="outside"):
        AttentionInterface()["kvcli"](None, *random_qkv(torch.float32, size=2, dim=8), None)


def test_importing_kvcli_changes_nothing_in_transformers(kvcli_python: object) -> None:
    code = (
        "import transformers as t, kvcli, kvcli.attention.patch, kvcli.models.wrapper\n"
        "from transformers import AttentionInterface\nprint('kvcli' in AttentionInterface().keys())"
    )
    assert kvcli_python(code).strip() == "False"  # type: ignore[operator]
