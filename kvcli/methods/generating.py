"""What a method may read and write while tokens are generated: one layer of many rows after a decode step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Generating:
    """One layer of R rows, after the newest token's KV pair was stored and attended with. S slots per KV head.

    Slots are in no particular order; a freed slot is used again. Rows are of one method with one set of settings; their
    prompts, budgets and ages differ.

    position [R, H_kv, S] int64: true position of each slot's pair, -1 where a slot is empty.
    competing [R, H_kv, S] bool: pairs that may be evicted: all of them (unified), or the generated ones (separate).
    attention [R, H, S] float32 at least: the newest query's attention over the slots, 0 in empty ones; None unless
        `decode_reads`.
    state[name] [R, X, S, ...], X any number of heads: the method's own figures per slot, begun by `decode_start`,
        of any dtype, changed in place by `decode_update`; 0 in a new slot.
    n, newest [R, 1, 1] int64: prompt tokens, and position of the newest token.
    cap [R, 1, 1] int64, or [R, H_kv, 1] where heads differ (`decode_as_selected`): how many competing pairs may stay.
    counts [R, 1, 1] bool: False where the newest query is the last prompt token fed again, whose attention the
        prefill's statistics hold already.
    keys, values [R, H_kv, S, D]: the slots' pairs, keys rotated to their true positions; anything in empty slots. To be
        read only, but for a merge that folds.
    facts[name] [R, H_kv]: what `Selection.facts` and `Merge.decode_facts` said of whole heads.
    texts(): the newest token's text, row by row.
    strict: what a method protects is not cut to half of the cap (--strict-window).
    """

    layer: int
    heads: int
    position: Tensor
    competing: Tensor
    attention: Tensor | None
    n: Tensor
    newest: Tensor
    cap: Tensor
    counts: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    keys: Tensor | None = None
    values: Tensor | None = None
    facts: dict[str, Tensor] = field(default_factory=dict)
    texts: Callable[[], list[str]] | None = None
    strict: bool = False

    @property
    def kv_heads(self) -> int:
        return self.position.shape[1]

    def protected(self, most: int) -> Tensor:
        """[R, 1, 1], or [R, H_kv, 1] where heads differ: how many of `most` protected pairs stay. They take at most
        half of the cap; with --strict-window all stay, and the cap is at least `Method.decode_whole`."""
        return self.cap.new_full(self.cap.shape, most) if self.strict else (self.cap // 2).clamp_max(most)

    def per_kv_head(self, score: Tensor, reduce: str = "mean") -> Tensor:
        """[R, H, ...] -> [R, H_kv, ...]: mean or max over each group of query heads that share a KV head."""
        grouped = score.unflatten(1, (self.kv_heads, score.shape[1] // self.kv_heads))
        return grouped.mean(2) if reduce == "mean" else grouped.amax(2)

    def all_heads_alike(self, score: Tensor) -> Tensor:
        """[R, 1, S] -> [R, H_kv, S]: one ranking for all KV heads of the layer.

        Only for methods whose KV heads always hold the same positions: then their slots agree.
        """
        return score.expand(-1, self.kv_heads, -1)
