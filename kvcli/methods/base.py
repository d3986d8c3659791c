"""What a compression method is: settings, what it needs from the prefill, and one call that selects.

A method never runs the model and keeps nothing between samples. Method files import torch inside their functions, so
that names and settings can be checked and listed without it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kvcli.cache.budget import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from kvcli.methods.context import Context


def setting(
    default: Any,
    *,
    help: str,
    ge: float | None = None,
    le: float | None = None,
    choices: Sequence[str] | None = None,
    odd: bool = False,
) -> Any:
    """A dataclass field that users set as `method:name=value`, with its stated range."""
    return field(default=default, metadata={"help": help, "ge": ge, "le": le, "choices": choices, "odd": odd or None})


@dataclass(frozen=True)
class Domain:
    """Which kept ratios a method can reach: a range (low, 1], a list of points, or none (its own knob decides)."""

    kind: str = "continuous"
    low: float = 0.0
    points: tuple[float, ...] = ()


@dataclass
class Selection:
    """Which KV pairs stay.

    kept: one entry per layer, each sorted positions (int64) without repeats, the last prompt position among them:
        [K] (all KV heads alike), [H_kv, K] (same number per head) or a list of H_kv tensors (ragged).
    rerotate: the kept keys move to positions 0..K-1 (needs one length everywhere).
    """

    kept: Sequence[Tensor | list[Tensor]]
    flags: frozenset[str] = frozenset()
    rerotate: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


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
    keeps_last: ClassVar[bool] = True
    """False: it may evict the last prompt token; then only `--first-token prefill` can be measured."""
    seeded: ClassVar[bool] = False
    """True when the selection is random: the cells of other seeds differ."""

    def needs(self) -> frozenset[str]:
        """Statistics of the prefill it reads: 'column_sum', 'column_sum:question', 'window:W'."""
        return frozenset()

    @abstractmethod
    def select(self, ctx: Context, budget: Budget) -> Selection:
        """Kept positions of one prompt under `budget`; must not modify ctx."""

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def card(cls) -> dict[str, Any]:
        """All declared facts, for `list methods --json` and the fidelity cards."""
        return {
            "name": cls.name, "title": cls.title, "paper": cls.paper, "tier": cls.tier, "kind": cls.kind,
            "phases": list(cls.phases), "budget_scope": cls.budget_scope, "domain": dataclasses.asdict(cls.domain),
            "sharing": cls.sharing, "protects": cls.protects, "seeded": cls.seeded,
            "settings": [
                {"name": f.name, "default": f.default, **{k: v for k, v in f.metadata.items() if v is not None}}
                for f in dataclasses.fields(cls)
            ],
        }  # fmt: skip
