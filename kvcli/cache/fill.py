"""How full each row and KV head of a layer is while its cache only grows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Fill:
    """Pairs stand from the left without gaps; new ones go behind them. Shared by layers that are filled alike.

    filled [R, 1 or H_kv] int64: pairs held. most: per row the pairs its longest head will ever hold.
    """

    def __init__(self, filled: Tensor, longest: list[int], most: list[int]) -> None:
        self.filled, self.longest, self.most = filled, longest, most
        self._alive = torch.ones(filled.shape[0], 1, dtype=torch.long, device=filled.device)
        self._even = bool((filled == filled[:1, :1]).all())
        self._visible: dict[int, Tensor | None] = {}
        self._segments: dict[tuple[int, int], list[tuple[int, int, int]]] = {}

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], room: Sequence[int], device: torch.device) -> Fill:
        """lengths: per row the pairs of each KV head, or one number for all heads."""
        wide = max(len(row) for row in lengths)
        filled = torch.tensor([list(row) * (wide if len(row) == 1 else 1) for row in lengths], device=device)
        longest = [max(row) for row in lengths]
        return cls(filled, longest, [a + b for a, b in zip(longest, room, strict=True)])

    @property
    def slots(self) -> int:
        """Slots that serve every row to its end."""
        return max(self.most)

    def used(self, new: int) -> int:
        """Slots to look at when `new` tokens were just written."""
        return max(self.longest) + new

    def segments(self, new: int, waste: int) -> list[tuple[int, int, int]]:
        """(first row, row behind the last, slots to look at): neighbouring rows of about equal length, so that reading
        each group as far as its longest row is filled looks at no more than `waste` empty slots."""
        if (new, waste) not in self._segments:  # layers that share this may have slots of other sizes
            self._segments[new, waste] = _segments([have + new for have in self.longest], waste)
        return self._segments[new, waste]

    def take(self, new: int) -> Tensor:
        """[R, 1 or H_kv, new]: slots of the new tokens."""
        if any(have + new > most > 0 for have, most in zip(self.longest, self.most, strict=True)):
            raise RuntimeError("no room left for new tokens in this cache")
        return self.filled[:, :, None] + torch.arange(new, device=self.filled.device)

    def visible(self, new: int) -> Tensor | None:
        """bool [R, 1 or H_kv, new, used]: what each new token sees, itself included; None: all see everything."""
        if new not in self._visible:
            self._visible[new] = None if self._even and new == 1 else self._mask(new)
        return self._visible[new]

    def _mask(self, new: int) -> Tensor:
        slots = torch.arange(self.used(new), device=self.filled.device)
        return slots <= self.take(new)[..., None]

    def advance(self, new: int) -> None:
        """The new tokens stay. A negative number takes the newest back."""
        self.filled = self.filled + new * self._alive
        self.longest = [have + new * (most > 0) for have, most in zip(self.longest, self.most, strict=True)]
        self._visible.clear()
        self._segments.clear()

    def release(self, rows: Sequence[int]) -> None:
        """These rows have ended: nothing of them is looked at again."""
        index = torch.tensor(rows, device=self.filled.device)
        self.filled = self.filled.index_fill(0, index, 0)
        self._alive = self._alive.index_fill(0, index, 0)
        for row in rows:
            self.longest[row] = self.most[row] = 0
        self._even = False
        self._visible.clear()
        self._segments.clear()

    def reformed(self, keep: Sequence[int], entering: Fill | None) -> Fill:
        """The rows of `keep`, then those of `entering`."""
        filled = self.filled[torch.tensor(keep, dtype=torch.long, device=self.filled.device)]
        longest, most = [self.longest[r] for r in keep], [self.most[r] for r in keep]
        if entering is not None:
            wide = max(filled.shape[1], entering.filled.shape[1])
            filled = torch.cat([filled.expand(-1, wide), entering.filled.expand(-1, wide)])
            longest, most = longest + entering.longest, most + entering.most
        return Fill(filled, longest, most)


def _segments(lengths: list[int], waste: int) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    empty = 0
    for row, length in enumerate(lengths):
        if found:
            first, _, most = found[-1]
            more = most - length if length <= most else (length - most) * (row - first)
            if empty + more <= waste:
                found[-1], empty = (first, row + 1, max(most, length)), empty + more
                continue
        found.append((row, row + 1, length))
        empty = 0
    return found
