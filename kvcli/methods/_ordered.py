"""The order of one layer's pairs over all its KV heads, and what heads get of a shared budget by it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.base import Method
    from kvcli.methods.context import Context


@dataclass(frozen=True)
class Ranked:
    """One layer's keys, best first. On the CPU and as small as can be: it is kept for all ratios of a prompt.

    by_head [H_kv, m] int32: each head's keys; heads [H_kv * m] int16: whose each pair of the whole layer is.
    """

    by_head: Tensor
    heads: Tensor

    @classmethod
    def of(cls, scores: Tensor) -> Ranked:
        """scores [H_kv, m]; equal ones go to the first position, then the first head."""
        import torch

        if bool(scores.isnan().any()):
            raise ValueError("scores contain NaN")

        by_head = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        together = torch.sort(scores.T.flatten(), descending=True, stable=True).indices
        return cls(by_head.to("cpu", torch.int32), (together % scores.shape[0]).to("cpu", torch.int16))

    def heads_of_best(self, count: int) -> list[int]:
        """How many of the layer's best `count` pairs are each head's."""
        import torch

        counts: list[int] = torch.bincount(self.heads[:count], minlength=self.by_head.shape[0]).tolist()
        return counts

    def safeguarded(self, size: int, floor: float) -> list[int]:
        """int(floor * size) of each head's best are safe; the rest of H_kv * size goes to the best of all heads."""
        import torch

        heads = self.by_head.shape[0]
        safe = int(Fraction(str(floor)) * size)
        mine = torch.nn.functional.one_hot(self.heads.long(), heads)
        rank = (mine.cumsum(0) * mine).sum(-1)  # 1 for a head's best pair, and so on
        contest = self.heads[rank > safe][: heads * (size - safe)]
        counts: list[int] = (torch.bincount(contest, minlength=heads) + safe).tolist()
        return counts


def ranked_once(ctx: Context, base: Method, key: tuple[Any, ...], scores: Tensor) -> Ranked:
    """The order of a layer's scores, made once per prompt. key: what they depend on beside the base and its seed."""
    return ctx.once(("ranked", base, ctx.seed if base.seeded else None, *key), lambda: Ranked.of(scores))
