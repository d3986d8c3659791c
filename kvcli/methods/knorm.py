"""Knorm: the keys with the smallest norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcli.errors import KvcliError
from kvcli.methods._ranked import RankedMethod
from kvcli.methods.base import setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class Knorm(RankedMethod):
    """Keys with the smallest L2 norm stay, per layer and KV head; the first two layers are left whole.

    Keys that attract much attention have small norms. What the skipped layers take is saved by the others, all alike,
    so that the model's total is the budget's. Where that would cost each other layer more than half of its budget, it
    keeps half and the skipped layers share the rest (`fallback`). --strict-window leaves them whole even then, though
    the total may not allow it (`over_budget`). Source: arXiv:2406.11430, section 3, and its code (layers 0 and 1, as in
    its README and quick evaluation; other scripts skip layer 0 alone). Differs: the code does not count what it skips
    in the kept ratio; the newest token always stays; norms are float32 at least (in bfloat16 most of them tie); keys
    are ranked once, behind the prompt, not again while generating.
    """

    name = "knorm"
    title = "Knorm"
    paper = "arXiv:2406.11430"
    tier = 2
    signed = True
    budget_scope = "model"
    protects = "the last token; layers 0 and 1"

    skip_layers: str = setting(
        "0,1",
        help="layers that stay whole, as in skip_layers='0,1'; none for the plain variant",
        paper="0,1; some scripts 0 alone",
    )

    def __post_init__(self) -> None:
        words = [] if self.skip_layers == "none" else self.skip_layers.split(",")
        if not all(word.strip().isdecimal() for word in words):
            given = f"--method knorm:skip_layers='{self.skip_layers}'"
            raise KvcliError(
                "skip_layers must be layer numbers", given=given, fix="skip_layers='0,1' or skip_layers=none"
            )
        numbers = sorted({int(word) for word in words})
        object.__setattr__(self, "skip_layers", ",".join(map(str, numbers)) or "none")

    def protected(self, budget: Budget) -> tuple[int, int, frozenset[str]]:
        newest, sinks, flags = budget.protect(1)
        return newest, sinks, flags | self._layers(budget)[1]

    def scores(self, ctx: Context, layer: int, newest: int, sinks: int) -> Tensor:
        norms = ctx.once(("key norms", layer), lambda: _norms(ctx.keys[layer]))
        return -norms[:, sinks : ctx.n - newest]

    def sizes(self, budget: Budget, newest: int, sinks: int) -> list[int]:
        return [size - newest - sinks for size in self._layers(budget)[0]]

    def skipped(self, layers: int) -> set[int]:
        """Layers left whole in a model of so many. Raises KvcliError for typed numbers that it does not have."""
        numbers = set() if self.skip_layers == "none" else {int(word) for word in self.skip_layers.split(",")}
        if max(numbers, default=0) >= layers and self.skip_layers != "0,1":
            what = f"knorm is to skip layer {max(numbers)}, the model has {layers}"
            raise KvcliError(what, given=f"--method knorm:skip_layers='{self.skip_layers}'", fix="skip_layers=none")
        return {number for number in numbers if number < layers}

    def _layers(self, budget: Budget) -> tuple[list[int], frozenset[str]]:
        """KV pairs per KV head in each layer, and flags."""
        skipped = self.skipped(budget.layers)
        others = budget.layers - len(skipped)
        total, whole = budget.per_head * budget.layers, len(skipped) * budget.n
        least = 1 if budget.strict_window else budget.per_head - budget.per_head // 2
        rest = max(total - whole, others * least)
        flags = frozenset[str]()
        if total - whole < rest:
            flags = frozenset({"over_budget" if budget.strict_window else "fallback"})
        if flags and not budget.strict_window:
            whole = total - rest
        sizes = [0] * budget.layers
        for members, pairs in ((skipped, whole), (set(range(budget.layers)) - skipped, rest)):
            for i, layer in enumerate(sorted(members)):
                sizes[layer] = pairs // len(members) + (i < pairs % len(members))
        return sizes, flags


def _norms(keys: Tensor) -> Tensor:
    """[H_kv, n] float32 at least: in 16 bit the norms of most keys tie."""
    import torch

    return torch.linalg.vector_norm(keys, dim=-1, dtype=torch.promote_types(keys.dtype, torch.float32))
