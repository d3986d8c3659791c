"""The Triton kernel of the column sums, interpreted on the CPU, against the reference; and compiled for GPUs that are
not here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcli.attention import backends, reference, sums
from tests.attention.interpreted import Interpreter

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

SMALL = (32, 16, 4, 2)
"""Keys, queries, warps, stages: several blocks of each already at 50 tokens."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


def make(
    dtype: torch.dtype = torch.float32, *, size: int = 50, dim: int = 64, heads: int = 4, kv_heads: int = 2,
    batch: int = 2, prefix: int = 0,
) -> tuple[Tensor, Tensor, Tensor, backends.Prefix | None]:  # fmt: skip
    """query, key, value, prefix; queries in the layout of a model's projection, so not contiguous."""
    generator = torch.Generator().manual_seed(size * dim + prefix)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = normal(batch, size, heads, dim).transpose(1, 2)
    key, value = normal(batch, kv_heads, size, dim), normal(batch, kv_heads, size, dim)
    before = (normal(kv_heads, prefix, dim), normal(kv_heads, prefix, dim)) if prefix else None
    return query, key, value, before


def weights_of(batch: int, size: int, *, names: int = 2) -> dict[str, Tensor]:
    """'all': ones with padding behind the rows; the others any numbers, zeros among them."""
    generator = torch.Generator().manual_seed(size)
    lengths = torch.tensor([max(1, size - 7 * row) for row in range(batch)])
    found = {"all": (torch.arange(size) < lengths[:, None]).float()}
    for i in range(1, names):
        found[f"sum{i}"] = torch.rand(batch, size, generator=generator).clamp_min(0.4) - 0.4
    return found


def check(
    interpreter: Interpreter, query: Tensor, key: Tensor, value: Tensor, prefix: backends.Prefix | None,
    weights: dict[str, Tensor], blocks: tuple[int, ...] | None = SMALL,
) -> Tensor:  # fmt: skip
    """Sums of the interpreted kernel from the fused kernel's logsumexp, compared with the reference's."""
    from kvcli.attention.triton_sums import Blocks

    scaling = query.shape[-1] ** -0.5
    fused = backends._fused(query, key, value, scaling, "sdpa", prefix, exact=True)
    assert fused is not None
    stacked, before = torch.stack(list(weights.values())), None if prefix is None else prefix[0]
    sizes = None if blocks is None else Blocks(*blocks)
    got = interpreter.column_sums(query, key, fused[1], scaling, stacked, before, sizes=sizes)
    _, truth = reference.prefill(query, *backends._joined(key, value, prefix), scaling, weights)
    expected = torch.stack(list(truth.values()))
    assert got.dtype == torch.float32 and got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_sums_equal_the_reference_for_all_head_dims_and_dtypes(
    interpreter: Interpreter, dim: int, dtype: torch.dtype
) -> None:
    check(interpreter, *make(dtype, dim=dim, batch=1), weights_of(1, 50))


@pytest.mark.parametrize("blocks", [SMALL, (16, 32, 4, 2), (64, 16, 4, 2)])
@pytest.mark.parametrize("size", [1, 16, 31, 70])
def test_lengths_need_not_be_multiples_of_a_block(interpreter: Interpreter, size: int, blocks: tuple[int, ...]) -> None:
    check(interpreter, *make(size=size, heads=2, kv_heads=1, batch=1), weights_of(1, size), blocks)


@pytest.mark.parametrize("group", [1, 4, 8])
def test_query_heads_of_a_group_have_sums_of_their_own(interpreter: Interpreter, group: int) -> None:
    got = check(interpreter, *make(heads=8, kv_heads=8 // group, size=35), weights_of(2, 35, names=1))
    assert len(got[0, 0].unique(dim=0)) == 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix", [1, 45])
def test_queries_behind_a_prefix_give_to_its_keys_and_their_own(
    interpreter: Interpreter, prefix: int, dtype: torch.dtype
) -> None:
    parts = make(dtype, size=21, batch=3, prefix=prefix, dim=96)
    got = check(interpreter, *parts, weights_of(3, 21))
    assert got.shape[-1] == prefix + 21


@pytest.mark.parametrize("names", [1, 2, 3])
def test_several_sums_come_from_one_call(interpreter: Interpreter, names: int) -> None:
    check(interpreter, *make(size=40), weights_of(2, 40, names=names))


def test_padding_gives_nothing_and_receives_nothing(interpreter: Interpreter) -> None:
    query, key, value, _ = make(size=40)
    query[1, :, 33:] = 30.0
    got = check(interpreter, query, key, value, None, weights_of(2, 40))
    assert not got[0, 1, :, 33:].any(), "only padding looks at padding keys"


def test_the_chosen_block_sizes_give_the_same_sums(interpreter: Interpreter) -> None:
    """150 tokens: two blocks of 128 keys, three of 64 queries."""
    check(interpreter, *make(torch.bfloat16, size=150, heads=2, kv_heads=1, batch=1), weights_of(1, 150), None)
    check(interpreter, *make(size=70, heads=2, kv_heads=1, batch=1, dim=256), weights_of(1, 70), None)


def test_sums_are_the_same_every_time(interpreter: Interpreter) -> None:
    runs = [check(interpreter, *make(torch.bfloat16, size=60, batch=1), weights_of(1, 60)) for _ in range(2)]
    assert torch.equal(*runs)


def test_large_scores_of_16_bit_models_stay_exact(interpreter: Interpreter) -> None:
    """Scores around 200, where a 16-bit score is off by 0.5. float32 itself rounds them by 1e-5."""
    query, key, value, _ = make(size=60, heads=2, kv_heads=1, batch=1)
    query, key, value = ((x + 5).to(torch.bfloat16) for x in (query, key, value))
    fused = backends._fused(query, key, value, 0.125, "sdpa", None, exact=True)
    assert fused is not None
    got = interpreter.column_sums(query, key, fused[1], 0.125, torch.ones(1, 1, 60))
    _, truth = reference.prefill(query, key, value, 0.125, {"all": torch.ones(1, 60)})
    torch.testing.assert_close(got[0], truth["all"], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("limit", [1 << 62, 227 << 10, 99 << 10, 64 << 10, 48 << 10])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_block_sizes_fit_the_shared_memory_of_a_device(itemsize: int, width: int, limit: int) -> None:
    from kvcli.attention.triton_sums import blocks

    found = blocks(width, itemsize, limit)
    assert found.shared(width, itemsize) <= limit
    assert min(found.keys, found.queries) >= 16 and found.stages >= 1


@pytest.mark.parametrize("capability, limit", [(80, 163 << 10), (90, 227 << 10)])
@pytest.mark.parametrize("dim, kind", [(96, "fp16"), (256, "bf16"), (128, "fp32")])
def test_the_kernel_compiles_for_gpus_and_fits_them(
    dim: int, kind: str, capability: int, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ampere and Hopper, without one: Triton brings its compiler. 16-bit products are on the matrix units."""
    import triton

    from kvcli.attention.triton_sums import blocks

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    width, itemsize = triton.next_power_of_2(dim), 4 if kind == "fp32" else 2
    done = compiled(dim, kind, capability, blocks(width, itemsize, limit))
    assert done.metadata.shared <= blocks(width, itemsize, limit).shared(width, itemsize)
    unit = {80: "#ttg.nvidia_mma<{versionMajor = 2", 90: "warp_group_dot"}[capability]
    assert (unit in done.asm["ttgir"]) == (kind != "fp32")


def compiled(dim: int, kind: str, capability: int, blocks: Any) -> Any:
    """The kernel with two sums and a causal mask, as a GPU of this capability would get it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kvcli.attention.triton_sums import _kernel

    names = _kernel.arg_names
    fixed = {
        "DIM": dim, "WIDTH": triton.next_power_of_2(dim), "KEYS": blocks.keys, "QUERIES": blocks.queries,
        "CAUSAL": True, "TWO": True, "PRECISION": "ieee",
    }  # fmt: skip
    pointers = {"query": kind, "key": kind, **dict.fromkeys(names[2:7], "fp32")}
    kinds = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in names}
    kinds |= {"scale": "fp32", **dict.fromkeys(fixed, "constexpr")}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in (*pointers, *names[7:13])}
    source = ASTSource(_kernel, kinds, {(names.index(n),): v for n, v in fixed.items()}, aligned)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def test_triton_runs_only_where_it_can_build_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    sums.triton_runs.cache_clear()
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr(sums.Path, "is_file", lambda path: path.name == "Python.h")
    assert sums.triton_runs()
    sums.triton_runs.cache_clear()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(sums.shutil, "which", lambda name: None)
    assert not sums.triton_runs()
    sums.triton_runs.cache_clear()
