"""What a compression method is: settings, what it needs from the prefill, and one call that selects.

A method never runs the model and keeps nothing between samples. Method files import torch inside their functions, so
that names and settings can be checked and listed without it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kvcli.cache.budget import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.context import Context
    from kvcli.methods.generating import Generating


def setting(
    default: Any,
    *,
    help: str,
    ge: float | None = None,
    le: float | None = None,
    choices: Sequence[str] | None = None,
    odd: bool = False,
    paper: str | None = None,
) -> Any:
    """A dataclass field that users set as `method:name=value`, with its stated range. paper: the source's value, where
    it is another one or the source has several."""
    facts = {"help": help, "ge": ge, "le": le, "choices": choices, "odd": odd or None, "paper": paper}
    return field(default=default, metadata=facts)


def setting_fields(cls: type[Method]) -> list[dataclasses.Field[Any]]:
    """The fields users may set."""
    return [f for f in dataclasses.fields(cls) if not f.metadata.get("hidden")]


@dataclass(frozen=True)
class Domain:
    """Which kept ratios a method can reach: a range (low, 1], a list of points, or none (its own knob decides)."""

    kind: str = "continuous"
    low: float = 0.0
    points: tuple[float, ...] = ()
    floor: str = ""
    """In words, where `low` depends on the prompt's length: what is kept at any smaller ratio, flagged."""


@dataclass
class Selection:
    """Which KV pairs stay.

    kept: one entry per layer, each sorted positions (int64) without repeats, the last prompt position among them:
        [K] (all KV heads alike), [H_kv, K] (same number per head) or a list of H_kv tensors (ragged).
    rerotate: the kept keys move to positions 0..K-1 (needs one length everywhere).
    facts: per layer name -> [H_kv], what was decided about whole heads, for the decode phase (`Generating.facts`).
    """

    kept: Sequence[Tensor | list[Tensor]]
    flags: frozenset[str] = frozenset()
    rerotate: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    facts: Sequence[dict[str, Tensor]] = ()


@dataclass(frozen=True)
class Method(ABC):
    """Base of every method. Subclasses are frozen dataclasses whose fields are made with `setting`."""

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    tier: ClassVar[int] = 3
    kind: ClassVar[str] = "evict"
    phases: ClassVar[tuple[str, ...]] = ("prefill",)
    budget_scope: ClassVar[str] = "head"
    """Where the budget binds: head, layer or model."""
    domain: ClassVar[Domain] = Domain()
    sharing: ClassVar[int] = 1
    protects: ClassVar[str] = "the last token"
    open_points: ClassVar[tuple[tuple[str, str], ...]] = ()
    """What the paper leaves open, and how it is decided here; for the card."""
    keeps_last: ClassVar[bool] = True
    """False: it may evict the last prompt token; then only `--first-token prefill` can be measured."""
    seeded: ClassVar[bool] = False
    """True when the selection is random: the cells of other seeds differ."""
    decoding: ClassVar[str] = ""
    """How generated tokens are compressed: `unified` (prompt and answer share one pool), `separate` (the prompt's part
    stays as it was selected), `own` (its rule says which pairs leave; there is no cap) or not at all."""
    decode_as_selected: ClassVar[bool] = False
    """`unified`: the pool of each head begins with what was selected for it, however much, and grows as the cap does;
    else all heads have the cap."""
    decode_reads: ClassVar[bool] = True
    """Whether it reads the attention of every new query while generating."""

    def needs(self) -> frozenset[str]:
        """Statistics of the prefill it reads: 'column_sum', 'column_sum:question', 'window:W', 'reconstruction'."""
        return frozenset()

    @abstractmethod
    def select(self, ctx: Context, budget: Budget) -> Selection:
        """Kept positions of one prompt under `budget`; must not modify ctx."""

    def prefill_window(self) -> tuple[int, int] | None:
        """(sinks, recent): the KV heads that `Selection.facts` calls `streams` read the prompt, too, through this
        window, in a prefill of its own (`kind` is `in-prefill`); None: the selection is made behind the prefill."""
        return None

    def decodes(self) -> bool:
        """Whether it compresses generated tokens with these settings."""
        return bool(self.decoding)

    def decode_least(self) -> int:
        """Generated tokens it never goes below where they have a cap of their own (`separate`)."""
        return 1

    def decode_whole(self) -> int:
        """Pairs that --strict-window never lets go while generating: the paper's protected ones, the newest among
        them. 0: none has a size of its own."""
        return 0

    def decode_start(self, ctx: Context, layer: int) -> dict[str, Tensor]:
        """Its figures for the prompt's keys as generation begins: name -> [X, n, ...], X any number of heads."""
        return {}

    def decode_update(self, view: Generating) -> None:  # noqa: B027  (most methods keep nothing)
        """Takes the newest query's attention into `view.state`, in place."""

    def decode_rank(self, view: Generating) -> Tensor:
        """[R, H_kv, S] float: what ranks lowest among the competing pairs leaves first, +inf last; of equal ones the
        newest leaves. Other slots may hold anything."""
        raise NotImplementedError(f"{type(self).__name__} does not compress generated tokens")

    def decode_leaves(self, view: Generating) -> Tensor:
        """[R, H_kv, S] bool: the pairs that leave now, of a method whose `decoding` is `own`. The newest must stay."""
        raise NotImplementedError(f"{type(self).__name__} has no rule of its own for generated tokens")

    def layers_alike(self) -> int:
        """How many neighbouring layers, counted from the first, keep the same tokens with these settings: 1 where each
        chooses for itself, 0 for all."""
        return 1

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in setting_fields(type(self))}

    @classmethod
    def card(cls) -> dict[str, Any]:
        """All declared facts, for `list methods --json` and the fidelity cards."""
        return {
            "name": cls.name, "title": cls.title, "paper": cls.paper, "tier": cls.tier, "kind": cls.kind,
            "phases": list(cls.phases), "budget_scope": cls.budget_scope, "domain": dataclasses.asdict(cls.domain),
            "sharing": cls.sharing, "protects": cls.protects, "seeded": cls.seeded,
            "decoding": cls.decoding or None,
            "settings": [
                {"name": f.name, "default": f.default, **{k: v for k, v in f.metadata.items() if v is not None}}
                for f in setting_fields(cls)
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class Wrapper(Method):
    """A method over another one's scores. `base` names it, `base.KEY=value` are its settings; `inner` is what the
    catalog built of them: a `RankedMethod`. A subclass gives `base` its default."""

    base: str = setting("", help="whose scores: a method that ranks keys per head")
    inner: Any = field(default=None, metadata={"hidden": True})

    def __post_init__(self) -> None:
        for fact in ("seeded", "sharing", "keeps_last"):  # on the instance: the class has its own, for its card
            object.__setattr__(self, fact, getattr(self.inner, fact, getattr(type(self), fact)))

    def needs(self) -> frozenset[str]:
        needed: frozenset[str] = self.inner.needs()
        return needed

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **{f"base.{k}": v for k, v in self.inner.settings().items()}}


class Stored(Protocol):
    """How some KV heads of one layer of one row are stored: a transform's form of K pairs, and generated ones behind.

    A store is one row's own; nothing of it is shared.
    """

    def append(self, keys: Tensor, values: Tensor) -> None:
        """One more pair per head: [h, 1, D] each."""

    def dense(self) -> tuple[Tensor, Tensor]:
        """What attention reads: keys and values [h, K, D], in the order the pairs came."""

    def payload(self) -> int:
        """Bytes it needs: scales, zero points, index tables and bases included, floats counted as 16 bit."""

    def tensors(self) -> list[Tensor]:
        """All tensors it holds, so that their real storage can be compared with `payload`."""


@dataclass
class Block:
    """Pairs of neighbouring KV heads of one layer that hold the same number of them.

    keys, values [h, K, D] (after RoPE); positions int64 [h, K], ascending; heads: which KV heads of the layer.
    """

    layer: int
    heads: slice
    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Transform(Method):
    """Keeps every pair that an evictor left and stores it in another form."""

    kind = "transform"
    domain = Domain("none")
    protects = "everything"

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        kept = [torch.arange(ctx.n)] * ctx.layers
        return Selection(kept, notes=self.notes(ctx, kept))

    def notes(self, ctx: Context, kept: Sequence[Tensor | list[Tensor]]) -> dict[str, Any]:
        """What a record says of the form in which these pairs are stored."""
        return {}

    @abstractmethod
    def store(self, ctx: Context, layers: Sequence[Sequence[Block]]) -> list[list[Stored]]:
        """The stored form of each block of each layer; must not modify them. Raises ValueError for what it cannot
        store."""


@dataclass(frozen=True)
class Merge(Method):
    """Folds what an evictor drops into what it keeps. Only behind an evictor."""

    kind = "merge"

    def select(self, ctx: Context, budget: Budget) -> Selection:
        raise ValueError(f"{self.name} needs an evictor before it")

    @abstractmethod
    def fold(self, ctx: Context, layer: int, kept: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per KV head keys and values [K, D] of the kept pairs with the dropped ones folded in. kept: positions [K]."""

    def decodes(self) -> bool:
        """Whether it also folds what leaves while tokens are generated: `decode_fold`."""
        return False

    def decode_facts(self, ctx: Context, layer: int, kept: Sequence[Tensor]) -> dict[str, Tensor]:
        """Its figures for the layer's KV heads as generation begins: name -> [H_kv]. kept: positions [K] per head."""
        return {}

    def decode_fold(self, view: Generating, gone: Tensor) -> None:
        """Folds the pairs that leave, gone [R, H_kv, S] bool, into others of `view.keys` and `view.values`, in place;
        may change `view.facts` in place. `gone` may be empty."""
        raise NotImplementedError(f"{type(self).__name__} does not fold generated tokens")


@dataclass(frozen=True)
class Reader(Method):
    """Keeps every pair and reads some of them for each new token: memory is not freed."""

    kind = "read"
    phases = ("decode",)
    domain = Domain("none")

    def select(self, ctx: Context, budget: Budget) -> Selection:
        import torch

        return Selection([torch.arange(ctx.n)] * ctx.layers, frozenset({"simulated"}))

    @abstractmethod
    def read(self, layer: int, query: Tensor, keys: Tensor, filled: Tensor) -> Tensor | None:
        """bool [R, H, S]: the pairs each query head reads; None: all of them. query [R, H, D], rotated; keys
        [R, H_kv, S, D], the new token's own among them, in the order of the text; filled bool [R, H_kv, S]."""

    @abstractmethod
    def looked_at(self, pairs: Tensor, width: int) -> Tensor:
        """Elements read beside the pairs in order to choose, for `pairs` filled slots (any shape) of keys of `width`
        elements; 0 where nothing was chosen (pairs = 0)."""
