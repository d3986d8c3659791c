"""Column sums from queries, keys and logsumexp of a finished attention: one more pass over the keys, no n x n tensor.

A Triton kernel on CUDA (triton_sums.py); elsewhere, and where Triton cannot run, tiles that stay in the cache.
"""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
"""exp(x) = exp2(x * LOG2_E); exp2 is the function that CPUs and GPUs have."""

_TILE = 512
"""Queries and keys per tile: its probabilities (1 MiB) stay in a core's second-level cache."""
_BAND_BYTES = 32 << 20
"""Probabilities of a band at a time."""
_TILE_ELEMENTS = {"cpu": _TILE * _TILE, "cuda": 1 << 24}
"""Probabilities at a time; short rows share a tile."""


def column_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scaling: float,
    weights: dict[str, Tensor],
    prefix: Tensor | None = None,
    bands: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Sum over the queries of weight times probability, for each key.

    query [B, H, S, D]; key [B, H_kv, S, D]; lse [B, H, S]: natural logsumexp of each query's scaled scores over all
    it sees; prefix [H_kv, P, D]: keys before every row; weights[name] [B, S]; bands[name]: a sum of that name takes
    only queries less than so many positions behind the key. Returns [B, H, P + S] per name, float32 at least.
    """
    widths = bands or {}
    near = {
        name: banded(query, key, lse, scaling, weight, widths[name], prefix)
        for name, weight in weights.items()
        if name in widths
    }
    names = [name for name in weights if name not in widths]
    if not names:
        return near
    stacked = torch.stack([weights[name] for name in names])
    if query.device.type == "cuda" and query.dtype != torch.float64 and query.shape[-1] <= 256 and triton_runs():
        from kvcli.attention import triton_sums

        sums = triton_sums.column_sums(query, key, lse, scaling, stacked, prefix)
    else:
        sums = tiled(query, key, lse, scaling, stacked, prefix)
    return {**dict(zip(names, sums.unbind(0), strict=True)), **near}


@cache
def triton_runs() -> bool:
    """Whether Triton is installed, can build its launcher (a C compiler and Python's headers) and knows these GPUs
    (compute capability 8.0 and newer)."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # where Debian has them
    headers = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    if find_spec("triton") is None or compiler is None or not headers.is_file():
        return False
    return all(torch.cuda.get_device_capability(i) >= (8, 0) for i in range(torch.cuda.device_count()))


def tiled(
    query: Tensor, key: Tensor, lse: Tensor, scaling: float, weights: Tensor, prefix: Tensor | None = None
) -> Tensor:
    """As column_sums, in PyTorch. weights [N, B, S], one sum for each; returns [N, B, H, P + S]."""
    batch, heads, size, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    exact = torch.promote_types(query.dtype, torch.float32)  # 16-bit scores would move sums by percents
    rows = (query.to(exact) * (scaling * LOG2_E)).view(batch, kv_heads, group, size, dim)
    bases = (lse.to(exact) * -LOG2_E).view(batch, kv_heads, group, size)
    shares = weights.to(exact).permute(1, 0, 2)[:, None, None].expand(-1, kv_heads, group, -1, -1)  # [B, K, G, N, S]
    own = _tiles(*(x.flatten(0, 1) for x in (rows, key.to(exact), bases, shares)), causal=True)
    sums = own.view(batch, kv_heads, group, -1, size)
    if prefix is not None:  # its keys are the same for every row: rows count as more heads of a group
        by_row, by_base, by_share = (x.transpose(0, 1).flatten(1, 2) for x in (rows, bases, shares))
        before = _tiles(by_row, prefix.to(exact), by_base, by_share, causal=False)
        before = before.view(kv_heads, batch, group, *before.shape[2:]).transpose(0, 1)
        sums = torch.cat([before, sums], -1)
    return sums.flatten(1, 2).permute(2, 0, 1, 3)


def banded(
    query: Tensor, key: Tensor, lse: Tensor, scaling: float, weight: Tensor, width: int, prefix: Tensor | None = None
) -> Tensor:
    """As column_sums, of the queries less than `width` positions behind a key: [B, H, P + S]. weight [B, S].

    In PyTorch on any device: a block of queries reads only the keys of its band.
    """
    batch, heads, size, dim = query.shape
    kv_heads = key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    rows = (query.to(exact) * (scaling * LOG2_E)).view(batch, kv_heads, -1, size, dim)
    bases = (lse.to(exact) * -LOG2_E).view(batch, kv_heads, -1, size)
    shares = weight.to(exact)[:, None, None, None]
    before = 0 if prefix is None else prefix.shape[1]
    tail = min(before, width - 1)
    keys = key.to(exact)
    if prefix is not None and tail:
        keys = torch.cat([prefix[:, before - tail :].to(exact).expand(batch, -1, -1, -1), keys], 2)
    sums = rows.new_zeros(*rows.shape[:3], before + size)
    seen = min(tail + size, width + _TILE)
    high = max(16, min(size, _TILE, _BAND_BYTES // (batch * heads * seen * 4)))
    for start in range(0, size, high):
        end = min(size, start + high)
        low = max(0, tail + start - width + 1)
        part = keys[:, :, low : tail + end]
        block = rows[:, :, :, start:end].flatten(2, 3)
        p = torch.baddbmm(
            bases[:, :, :, start:end].reshape(batch * kv_heads, -1, 1),
            block.flatten(0, 1),
            part.flatten(0, 1).transpose(1, 2),
        ).exp2_()
        p = p.view(*rows.shape[:3], end - start, -1)
        apart = torch.arange(tail + start, tail + end)[:, None] - torch.arange(low, tail + end)
        p.masked_fill_(((apart < 0) | (apart >= width)).to(p.device), 0)  # a later key's may be infinite
        at = slice(before - tail + low, before + end)
        sums[..., at] += (shares[..., start:end] @ p).squeeze(-2)
    return sums.flatten(1, 2)


def _tiles(rows: Tensor, keys: Tensor, bases: Tensor, shares: Tensor, *, causal: bool) -> Tensor:
    """rows [X, M, Q, D] against keys [X, S, D] -> [X, M, N, S]: sums of shares [X, M, N, Q] times
    exp2(rows keys^T + bases), bases [X, M, Q]."""
    count, members, size, dim = rows.shape
    length = keys.shape[1]
    high, wide = min(size, _TILE), min(length, _TILE)
    most = _TILE_ELEMENTS.get(rows.device.type, _TILE * _TILE)
    some = max(1, min(members, most // (high * wide)))
    many = max(1, min(count, most // (high * wide * some)))
    sums = rows.new_zeros(count, members, shares.shape[2], length)
    memory = rows.new_empty(many * some * high * wide)
    for x in range(0, count, many):
        for m in range(0, members, some):
            for q in range(0, size, high):
                at = (slice(x, x + many), slice(m, m + some))
                share = shares[*at, :, q : q + high]
                if rows.device.type == "cpu" and not share.any():
                    continue  # padding, or queries before the question
                block = rows[*at, q : q + high]
                base = bases[*at, q : q + high]
                shape = block.shape[:3]
                block, base = block.reshape(shape[0], -1, dim), base.reshape(shape[0], -1, 1)
                end = min(length, q + shape[2]) if causal else length
                for k in range(0, end, wide):
                    part = keys[x : x + many, k : min(end, k + wide)]
                    tile = memory[: block.shape[0] * block.shape[1] * part.shape[1]].view(*block.shape[:2], -1)
                    torch.baddbmm(base, block, part.transpose(1, 2), out=tile)
                    p = tile.exp2_().view(*shape, -1)
                    if causal and k + part.shape[1] > q + 1:
                        p.tril_(q - k)
                    sums[*at, :, k : k + part.shape[1]] += share @ p
    return sums
