"""kvpress's compression_ratio for a number of KV pairs: its float arithmetic, met exactly."""

from __future__ import annotations

from typing import Literal

MARGIN = 2.0**-40
"""Far above the rounding of a float, far below one pair of any cache."""


def removed_share(n: int, kept: int, counts: Literal["kept", "removed"] = "kept") -> float:
    """1 - kept / n, moved off the edge at which kvpress cuts a float. 0 < kept < n.

    A press that counts what it keeps keeps int(m * (1 - ratio)) of m pairs or chunks; one that counts what it removes
    removes int(m * ratio). The plain quotient loses one to that in places: int(1000 * (1 - 0.9)) is 99.
    """
    if not 0 < kept < n:
        raise ValueError(f"{kept} of {n} pairs need no compression ratio")
    return 1 - kept / n + (MARGIN if counts == "removed" else -MARGIN)
