"""Folding pairs that leave while tokens are generated into pairs that stay, in the cache's own memory.

leaving: rows, KV heads and slots of the pairs that leave, [G] each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvcli.methods.generating import Generating

Leaving = tuple[Tensor, ...]
Mean = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_BLOCK_BYTES = 1 << 26
"""Memory for the keys that leaving ones are compared with at a time, and for the cosines."""

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))
"""Of splitmix64, its factors as signed 64-bit integers."""


def fold(view: Generating, gone: Tensor, leaving: Leaving, beta: float, mean: Mean) -> None:
    """Each pair that leaves goes to the nearest one that stays, if its cosine reaches the threshold, which moves first.

    mean(own [K, D], others [m, D], likeness [m], target [m]): own with others folded in.
    """
    assert view.keys is not None and view.values is not None
    likeness, target = _nearest(view.keys, view.position, (view.position >= 0) & ~gone, leaving)
    threshold = _moved(view.facts["merge_threshold"], leaving[0], likeness, beta)
    near = (likeness >= threshold[leaving[0]]) & likeness.isfinite()
    row, head, slot = (x[near] for x in leaving)
    heads, slots = view.position.shape[1:]
    place, index = ((row * heads + head) * slots + target[near]).unique(return_inverse=True)
    to = (place // (heads * slots), place // slots % heads, place % slots)
    for x in (view.keys, view.values):
        x[to] = mean(x[to], x[row, head, slot], likeness[near], index)


def _nearest(keys: Tensor, position: Tensor, stays: Tensor, leaving: Leaving) -> tuple[Tensor, Tensor]:
    """([G] largest cosines, [G] slots): of equal ones the earliest position. -inf where no pair of the head stays."""
    row, head, _ = leaving
    rows, heads, slots, width = keys.shape
    place = row * heads + head
    count = torch.bincount(place, minlength=rows * heads)
    nth = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[place]  # of its head's leaving pairs
    exact, most = torch.promote_types(keys.dtype, torch.float32), int(count.max())
    own = torch.zeros(rows, heads, most, width, dtype=exact, device=keys.device)
    own[row, head, nth] = torch.nn.functional.normalize(keys[leaving].to(exact), dim=-1)
    at_once = max(1, _BLOCK_BYTES // (heads * slots * max(width, most) * exact.itemsize))
    found = []
    for a in range(0, rows, at_once):
        some = slice(a, a + at_once)
        part = keys[some].to(exact)
        lengths = part.norm(dim=-1).clamp_min(1e-12)[:, :, None]
        likeness = (own[some] @ part.transpose(-1, -2) / lengths).masked_fill(~stays[some, :, None], float("-inf"))
        best = likeness.amax(-1, keepdim=True)
        later = position[some, :, None].masked_fill(likeness < best, torch.iinfo(torch.int64).max)
        found.append((best[..., 0], later.argmin(-1)))
    likeness, target = (torch.cat(parts)[row, head, nth] for parts in zip(*found, strict=True))
    return likeness, target


def _moved(facts: Tensor, row: Tensor, likeness: Tensor, beta: float) -> Tensor:
    """[R]: each row's threshold, moved towards the mean of its pairs' cosines; kept in facts [R, H_kv]."""
    old = facts[:, 0].clone()
    some = likeness.isfinite()
    row, exact = row[some], likeness[some].to(old.dtype)
    count = torch.bincount(row, minlength=len(old))
    most = torch.full_like(old, float("-inf")).scatter_reduce(0, row, exact, "amax")
    mean = (torch.zeros_like(old).index_add_(0, row, exact) / count).minimum(most)  # no more than all of them
    new = torch.where(old.isnan(), mean, old + beta * (mean - old)).where(count > 0, old)
    facts.copy_(new[:, None].expand_as(facts))
    return new


def spread(view: Generating, gone: Tensor, leaving: Leaving, window: int) -> None:
    """Each leaving pair's value, divided by their number, is added to the values of the newest `window` tokens that
    stay, with the probability of its attention over their mean attention."""
    assert view.attention is not None and view.values is not None
    values, exact = view.values, torch.promote_types(view.values.dtype, torch.float32)
    takes = (view.position > view.newest - window) & (view.position >= 0) & ~gone
    count = takes.sum(-1)
    attention = view.per_kv_head(view.attention)
    mean = (attention * takes).sum(-1) / count  # without receivers NaN: nothing is drawn
    row, head, _ = leaving
    drawn = uniform(view.facts["merge_key"][row, head], view.position[leaving])
    merged = drawn < attention[leaving] / mean[row, head]
    row, head, slot = (x[merged] for x in leaving)
    share = torch.zeros_like(values[:, :, 0], dtype=exact)
    share.index_put_((row, head), values[row, head, slot].to(exact), accumulate=True)
    some = torch.zeros_like(count, dtype=torch.bool).index_put_((row, head), torch.ones_like(row, dtype=torch.bool))
    to = (takes & some[..., None]).nonzero(as_tuple=True)
    values[to] = (values[to] + (share / count.clamp_min(1)[..., None])[to[:2]]).to(values.dtype)


def uniform(key: Tensor, position: Tensor) -> Tensor:
    """[...] float32 in [0, 1), made of key and position alone: splitmix64, its upper 24 bits. key, position int64."""
    x = key + (position + 1) * _GOLDEN
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> shift & ((1 << (64 - shift)) - 1))) * factor
    return (x >> 40 & 0xFFFFFF).float() / (1 << 24)
