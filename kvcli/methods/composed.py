"""Methods joined by '+': an evictor, then a merge of what it dropped, then a form to store the rest in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvcli.errors import KvcliError
from kvcli.methods.base import Domain, Merge, Method, Selection, Transform

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.cache.budget import Budget
    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating

ORDER = "an evictor first, then merge, then one transform, as in snapkv+merge+kivi:bits=4"


@dataclass(frozen=True)
class Composed(Method):
    """What its parts do, one after the other. The budget is the evictor's; the transform sees what is left."""

    kind = "composed"

    evictor: Any = field(default=None, metadata={"hidden": True})
    merge: Merge | None = field(default=None, metadata={"hidden": True})
    transform: Transform | None = field(default=None, metadata={"hidden": True})

    @classmethod
    def of(cls, parts: Sequence[Method], text: str) -> Composed:
        """Raises KvcliError for parts that cannot follow one another."""
        kinds = [
            "merge" if isinstance(p, Merge) else "transform" if isinstance(p, Transform) else "evict" for p in parts
        ]
        given = f"--method {text}"
        if kinds[0] == "merge":
            raise KvcliError(
                "there is nothing to merge: no evictor before it",
                given=given,
                fix=f"snapkv+{text}" if "evict" not in kinds else ORDER,
            )
        if len(set(kinds)) < len(kinds):
            twice = next(kind for kind in kinds if kinds.count(kind) > 1)
            what = {"evict": "two evictors", "merge": "two merges", "transform": "two forms to store in"}[twice]
            raise KvcliError(f"{what} cannot be combined", given=given, fix=ORDER)
        if kinds != sorted(kinds, key=("evict", "merge", "transform").index):
            raise KvcliError("these methods cannot be combined in this order", given=given, fix=ORDER)
        by_kind = dict(zip(kinds, parts, strict=True))
        evictor: Any = by_kind.get("evict")
        _check(evictor, [p for p in parts if p is not evictor], given)
        return cls(evictor, by_kind.get("merge"), by_kind.get("transform"))  # type: ignore[arg-type]

    @property
    def parts(self) -> list[Method]:
        return [p for p in (self.evictor, self.merge, self.transform) if p is not None]

    def needs(self) -> frozenset[str]:
        return frozenset().union(*(p.needs() for p in self.parts))

    def select(self, ctx: Context, budget: Budget) -> Selection:
        selection: Selection = self.evictor.select(ctx, budget)
        if self.transform is not None:
            selection.notes |= self.transform.notes(ctx, selection.kept)
        return selection

    def decodes(self) -> bool:
        """What is stored in another form is not evicted further, and a merge must know how to fold what leaves."""
        if self.transform is not None or (self.merge is not None and not self.merge.decodes()):
            return False
        answer: bool = self.evictor.decodes()
        return answer

    @property
    def decoding(self) -> str:  # type: ignore[override]
        return self.evictor.decoding if self.decodes() else ""

    @property
    def decode_reads(self) -> bool:  # type: ignore[override]
        return bool(self.evictor.decode_reads) or (self.merge is not None and self.merge.decode_reads)

    @property
    def decode_as_selected(self) -> bool:  # type: ignore[override]
        return bool(self.evictor.decode_as_selected)

    def decode_least(self) -> int:
        return int(self.evictor.decode_least())

    def decode_whole(self) -> int:
        return int(self.evictor.decode_whole())

    def decode_start(self, ctx: Context, layer: int) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.evictor.decode_start(ctx, layer)
        return state

    def decode_update(self, view: Generating) -> None:
        self.evictor.decode_update(view)

    def decode_rank(self, view: Generating) -> Tensor:
        rank: Tensor = self.evictor.decode_rank(view)
        return rank

    def decode_leaves(self, view: Generating) -> Tensor:
        gone: Tensor = self.evictor.decode_leaves(view)
        return gone

    def settings(self) -> dict[str, Any]:
        return {f"{p.name}.{k}": v for p in self.parts for k, v in p.settings().items()}

    @property
    def domain(self) -> Domain:  # type: ignore[override]
        domain: Domain = self.evictor.domain
        return domain

    @property
    def budget_scope(self) -> str:  # type: ignore[override]
        scope: str = self.evictor.budget_scope
        return scope

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        return any(p.seeded for p in self.parts)

    @property
    def keeps_last(self) -> bool:  # type: ignore[override]
        return all(p.keeps_last for p in self.parts)

    @property
    def sharing(self) -> int:  # type: ignore[override]
        return max(p.sharing for p in self.parts)


def _check(evictor: Any, rest: Sequence[Method], given: str) -> None:
    """Raises KvcliError where the rest cannot follow this evictor."""
    if evictor.kind != "evict":
        what = f"{evictor.name} ({evictor.kind}) stands alone: it is not an evictor"
        raise KvcliError(what, given=given, fix=ORDER)
    if getattr(evictor, "rerotate", False):
        what = "pairs that moved to other positions are neither merged nor stored in another form"
        raise KvcliError(what, given=given, fix="rerotate=false")
    if evictor.domain.points == (1.0,):
        raise KvcliError(f"{evictor.name} evicts nothing", given=given, fix="+".join(p.name for p in rest))
    for part in rest:
        if getattr(part, "across_layers", False) and evictor.layers_alike() == 1:
            what = f"{part.name} needs neighbouring layers that keep the same tokens; those of {evictor.name} do not"
            raise KvcliError(what, given=given, fix=f"streaming_llm+{part.name}")


def merge_of(method: Method) -> Merge | None:
    return method.merge if isinstance(method, Composed) else None


def transform_of(method: Method) -> Transform | None:
    if isinstance(method, Transform):
        return method
    return method.transform if isinstance(method, Composed) else None
