"""ThinK: key channels that the prompt's last queries hardly use are removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from kvcli.methods.base import Block, Stored, Transform, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.context import Context


@dataclass(frozen=True)
class ThinK(Transform):
    """Per KV head, the share `prune` of the key channels with the smallest product |Q_i| |K_i| is removed: Q_i is
    channel i of the queries of the prompt's last `window` tokens, K_i that of the stored keys, |.| a Euclidean norm:
    the product is the Frobenius norm of Q_i K_i.

    The last `window` keys of the prompt and all generated ones keep every channel, and so do all values. Removed
    channels are not stored; the kept ones' numbers are, and count. Attention reads the removed ones as zero.

    Source: arXiv:2407.21018, sections 3.2 and 4.1; the authors' code (SalesforceAIResearch/ThinK,
    kv_pruning_utils.py), which scores with the last 32 queries, prunes int(D * 0.4) channels and keeps 32 keys whole.
    Differs: one set per KV head, with the queries of its group taken together (the authors store a key per query head);
    K_i leaves out the keys that stay whole, so that the last prompt token changes nothing where it is fed again; the
    share is cut down to whole channels on exact decimals.
    """

    name = "think"
    title = "ThinK"
    paper = "arXiv:2407.21018"
    tier = 2
    phases = ("prefill",)
    protects = "values, the window's keys, generated keys"

    prune: float = setting(0.4, ge=0, le=1, help="share of key channels removed", paper="0.4")
    window: int = setting(32, ge=1, help="last queries that vote; their keys stay whole", paper="32")

    def needs(self) -> frozenset[str]:
        return frozenset({f"window:{self.window}"})

    def store(self, ctx: Context, layers: Sequence[Sequence[Block]]) -> list[list[Stored]]:
        return [[self._store(ctx, block) for block in blocks] for blocks in layers]

    def _store(self, ctx: Context, block: Block) -> Stored:
        from kvcli.methods._stores import settled

        fed_again = settled(ctx, block) == block.keys.shape[1]
        old = max(0, block.keys.shape[1] - self.window + int(fed_again))
        kept = self._channels(ctx, block, block.keys[:, :old])
        return _Store(block.keys[:, :old], block.keys[:, old:], block.values, kept)

    def _channels(self, ctx: Context, block: Block, keys: Tensor) -> Tensor:
        """int64 [h, kept]: channels that stay, ascending; of equal ones the first are kept."""
        import torch

        width = keys.shape[-1]
        count = width - int(Decimal(str(self.prune)) * width)
        exact = torch.promote_types(keys.dtype, torch.float32)
        queries = ctx.window_queries[block.layer][:, -self.window :].to(exact).square().sum(1)
        asked = queries.unflatten(0, (ctx.kv_heads, -1)).sum(1)[block.heads]
        score = asked * keys.to(exact).square().sum(1)
        return score.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values


class _Store:
    """Keys of the prompt's older part with kept channels only [h, P, C], the others whole [h, *, D]; all values."""

    def __init__(self, old: Tensor, recent: Tensor, values: Tensor, kept: Tensor) -> None:
        import torch

        self.width = old.shape[-1]
        if not old.shape[1] or kept.shape[1] == self.width:  # nothing is pruned: no table either
            old, kept, recent = old[:, :0], kept[:, :0], torch.cat([old, recent], 1)
        self.kept = kept.to(torch.uint8 if self.width <= 256 else torch.int16)
        self.old = old.gather(-1, kept[:, None].expand(-1, old.shape[1], -1))
        self.recent, self.values = recent.clone(), values.clone()
        self.new_values = values[:, :0].clone()

    def append(self, keys: Tensor, values: Tensor) -> None:
        import torch

        self.recent = torch.cat([self.recent, keys], 1)
        self.new_values = torch.cat([self.new_values, values], 1)

    def dense(self) -> tuple[Tensor, Tensor]:
        import torch

        heads, pairs = self.old.shape[:2]
        keys = self.old.new_zeros(heads, pairs + self.recent.shape[1], self.width)
        keys[:, :pairs].scatter_(-1, self.kept.long()[:, None].expand(-1, pairs, -1), self.old)
        keys[:, pairs:] = self.recent
        return keys, torch.cat([self.values, self.new_values], 1)

    def payload(self) -> int:
        from kvcli.methods._stores import payload_of

        return payload_of(self.tensors())

    def tensors(self) -> list[Tensor]:
        return [self.kept, self.old, self.recent, self.values, self.new_values]
