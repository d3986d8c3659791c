"""Low rank: a prompt's keys and values as coefficients of a few directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING

from kvcli.methods.base import Block, Stored, Transform, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.context import Context
    from kvcli.models.rope import RopeHandle


@dataclass(frozen=True)
class LowRank(Transform):
    """The prompt's keys before rotation, all KV heads of a layer side by side, and its values, `group` KV heads side by
    side, are replaced by their best approximation of a given rank: a truncated singular value decomposition.

    Stored are each token's coefficients and the directions, which count as bytes. Reading multiplies them and rotates
    the keys to their positions again. The prompt's last pair and all generated ones are kept whole behind.

    Source: arXiv:2410.21465 (ShadowKV), section 3.1, for keys, and its code (bytedance/ShadowKV, models/kv_cache.py:
    one decomposition per prompt and layer of the keys before rotation, rank 160, for 8 heads of 128 channels);
    arXiv:2407.21118 (Palu), section 3.2, for values of groups of heads together, and its code (shadowpa0327/Palu,
    compress.py: groups of 4). Differs: ShadowKV has low rank for keys only and holds values whole in other memory, and
    keeps outlying chunks of keys whole; it decomposes prompts of more than 4096 tokens; Palu decomposes the weights of
    the projection once, not each prompt's values, and one rate (0.5 in its abstract, 0.7 in its example) is shared out
    between keys and values by a search; directions are stored per prompt, so short prompts gain little. Where the KV
    heads of a layer hold different tokens, each is decomposed alone.
    """

    name = "lowrank"
    title = "Low rank"
    paper = "arXiv:2410.21465"
    tier = 2
    phases = ("prefill",)
    protects = "the last token and generated ones, whole"

    keys: float = setting(
        0.15625,
        ge=0,
        le=1,
        help="rank of the keys as a share of their width over all KV heads",
        paper="160 of 1024 (ShadowKV)",
    )
    values: float = setting(
        0.5,
        ge=0,
        le=1,
        help="rank of the values as a share of a group's width",
        paper="0.5 (Palu, keys and values together)",
    )
    group: int = setting(4, ge=1, help="KV heads whose values are decomposed together", paper="4 (Palu)")

    def needs(self) -> frozenset[str]:
        return frozenset({"rope"})

    def store(self, ctx: Context, layers: Sequence[Sequence[Block]]) -> list[list[Stored]]:
        if ctx.rope is None:
            raise ValueError("this model's keys cannot be turned back to before their rotation")
        return [[self._store(ctx, ctx.rope, block) for block in blocks] for blocks in layers]

    def _store(self, ctx: Context, rope: RopeHandle, block: Block) -> Stored:
        from kvcli.methods._stores import settled

        part, heads = settled(ctx, block), block.keys.shape[0]
        places = block.positions[:, :part].to(block.keys.device)
        alike = bool((places == places[:1]).all())
        whole = heads == ctx.kv_heads and part == ctx.n - 1  # the prompt itself, whatever stored it before

        def factors(what: str, pairs: Callable[[], Tensor], share: float, group: int) -> list[tuple[Tensor, Tensor]]:
            def make() -> list[tuple[Tensor, Tensor]]:
                return [_factors(x, share) for x in _side_by_side(pairs(), group)]

            return ctx.once(("lowrank", what, block.layer, share, group), make) if whole else make()

        keys = factors("keys", lambda: _turned(rope, block.keys[:, :part], -places), self.keys, heads if alike else 1)
        values = factors("values", lambda: block.values[:, :part], self.values, min(self.group, heads) if alike else 1)
        return _Store(rope, places[:1] if alike else places, keys, values, block)


def _turned(rope: RopeHandle, keys: Tensor, by: Tensor) -> Tensor:
    """keys [h, K, D] rotated further by so many positions, [1, K] or [h, K]."""
    flat = by.expand(keys.shape[0], -1).flatten()
    return rope.move(keys.flatten(0, 1)[None], flat.new_zeros(len(flat)), flat)[0].view(keys.shape)


def _side_by_side(pairs: Tensor, group: int) -> list[Tensor]:
    """[h, K, D] -> [K, group * D] for each group of neighbouring heads."""
    return [part.transpose(0, 1).flatten(1) for part in pairs.split(group)]


def _apart(factors: list[tuple[Tensor, Tensor]], width: int) -> Tensor:
    """What the factors stand for: [h, K, D]."""
    import torch

    return torch.cat([(a @ b).unflatten(-1, (-1, width)).transpose(0, 1) for a, b in factors])


def _factors(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """([K, r], [r, W]): the best approximation of x [K, W] of rank r, a share of W."""
    import torch

    rank = min(int((Decimal(str(share)) * x.shape[1]).to_integral_value(ROUND_HALF_UP)), *x.shape)
    exact = torch.promote_types(x.dtype, torch.float32)
    u, s, v = torch.linalg.svd(x.to(exact), full_matrices=False)
    return (u[:, :rank] * s[:rank]).to(x.dtype).clone(), v[:rank].to(x.dtype).clone()


class _Store:
    """Factors of the prompt's keys before rotation and of its values; other pairs behind, whole. places: where the keys
    are rotated to, where that is not 0, 1, 2, ..."""

    def __init__(
        self,
        rope: RopeHandle,
        places: Tensor,
        keys: list[tuple[Tensor, Tensor]],
        values: list[tuple[Tensor, Tensor]],
        block: Block,
    ) -> None:
        import torch

        from kvcli.methods._stores import Whole

        self.rope, self.keys, self.values = rope, keys, values
        self.part, self.widths = places.shape[1], (block.keys.shape[-1], block.values.shape[-1])
        in_order = bool((places == torch.arange(self.part, device=places.device)).all())
        self.places = None if in_order else places.to(torch.int32)
        self.rest = Whole(block.keys[:, self.part :], block.values[:, self.part :])

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.rest.append(keys, values)

    def dense(self) -> tuple[Tensor, Tensor]:
        import torch

        keys, values = _apart(self.keys, self.widths[0]), _apart(self.values, self.widths[1])
        if self.places is None:
            places = torch.arange(self.part, device=keys.device)[None]
        else:
            places = self.places.long()
        keys = _turned(self.rope, keys, places)
        return torch.cat([keys, self.rest.keys], 1), torch.cat([values, self.rest.values], 1)

    def payload(self) -> int:
        from kvcli.methods._stores import payload_of

        return payload_of(self.tensors())

    def tensors(self) -> list[Tensor]:
        factors = [x for pair in (*self.keys, *self.values) for x in pair]
        return factors + ([] if self.places is None else [self.places]) + self.rest.tensors()
