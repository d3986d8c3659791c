"""Triton kernel of the column sums: one program per block of keys and query head, no atomics, so the same every time.

Queries are read from the last block backwards. Programs that run together then read the same queries at the same time,
which keeps them in the second-level cache, and those with most to do start first.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)

WIDEST = 256
"""Elements of the widest head the block sizes are made for."""
_ANY_GPU = 96 << 10
"""Shared memory that every GPU with the needed matrix units has, for where a device does not tell."""
_OWN = 2 << 10
"""Shared memory that the compiler takes for itself."""


@dataclass(frozen=True)
class Blocks:
    """Keys per program, queries per step, warps, and steps in flight."""

    keys: int
    queries: int
    warps: int
    stages: int

    def shared(self, width: int, itemsize: int) -> int:
        """Bytes of shared memory, at most: the keys stay, `stages` blocks of queries pass by."""
        return (self.keys + self.stages * self.queries) * width * itemsize + _OWN


def blocks(width: int, itemsize: int, limit: int) -> Blocks:
    """Fixed sizes per head width (a power of two), smaller where a program has less shared memory than `limit` bytes.

    Chosen, not searched for: by the compiler's counts of registers and shared memory two programs or more fit a
    multiprocessor of an A100 or H100, so that one computes exponentials while another multiplies, and 16-bit ones spill
    nothing. Not yet timed; benchmarks/gpu.py compares others. float32 goes without matrix units (they would round it to
    TF32) and takes small blocks.
    """
    if itemsize > 2:
        found = Blocks(32, 32, 8, 2)
    elif width <= 64:
        found = Blocks(128, 64, 4, 3)
    elif width <= 128:
        found = Blocks(64, 64, 4, 3)
    else:
        found = Blocks(64, 64, 4, 2)
    while found.shared(width, itemsize) > limit and found.queries > 16:
        if found.stages > 1:
            found = replace(found, stages=found.stages - 1)
        else:
            found = replace(found, keys=max(16, found.keys // 2), queries=found.queries // 2)
    return found


@triton.jit
def _shares(  # type: ignore[no-untyped-def]
    k, query, lse, start, queries, local_q, dims, q_row,
    scale, DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probabilities [keys, queries] of one block of queries; 0 for queries beyond the last."""
    inside = start + local_q < queries
    mask = inside[:, None] if WIDTH == DIM else inside[:, None] & (dims[None, :] < DIM)
    at = query + start.to(tl.int64) * q_row
    q = tl.load(at + local_q[:, None] * q_row + dims[None, :], mask=mask, other=0.0)
    base = tl.load(lse + start + local_q, mask=inside, other=float("inf"))
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    return tl.exp2(scores * scale - base[None, :] * LOG2_E)


@triton.jit
def _weigh(p, weights, start, queries, local_q):  # type: ignore[no-untyped-def]
    """[keys]: the sum over a block of queries."""
    weight = tl.load(weights + start + local_q, mask=start + local_q < queries, other=0.0)
    return tl.sum(p * weight[None, :], 1)


@triton.jit(do_not_specialize=["queries", "keys", "key_blocks", "offset", "out_row"])
def _kernel(  # type: ignore[no-untyped-def]
    query, key, lse, first_weights, second_weights, first_out, second_out,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    heads, group, queries, keys, key_blocks, offset, out_row, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
    CAUSAL: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of one query head. query, key: rows of DIM elements next to each other; lse, weights, out
    contiguous [B, H, Q], [B, Q], [B, H, out_row]. The first key's sum is at `offset` of its row. CAUSAL: query i sees
    keys 0..i, else all. TWO: a second sum with weights of its own."""
    block = tl.program_id(0) % key_blocks
    row = tl.program_id(0) // key_blocks
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    start = block * KEYS
    local_k = tl.arange(0, KEYS)
    local_q = tl.arange(0, QUERIES)
    dims = tl.arange(0, WIDTH)
    inside = start + local_k < keys
    mask = inside[:, None] if WIDTH == DIM else inside[:, None] & (dims[None, :] < DIM)
    at = key + batch * k_batch + (head // group) * k_head + start.to(tl.int64) * k_row
    k = tl.load(at + local_k[:, None] * k_row + dims[None, :], mask=mask, other=0.0)

    query += batch * q_batch + head * q_head
    lse += row.to(tl.int64) * queries
    first_weights += batch * queries
    second_weights += batch * queries
    first = tl.zeros([KEYS], dtype=tl.float32)
    second = tl.zeros([KEYS], dtype=tl.float32)

    query_blocks = tl.cdiv(queries, QUERIES)
    lowest = start // QUERIES if CAUSAL else 0
    unmasked = tl.minimum(tl.cdiv(start + KEYS - 1, QUERIES), query_blocks) if CAUSAL else 0
    for step in range(query_blocks - unmasked):
        begin = (query_blocks - 1 - step) * QUERIES
        p = _shares(k, query, lse, begin, queries, local_q, dims, q_row, scale, DIM, WIDTH, PRECISION)
        first += _weigh(p, first_weights, begin, queries, local_q)
        if TWO:
            second += _weigh(p, second_weights, begin, queries, local_q)
    if CAUSAL:
        for step in range(unmasked - lowest):
            begin = (unmasked - 1 - step) * QUERIES
            p = _shares(k, query, lse, begin, queries, local_q, dims, q_row, scale, DIM, WIDTH, PRECISION)
            p = tl.where(start + local_k[:, None] <= begin + local_q[None, :], p, 0.0)
            first += _weigh(p, first_weights, begin, queries, local_q)
            if TWO:
                second += _weigh(p, second_weights, begin, queries, local_q)

    to = row.to(tl.int64) * out_row + offset + start + local_k
    tl.store(first_out + to, first, mask=inside)
    if TWO:
        tl.store(second_out + to, second, mask=inside)


def column_sums(
    query: Tensor, key: Tensor, lse: Tensor, scaling: float, weights: Tensor, prefix: Tensor | None = None,
    sizes: Blocks | None = None,
) -> Tensor:  # fmt: skip
    """As sums.column_sums. weights [N, B, S], one sum for each; float32, bfloat16 or float16 queries and keys, heads of
    at most WIDEST elements. sizes: instead of `blocks` of this width and device. Returns [N, B, H, P + S], float32.
    """
    batch, heads, size, _ = query.shape
    before = 0 if prefix is None else prefix.shape[1]
    query, key = _dense(query), _dense(key)
    lse, weights = lse.to(torch.float32).contiguous(), weights.to(torch.float32).contiguous()
    out = torch.empty(len(weights), batch, heads, before + size, dtype=torch.float32, device=query.device)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        for at in range(0, len(weights), 2):
            pair = weights[at : at + 2], out[at : at + 2]
            _launch(query, key, lse, scaling, *pair, offset=before, causal=True, sizes=sizes)
            if prefix is not None:
                shared = _dense(prefix)[None].expand(batch, -1, -1, -1)
                _launch(query, shared, lse, scaling, *pair, offset=0, causal=False, sizes=sizes)
    return out


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    query: Tensor, key: Tensor, lse: Tensor, scaling: float, weights: Tensor, out: Tensor, *, offset: int,
    causal: bool, sizes: Blocks | None,
) -> None:  # fmt: skip
    """One or two sums over one set of keys [B, H_kv, S, D], into out [1 or 2, B, H, P + S] from `offset` on."""
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    width = max(16, triton.next_power_of_2(dim))
    sizes = sizes or blocks(width, query.element_size(), _shared_memory(query.device))
    key_blocks = triton.cdiv(keys, sizes.keys)
    _kernel[(key_blocks * batch * heads,)](
        query, key, lse, weights[0], weights[-1], out[0], out[-1],
        query.stride(0), query.stride(1), query.stride(2), key.stride(0), key.stride(1), key.stride(2),
        heads, heads // key.shape[1], queries, keys, key_blocks, offset, out.shape[-1], scaling * LOG2_E.value,
        DIM=dim, WIDTH=width, KEYS=sizes.keys, QUERIES=sizes.queries, CAUSAL=causal, TWO=len(weights) > 1,
        PRECISION="ieee", num_warps=sizes.warps, num_stages=sizes.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; without end where kernels are interpreted."""
    if device.type != "cuda":
        return 1 << 62
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", _ANY_GPU))
