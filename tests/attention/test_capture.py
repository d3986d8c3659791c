"""Captured statistics against transformers' eager attention (equality 5), and every backend against the reference."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface

from kvcli.attention import backends, fused, reference
from kvcli.attention import sums as sums_module
from kvcli.attention.capture import Needs
from kvcli.attention.decode import decode, decode_with_weights
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
    """Large logits: rounding them to 16 bit would move sums by percents, or overflow; float32 itself by 1e-5."""
    generator = torch.Generator().manual_seed(0)
    query = (torch.randn(1, 2, 200, 64, generator=generator) + 5).to(dtype)
    key = (torch.randn(1, 2, 200, 64, generator=generator) + 5).to(dtype)
    weights = {"all": torch.ones(1, 200)}
    _, sums = backends.prefill(query, key, key, 64**-0.5, weights, backend)
    _, truth = reference.prefill(query, key, key, 64**-0.5, weights)
    assert sums["all"].dtype == torch.float32
    torch.testing.assert_close(sums["all"], truth["all"], rtol=1e-4, atol=1e-3)


def random_prefix(dtype: torch.dtype, *, length: int, dim: int, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length + dim)
    key, value = torch.randn(2, kv_heads, length, dim, generator=generator, dtype=torch.float64).to(dtype)
    return key, value


@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
@pytest.mark.parametrize("batch, size, prefix", [(1, 3, 1), (3, 7, 40), (2, 33, 16)])
def test_a_prefix_is_attended_to_as_if_it_stood_in_every_row(
    backend: str, batch: int, size: int, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums_module, "_TILE", 16)
    monkeypatch.setitem(sums_module._TILE_ELEMENTS, "cpu", 600)  # heads and rows in several tiles
    query, key, value = random_qkv(torch.float64, size=size, dim=20, batch=batch)
    before = random_prefix(torch.float64, length=prefix, dim=20)
    weights = {
        "all": torch.rand(batch, size, dtype=torch.float64),
        "last": (torch.arange(size) == size - 1).double().expand(batch, -1),
    }
    out, sums = backends.prefill(query, key, value, 0.3, weights, backend, before)
    truth, true_sums = reference.prefill(query, *backends._joined(key, value, before), 0.3, weights)
    torch.testing.assert_close(out, truth, atol=1e-12, rtol=0)
    for name in weights:
        torch.testing.assert_close(sums[name], true_sums[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_and_logsumexp_of_the_cpu_kernel_are_exact_where_they_are_used(dtype: torch.dtype) -> None:
    query, key, value = random_qkv(dtype, size=40, dim=64)
    query = query * 4
    done = fused.attention(query, key, value, 0.3, causal=True, package=False, exact=True)
    assert done is not None
    scores = query.double() @ key.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    truth = scores.masked_fill(~reference.causal(40, 40), float("-inf")).logsumexp(-1)
    torch.testing.assert_close(done[1].double(), truth, atol=1e-5, rtol=1e-6)
    exact, _ = reference.prefill(query, key, value, 0.3, {})
    torch.testing.assert_close(done[0], exact)


def test_attention_over_two_sets_of_keys_merges_into_attention_over_both() -> None:
    """Also where one of them gets next to nothing."""
    query, key, value = random_qkv(torch.float64, size=12, dim=16, kv_heads=4)

    def over(part: slice) -> tuple[Tensor, Tensor]:
        scores = query @ key[:, :, part].transpose(-1, -2)
        return scores.softmax(-1) @ value[:, :, part], scores.logsumexp(-1)

    key[:, :, 3] *= 100
    out, lse = fused.merged(over(slice(0, 5)), over(slice(5, 12)))
    truth = over(slice(0, 12))
    torch.testing.assert_close((out, lse), truth, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("value_dim", [8, 24])
def test_values_may_be_narrower_or_wider_than_keys(value_dim: int) -> None:
    query, key, _ = random_qkv(torch.float64, size=30, dim=16)
    value = torch.randn(2, 2, 30, value_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = {"all": torch.ones(2, 30)}
    out, sums = backends.prefill(query, key, value, 0.25, weights)
    truth, true_sums = reference.prefill(query, key, value, 0.25, weights)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(sums["all"], true_sums["all"])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 20])
@pytest.mark.parametrize("kernel", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
def test_kernels_for_cuda_are_called_as_pytorch_declares_them(
    kernel: str, dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without data: arguments and shapes are checked by PyTorch's own declarations, not the numbers."""
    query = torch.empty(2, 8, 33, dim, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, 2, 33 if causal else 57, dim, dtype=torch.bfloat16, device="meta")
    asked = []

    def choice(q: Tensor, k: Tensor, *_: object) -> SDPBackend:
        asked.append((q.shape[1], k.shape[1]))
        gqa = q.shape[1] != k.shape[1]
        return SDPBackend.MATH if kernel == "EFFICIENT_ATTENTION" and gqa else getattr(SDPBackend, kernel)

    monkeypatch.setattr(fused, "_choice", choice)
    done = fused._cuda(query, key, key, 0.125, causal)
    if kernel == "MATH":
        assert done is None and asked == [(8, 2), (8, 8)]
        return
    assert done is not None
    assert done[0].shape == query.shape and done[1].shape == (2, 8, 33) and done[1].dtype == torch.float32
    assert asked == ([(8, 2), (8, 8)] if kernel == "EFFICIENT_ATTENTION" else [(8, 2)]), "repeats only where it has to"
    assert fused._cuda(query.double(), key.double(), key.double(), 0.125, causal) is None


def test_a_logsumexp_of_another_shape_is_an_error() -> None:
    query = torch.empty(2, 8, 33, 64)
    for shape in ((2, 33, 8), (2, 8, 32), (8, 66)):
        with pytest.raises(RuntimeError, match="logsumexp has shape"):
            fused._rows(torch.empty(*shape), query)


def test_flash_attn_is_called_in_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, computed by the reference: [B, S, H, D] in, logsumexp [B, H, S] out."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, return_attn_probs: bool
    ) -> tuple[Tensor, Tensor, None]:
        assert return_attn_probs
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        assert k.shape[1] == 2, "GQA is the package's own"
        k, v = (x.repeat_interleave(q.shape[1] // 2, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * softmax_scale
        if causal:
            scores = scores.masked_fill(~reference.causal(q.shape[2], k.shape[2]), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1).float(), None

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    query, key, value = random_qkv(torch.float32, size=21, dim=16, batch=3)
    prefix = random_prefix(torch.float32, length=30, dim=16)
    weights = {"all": torch.ones(3, 21)}
    for before in (None, prefix):
        out, sums = backends.prefill(query, key, value, 0.25, weights, "flash", before)
        truth, true_sums = reference.prefill(query, *backends._joined(key, value, before), 0.25, weights)
        torch.testing.assert_close(out, truth)
        torch.testing.assert_close(sums["all"], true_sums["all"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["auto", "sdpa", "blockwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("prefix", [0, 300])
def test_backends_on_a_gpu_agree_with_the_reference(backend: str, dtype: torch.dtype, dim: int, prefix: int) -> None:
    query, key, value = (x.cuda() for x in random_qkv(dtype, size=321, dim=dim, heads=8))
    before = tuple(x.cuda() for x in random_prefix(dtype, length=prefix, dim=dim)) if prefix else None
    weights = {"all": torch.ones(2, 321, device="cuda"), "some": torch.rand(2, 321, device="cuda").round()}
    out, sums = backends.prefill(query, key, value, dim**-0.5, weights, backend, before)  # type: ignore[arg-type]
    joined = backends._joined(key, value, before)  # type: ignore[arg-type]
    truth, true_sums = reference.prefill(query, *joined, dim**-0.5, weights)
    torch.testing.assert_close(out, truth)
    for name in weights:
        torch.testing.assert_close(sums[name], true_sums[name], atol=1e-4, rtol=1e-3)


def test_decode_of_several_tokens_over_padded_rows_agrees_with_the_reference() -> None:
    query, key, value = random_qkv(torch.float64, size=9, dim=16)
    query = query[:, :, -3:]
    seen = torch.ones(2, 2, 9, dtype=torch.bool)
    seen[:, :, :6] = torch.rand(2, 2, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    by_kv_head = seen[:, :, None, :] & reference.causal(3, 9)
    out = decode(query, key, value, 0.25, by_kv_head)
    visible = by_kv_head.repeat_interleave(2, 1)
    p = reference.probabilities(query, key, 0.25, visible)
    torch.testing.assert_close(out, p @ value.repeat_interleave(2, 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_token_over_padded_rows_are_those_of_the_reference(dtype: torch.dtype) -> None:
    query, key, value = (x.to(dtype) for x in random_qkv(torch.float32, size=9, dim=16))
    query = query[:, :, -1:]
    by_kv_head = torch.rand(2, 2, 1, 9, generator=torch.Generator().manual_seed(1)) > 0.4
    out, weights = decode_with_weights(query, key, value, 0.25, by_kv_head)
    p = reference.probabilities(query, key, 0.25, by_kv_head.repeat_interleave(2, 1))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, p[:, :, 0], atol=1e-6, rtol=1e-5)
    plain = decode(query, key, value, 0.25, by_kv_head)
    torch.testing.assert_close(out, plain, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)


def test_only_what_is_named_is_captured() -> None:
    model = tiny.tiny_llama(layers=1)
    done = model.prefill([tiny.prompt(20, 1).ids], Needs(), [0])
    assert done.capture.column_sums == {}
    assert done.capture.window_queries == []
    done = model.prefill([tiny.prompt(20, 1).ids], Needs.of(["window:4", "window:8"]), [0])
    assert done.capture.window_queries[0].shape[2] == 8
    assert done.capture.moments == {} and done.capture.unrotate is None
    for unknown in ("colum_sum", "band_sum", "band_sum:0", "band_sum:0.3", "q_moments:", "q_moments:x", "window"):
        with pytest.raises(ValueError, match=f"unknown statistic '{unknown}'"):
            Needs.of([unknown])


def test_needs_of_several_methods_are_united() -> None:
    needs = Needs.of(["column_sum", "band_sum:4", "window:3", "band_sum:9", "q_moments:4", "q_moments", "window:8"])
    assert needs == Needs(frozenset({"all"}), 8, frozenset({4, 9}), frozenset({0, 4}))
    assert needs.sums == {"all": None, "band:4": 4, "band:9": 9}


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
