"""Calls a method and holds its answer against the contract before anything is evicted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvcli.cache.budget import Budget
from kvcli.cache.rows import Kept, head_positions, kept_counts
from kvcli.errors import KvcliError
from kvcli.methods.base import Method, Reader, Selection
from kvcli.methods.composed import transform_of
from kvcli.methods.context import Context
from kvcli.results.schema import FLAGS


class BadSelection(Exception):
    """A method broke its contract; the message says how."""


class SharedContextWritten(KvcliError):
    """A method changed what the others read: the whole command ends, because no later row can be trusted."""


@contextmanager
def guarded(method: Method) -> Iterator[None]:
    """Runs a method's code so that writing into what all methods share is an error: outside inference mode, its tensors
    (made inside) do not let themselves be written."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except RuntimeError as e:
        if "nference tensor" not in str(e):
            raise
        what = f"{type(method).__name__} writes into ctx, which all methods share; nothing measured after it was saved"
        raise SharedContextWritten(
            what, given=f"--method {type(method).__name__}", fix="copy first: ctx.keys[i].clone()"
        ) from e


def select(method: Method, ctx: Context, budget: Budget) -> Selection:
    """The method's selection, held against the contract."""
    with guarded(method):
        selection = method.select(ctx, budget)
    return checked(selection, method, ctx, budget)


def checked(selection: Selection, method: Method, ctx: Context, budget: Budget) -> Selection:
    """The selection, with the flag `noop` where the prompt was too short to compress.

    Raises BadSelection when positions are unsorted, repeated or outside the prompt, when the last one is missing, or
    when the total exceeds the budget at the method's scope without the flag `over_budget`.
    """
    selection.kept = [[p.cpu() for p in form] if isinstance(form, list) else form.cpu() for form in selection.kept]
    _check_form(selection.kept, ctx, method.keeps_last)
    counts = kept_counts(selection.kept, ctx.kv_heads)
    if method.domain.kind == "continuous" and "over_budget" not in selection.flags:
        _check_budget(counts, budget, method.budget_scope)
    _check_words(selection)
    flags = set(selection.flags)
    everything = all(count == ctx.n for layer in counts for count in layer)
    if everything and not budget.requested_all and transform_of(method) is None and not isinstance(method, Reader):
        flags.add("noop")
    selection.flags = frozenset(flags)
    return selection


def _check_words(selection: Selection) -> None:
    unknown = set(selection.flags) - set(FLAGS)
    if unknown:
        raise BadSelection(f"unknown flag {', '.join(sorted(unknown))}; known: {', '.join(FLAGS)}")
    try:
        json.dumps(selection.notes, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise BadSelection(f"notes must be plain JSON values: {e}") from e
    lengths = {k.shape[-1] for k in selection.kept if not isinstance(k, list) and k.dim() == 1}
    if selection.rerotate and (len(lengths) != 1 or any(isinstance(k, list) or k.dim() > 1 for k in selection.kept)):
        raise BadSelection("rerotate needs one set of positions per layer, of one length, for all heads")


def _check_form(kept: Kept, ctx: Context, keeps_last: bool) -> None:
    if len(kept) != ctx.layers:
        raise BadSelection(f"{len(kept)} layers selected, the model has {ctx.layers}")
    for number, layer in enumerate(kept):
        parts = layer if isinstance(layer, list) else [layer]
        heads = len(layer) if isinstance(layer, list) or layer.dim() > 1 else 1
        if heads not in (1, ctx.kv_heads):
            raise BadSelection(f"layer {number}: {heads} heads selected, the model has {ctx.kv_heads}")
        for positions in parts:
            _check_positions(positions, number, ctx.n, keeps_last)


def _check_positions(positions: Tensor, layer: int, n: int, keeps_last: bool) -> None:
    """positions [K] or [H_kv, K]."""
    if positions.dtype != torch.long or not positions.numel():
        raise BadSelection(f"layer {layer}: positions must be a non-empty int64 tensor")
    if not bool((positions[..., 1:] > positions[..., :-1]).all()):
        raise BadSelection(f"layer {layer}: positions are not sorted or repeat")
    last = positions[..., -1]
    if int(positions[..., 0].min()) < 0 or int(last.max()) >= n:
        raise BadSelection(f"layer {layer}: positions must lie in 0..{n - 1}")
    if keeps_last and int(last.min()) != n - 1:
        raise BadSelection(f"layer {layer}: the last prompt token {n - 1} must stay")


def _check_budget(counts: list[list[int]], budget: Budget, scope: str) -> None:
    limit = budget.total(scope)
    if scope == "head":
        most = max(count for layer in counts for count in layer)
    elif scope == "layer":
        most = max(sum(layer) for layer in counts)
    else:
        most = sum(map(sum, counts))
    if most > limit:
        raise BadSelection(f"{most} KV pairs kept per {scope}, the budget is {limit}")


def positions_kept(kept: Kept, kv_heads: int) -> list[list[list[int]]]:
    """kept[layer][kv head]: positions, for the stored maps; one entry in a layer whose heads are all alike."""
    alike = [not isinstance(layer, list) and layer.dim() == 1 for layer in kept]
    return [
        [p.tolist() for p in head_positions(layer, 1 if same else kv_heads)]
        for layer, same in zip(kept, alike, strict=True)
    ]


def kept_share(kept: Kept, kv_heads: int, n: int) -> Tensor:
    """[n] float64: share of layers and KV heads that kept each prompt token."""
    total = torch.zeros(n, dtype=torch.double)
    for layer in kept:
        if isinstance(layer, list):
            total += torch.bincount(torch.cat(layer), minlength=n) / kv_heads
        elif layer.dim() == 1:
            total[layer] += 1.0
        else:
            total += torch.bincount(layer.flatten(), minlength=n) / layer.shape[0]
    return total / len(kept)
