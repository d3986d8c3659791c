"""Low rank: a prompt's keys and values as coefficients of a few directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcli.errors import KvcliError
from kvcli.methods.base import Block, Stored, Transform, setting

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.context import Context
    from kvcli.models.rope import RopeHandle

KINDS = ("prompt", "calibrated", "weights")


@dataclass(frozen=True)
class LowRank(Transform):
    """Keys before rotation and values, several KV heads side by side, are replaced by their projection on a few
    directions. Stored are each token's coefficients; reading multiplies them and rotates the keys to their positions
    again.

    `basis=prompt`: the directions are the prompt's own, a truncated singular value decomposition of all KV heads' keys
    of a layer and of the values of `group` KV heads: the best approximation of its rank. They are stored with it and
    count as bytes. The prompt's last pair and all generated ones are kept whole behind.

    `basis=calibrated` and `basis=weights`: the directions are the model's, of `group` KV heads for keys and for values;
    every pair is projected, generated ones too, before it is attended to. As in their papers, which put them into the
    weights, they belong to the model: all prompts share them, so they are not among a row's bytes; a record's note
    `basis_bytes` has their size at 16 bits. `calibrated`: right singular vectors of the keys and values of calibration
    texts, from the file of `kvcli profile-heads --bases`, found by the model's weights or named by `basis=FILE`.
    `weights`: the left singular vectors of W_k and W_v [out, in]; projecting keys on them gives what the decomposed
    weight would; a bias is taken off first and put back. Models that normalise or scale their keys behind the
    projection (Qwen3) are refused, for there no weight gives the keys.

    Source: arXiv:2410.21465 (ShadowKV), section 3.1, for `prompt`, and its code (bytedance/ShadowKV,
    models/kv_cache.py: one decomposition per prompt and layer of the keys before rotation, rank 160, for 8 heads of 128
    channels); arXiv:2408.05646 (Eigen Attention) for `calibrated`, and its code (UtkarshSaxena1/EigenAttn,
    decompose/eigen_attn_utils.py); arXiv:2407.21118 (Palu), section 3.2, for `weights` and for groups of heads, and its
    code (shadowpa0327/Palu, compress.py: groups of 4; palu/model/modules/svd_linear.py). Differs: ShadowKV has low rank
    for keys only and holds values whole in other memory, and keeps outlying chunks of keys whole; it decomposes prompts
    of more than 4096 tokens; directions of the prompt are stored with it, so short prompts gain little. Eigen Attention
    stacks keys with queries and multiplies both in few dimensions; with rotary positions, the only ones here, its code
    takes keys alone, as here, but one set of directions that the heads of a layer share, and values of each head alone
    (`group=1`); it finds ranks layer by layer from a bound on the error, can average texts before it decomposes, and
    reads 128 of WikiText-2. Palu's code weighs W by the calibration texts first, which gives the directions of
    `calibrated` but for the bias (`weights` is its plain decomposition), and shares one rate (0.5 in its abstract, 0.7
    in its example) out between layers, keys and values by a search. Both papers read the prompt with the decomposed
    weights too; here it is read whole, and what is stored of it is projected. Ranks are the same share everywhere.
    Where the KV heads of a layer hold different tokens, each is decomposed alone.
    """

    name = "lowrank"
    title = "Low rank"
    paper = "arXiv:2410.21465"
    tier = 2
    phases = ("prefill",)
    protects = "the last token and generated ones, whole, with basis=prompt; nothing with the others"
    open_points = (
        (
            "whether directions count as bytes of the cache",
            "those of a prompt do; those of the model (calibrated, weights) are shared by all prompts, as its weights "
            "are, and do not: note `basis_bytes`",
        ),
    )

    basis: str = setting("prompt", help="whose directions: prompt, calibrated, weights, or a FILE of calibrated ones")
    keys: float = setting(
        0.15625,
        ge=0,
        le=1,
        help="rank of the keys as a share of their width over the KV heads taken together",
        paper="160 of 1024 (ShadowKV)",
    )
    values: float = setting(
        0.5,
        ge=0,
        le=1,
        help="rank of the values as a share of a group's width",
        paper="0.5 (Palu, keys and values together)",
    )
    group: int = setting(
        4,
        ge=1,
        help="KV heads whose values are decomposed together, and their keys unless basis=prompt",
        paper="4 (Palu); 1 (Eigen Attention, values)",
    )

    def __post_init__(self) -> None:
        if self.basis not in KINDS and not any(sign in self.basis for sign in "/."):
            fix = f"{' | '.join(KINDS)}, or a file such as ./bases.st"
            what, given = f"'basis={self.basis}' is not one of its values", f"--method lowrank:basis={self.basis}"
            raise KvcliError(what, given=given, fix=fix)

    def needs(self) -> frozenset[str]:
        return frozenset({"rope"}) if self.basis == "prompt" else frozenset({"rope", self._need()})

    def _need(self) -> str:
        if self.basis == "weights":
            return "bases:weights"
        return f"bases:{self.group}:{'' if self.basis == 'calibrated' else self.basis}"

    def notes(self, ctx: Context, kept: Sequence[Tensor | list[Tensor]]) -> dict[str, Any]:
        """What the directions are that a row which keeps these pairs does not hold, and what they weigh."""
        from kvcli.cache.rows import STORED_BYTES

        if self.basis == "prompt":
            return {}
        groups = [self.group if _alike(form) else 1 for form in kept]
        sets = [self._bases(ctx, layer, 0, ctx.kv_heads, group) for layer, group in enumerate(groups)]
        elements = sum(basis.elements for pair in sets for part in pair for basis in part)
        return {"basis": ctx.extra(self._need()).name, "basis_bytes": STORED_BYTES * elements}

    def store(self, ctx: Context, layers: Sequence[Sequence[Block]]) -> list[list[Stored]]:
        if ctx.rope is None:
            raise ValueError("this model's keys cannot be turned back to before their rotation")
        return [[self._store(ctx, ctx.rope, block) for block in blocks] for blocks in layers]

    def _store(self, ctx: Context, rope: RopeHandle, block: Block) -> Stored:
        from kvcli.methods._lowrank import Projected
        from kvcli.methods._stores import settled

        part, heads = settled(ctx, block), block.keys.shape[0]
        places = block.positions[:, :part].to(block.keys.device)
        alike = bool((places == places[:1]).all())
        if self.basis == "prompt":
            return self._of_prompt(ctx, rope, block, places, alike)
        bases = self._bases(ctx, block.layer, block.heads.start, heads, self.group if alike else 1)
        return Projected(rope, places[:1] if alike else places, ctx.n - 1, bases, block)

    def _bases(self, ctx: Context, layer: int, first: int, heads: int, group: int) -> tuple[list[Any], list[Any]]:
        """Of keys and of values of so many KV heads from `first` on, for each group of them."""
        from kvcli.methods._lowrank import rank_of

        bases, starts = ctx.extra(self._need()), range(first, first + heads, group)

        def found(what: str, like: Tensor, share: float) -> list[Any]:
            sizes = [min(group, first + heads - start) for start in starts]
            return [
                bases.of(what, layer, start, size, rank_of(share, size * like.shape[-1]), like)
                for start, size in zip(starts, sizes, strict=True)
            ]

        return found("keys", ctx.keys[layer], self.keys), found("values", ctx.values[layer], self.values)

    def _of_prompt(self, ctx: Context, rope: RopeHandle, block: Block, places: Tensor, alike: bool) -> Stored:
        from kvcli.methods._lowrank import Factored, Factors, factors_of, side_by_side, turned

        part, heads = places.shape[1], block.keys.shape[0]
        whole = heads == ctx.kv_heads and part == ctx.n - 1  # the prompt itself, whatever stored it before

        def factors(what: str, pairs: Callable[[], Tensor], share: float, group: int) -> list[Factors]:
            def make() -> list[Factors]:
                return [factors_of(x, share) for x in side_by_side(pairs(), group)]

            return ctx.once(("lowrank", what, block.layer, share, group), make) if whole else make()

        keys = factors("keys", lambda: turned(rope, block.keys[:, :part], -places), self.keys, heads if alike else 1)
        values = factors("values", lambda: block.values[:, :part], self.values, min(self.group, heads) if alike else 1)
        return Factored(rope, places[:1] if alike else places, keys, values, block)


def _alike(form: Tensor | list[Tensor]) -> bool:
    """Whether all KV heads of a layer keep the same tokens."""
    return not isinstance(form, list) and (form.dim() == 1 or bool((form == form[:1]).all()))
