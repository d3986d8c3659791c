"""Units that are kept or dropped whole: shots, and passages cut into sentences or blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.base import Selection
    from kvcli.methods.context import Context
    from kvcli.spans import Span

    Unit = list[Span]

BLOCK = 16
PROTECTED = ("special", "system", "question")


def units(ctx: Context) -> list[Unit]:
    """Shots (each all its spans) and the pieces of `context` regions, in order of their first token."""
    return ctx.once("units", lambda: _units(ctx))


def _units(ctx: Context) -> list[Unit]:
    pieces = [[span] for region in ctx.spans("context") for span in _pieces(ctx, region)]
    return sorted([*ctx.shots(), *pieces], key=lambda unit: unit[0])


def _pieces(ctx: Context, region: Span) -> list[Span]:
    """Sentences of a passage; where it has none, blocks of 16 tokens."""
    start, end = region
    ends = _sentence_ends(ctx, start, end)
    if any(e < end for e in ends):
        cuts = sorted({*ends, end})
        return [(a, b) for a, b in zip([start, *cuts], cuts, strict=False)]
    return [(a, min(a + BLOCK, end)) for a in range(start, end, BLOCK)]


def _sentence_ends(ctx: Context, start: int, end: int) -> list[int]:
    """Positions after a token that closes a sentence: . ! ? before white space, or a full-width stop."""
    if ctx.token_text is None:
        return []
    ends = []
    behind = ""
    for i in range(start, end):
        text, following = ctx.token_text(i), ctx.token_text(i + 1) if i + 1 < end else " "
        behind = (behind + text)[-16:]  # a closing quote may be a token of its own
        stop = text.strip() and re.search(r"[.!?][\"')\]]*\Z", behind.rstrip())
        closed = stop and (text != text.rstrip() or following[:1].isspace())
        if closed or re.search(r"[。！？]\Z", text.rstrip()):
            ends.append(i + 1)
    return ends


def positions(spans: Sequence[Span]) -> list[int]:
    return [i for start, end in spans for i in range(start, end)]


def protected(ctx: Context) -> list[int]:
    """Positions of system, question and special tokens, and the last token."""
    return sorted({*positions(ctx.spans(*PROTECTED)), ctx.n - 1})


def take(order: Sequence[int], sizes: Sequence[int], room: int, fit: str) -> list[int]:
    """Indices of the units taken greedily in `order` while they fit into `room` tokens; none is ever cut."""
    taken = []
    for i in order:
        if sizes[i] <= room:
            taken.append(i)
            room -= sizes[i]
        elif fit == "stop":
            break
    return taken


@dataclass(frozen=True)
class UnitIndex:
    """Units as tensors. positions [T]: all units' tokens, one unit after the other; owner [T]: whose each is."""

    positions: Tensor
    owner: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, units: Sequence[Unit]) -> UnitIndex:
        import torch

        members = [positions(unit) for unit in units]
        sizes = [len(m) for m in members]
        flat = torch.tensor([i for m in members for i in m], dtype=torch.long)
        owner = torch.repeat_interleave(torch.arange(len(units)), torch.tensor(sizes, dtype=torch.long))
        return cls(flat, owner, sizes)

    def means(self, score: Tensor) -> Tensor:
        """[units]: mean of a per-token score [n] over each unit's tokens, in token order, so that equal units tie."""
        score = score.cpu()  # a GPU adds in no fixed order
        sums = score.new_zeros(len(self.sizes)).index_add_(0, self.owner, score[self.positions])
        return sums / sums.new_tensor(self.sizes)


def unit_index(ctx: Context) -> UnitIndex:
    return ctx.once("unit_index", lambda: UnitIndex.of(units(ctx)))


def _sizes(ctx: Context) -> tuple[list[Unit], set[int], list[int]]:
    """Units, protected positions, and what each unit costs beyond them: a protected token is paid for once."""
    fixed = set(protected(ctx))
    return units(ctx), fixed, [len(set(positions(unit)) - fixed) for unit in units(ctx)]


def keep_units(ctx: Context, budget: Budget, orders: Sequence[Sequence[int]], fit: str) -> Selection:
    """Per layer the protected tokens and the units taken in that layer's order while they fit.

    Flags: `over_budget` when the protected tokens alone exceed the budget; `fallback` when there are units and in some
    layer none fits.
    """
    import torch

    from kvcli.methods.base import Selection

    all_units, fixed, sizes = ctx.once("unit_sizes", lambda: _sizes(ctx))
    room = budget.per_head - len(fixed)
    flags = {"over_budget"} if room < 0 else set()
    kept = []
    for order in orders:
        taken = take(order, sizes, room, fit)
        if all_units and not taken:
            flags.add("fallback")
        chosen = [i for t in taken for i in positions(all_units[t])]
        kept.append(torch.tensor(sorted({*fixed, *chosen}), dtype=torch.long))
    return Selection(kept, frozenset(flags))
