"""Runs the real methods on an oracle's prompt: the context holds oracle attention, and only what the method named."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import torch

from kvcli.cache.budget import Budget
from kvcli.engine.needs import HANDLES
from kvcli.methods.base import Method, Selection
from kvcli.methods.catalog import build
from kvcli.methods.context import Context, Region
from tests.oracles.chunkkv import chunkkv
from tests.oracles.h2o import h2o
from tests.oracles.picks import Answer
from tests.oracles.prompts import Array, Prompt, budget
from tests.oracles.pyramidkv import pyramidkv
from tests.oracles.scissorhands import scissorhands
from tests.oracles.scope import scope
from tests.oracles.shotkv import shotkv
from tests.oracles.snapkv import snapkv
from tests.oracles.streaming_llm import streaming_llm
from tests.oracles.tova import tova

Kept = list[list[list[int]]]
"""[layer][kv_head] -> sorted positions."""

ORACLES: dict[str, Callable[..., Answer]] = {
    f.__name__: f for f in (streaming_llm, h2o, snapkv, pyramidkv, chunkkv, shotkv, tova, scissorhands, scope)
}


def _value(text: str) -> Any:
    return int(text) if text.isdigit() else text


def oracle_answer(text: str, prompt: Prompt, ratio: str, **more: Any) -> Answer:
    """What the oracle of `name:key=value,...` chooses at a kept ratio."""
    name, _, rest = text.partition(":")
    settings = {k: _value(v) for k, v in (pair.split("=") for pair in rest.split(",") if pair)}
    return ORACLES[name](prompt, budget(ratio, prompt.n), **settings, **more)


def context_for(
    method: Method,
    prompt: Prompt,
    *,
    seed: int = 0,
    column_sums: list[Array] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Context:
    """A context with the statistics that `method.needs()` names, and no others."""
    sums: dict[str, list[torch.Tensor]] = {}
    width = 0
    for need in method.needs():
        kind, _, detail = need.partition(":")
        if kind == "window":
            width = max(width, min(int(detail), prompt.n))
        elif need not in HANDLES:
            assert kind == "column_sum" and detail in ("", "question"), need
            name = detail or "all"
            sums[name] = [torch.tensor(s, dtype=dtype) for s in column_sums or prompt.column_sums(name)]
    return Context(
        n=prompt.n,
        heads=prompt.heads,
        kv_heads=prompt.kv_heads,
        token_ids=list(range(prompt.n)),
        regions=[Region(*region) for region in prompt.layout],
        keys=[torch.tensor(k, dtype=dtype) for k in prompt.keys],
        values=[torch.tensor(v, dtype=dtype) for v in prompt.values],
        column_sums=sums,
        window_queries=[torch.tensor(q[:, prompt.n - width :], dtype=dtype) for q in prompt.queries],
        scaling=[prompt.scaling] * prompt.layers,
        sample_id=prompt.name,
        seed=seed,
    )


def budget_for(prompt: Prompt, ratio: str, strict: bool = False) -> Budget:
    return Budget.of_ratio(Decimal(ratio), prompt.n, prompt.layers, prompt.kv_heads, strict)


def lists(selection: Selection, kv_heads: int) -> Kept:
    """A selection in any of its three forms as plain lists; checks dtype and shape on the way."""
    out: Kept = []
    for layer in selection.kept:
        if isinstance(layer, torch.Tensor):
            assert layer.dtype == torch.int64 and layer.dim() in (1, 2), (layer.dtype, layer.shape)
            heads = list(layer.expand(kv_heads, -1) if layer.dim() == 1 else layer)
        else:
            assert all(head.dtype == torch.int64 and head.dim() == 1 for head in layer)
            heads = layer
        assert len(heads) == kv_heads
        out.append([head.tolist() for head in heads])
    return out


def select(text: str, prompt: Prompt, ratio: str, *, strict: bool = False, **more: Any) -> tuple[Kept, set[str]]:
    """Kept positions and flags of the real method."""
    method = build(text)
    selection = method.select(context_for(method, prompt, **more), budget_for(prompt, ratio, strict))
    assert len(selection.kept) == prompt.layers
    return lists(selection, prompt.kv_heads), set(selection.flags)


def _sums(more: dict[str, Any]) -> dict[str, Any]:
    """The part of a test's extra inputs that an oracle takes too."""
    return {k: v for k, v in more.items() if k == "column_sums"}


def assert_agrees(text: str, prompt: Prompt, ratio: str, *, strict: bool = False, **more: Any) -> None:
    """The real method's positions and flags are the oracle's, near ties apart."""
    kept, flags = select(text, prompt, ratio, strict=strict, **more)
    wanted = oracle_answer(text, prompt, ratio, **({"strict": True} if strict else {}), **_sums(more))
    where = f"{text} on {prompt.name} at {ratio}"
    for layer, (actual_heads, picks) in enumerate(zip(kept, wanted.picks, strict=True)):
        for head, (actual, pick) in enumerate(zip(actual_heads, picks, strict=True)):
            why = pick.objection(actual)
            assert not why, f"{where}, layer {layer}, KV head {head}: {why}"
    assert flags == wanted.flags, f"{where}: flags {sorted(flags)} instead of {sorted(wanted.flags)}"


def assert_agrees_exactly(text: str, prompt: Prompt, ratio: str, **more: Any) -> None:
    """Index for index, no near ties: for inputs whose scores are exact in any precision."""
    kept, _ = select(text, prompt, ratio, **more)
    assert kept == oracle_answer(text, prompt, ratio, **_sums(more)).kept(), f"{text} on {prompt.name} at {ratio}"
