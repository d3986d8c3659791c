"""Which tokens of a prompt stay where it is longer than it may be."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from kvcli.spans import Span

CUTTABLE = ("context", "shot")
"""Regions that may lose tokens: never the template's own text, BOS, the system text or the question."""
SIDES = ("middle", "left")


def kept_tokens(kinds: Sequence[str], spans: Sequence[Span], most: int, side: str) -> list[int] | None:
    """The tokens of a prompt of at most `most` tokens, in order; None where what is never cut is longer than that.

    kinds[i], spans[i]: region and characters of token i.

    middle: half of `most` from the front and half from the back. Rule: LongBench (THUDM/LongBench, pred.py), which
    cuts the middle because instructions stand at both ends. Where the middle holds tokens that are never cut, the cut
    goes round them, and moves where one end has too few tokens to give. Differs: tokens stay as they are (LongBench
    decodes both halves and tokenises the joined text again), the template counts, and an odd `most` keeps one more.
    left: the earliest tokens that may be cut go.
    A character is kept whole or not at all, so a few tokens more may go than need be.
    """
    free = [i for i, kind in enumerate(kinds) if kind in CUTTABLE]
    excess = len(kinds) - most
    if excess > len(free):
        return None
    if excess <= 0:
        return list(range(len(kinds)))
    start = min(bisect_left(free, most // 2), len(free) - excess) if side == "middle" else 0
    end = start + excess
    while start > 0 and _inside_character(free[start], spans):
        start -= 1
    while end < len(free) and _inside_character(free[end], spans):
        end += 1
    gone = set(free[start:end])
    return [i for i in range(len(kinds)) if i not in gone]


def _inside_character(token: int, spans: Sequence[Span]) -> bool:
    return token > 0 and spans[token][0] < spans[token - 1][1]
