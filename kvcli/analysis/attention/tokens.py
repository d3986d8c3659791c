"""Tokens as they are written at the axes of figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcli.analysis.attention.data import Atlas
from kvcli.analysis.attention.sheet import short, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELLED = 40
"""Tokens up to which they are written at the axes."""
UNKNOWN = "⟨unk⟩"
"""A word that the tokenizer does not know: the model reads its token for unknown words in its place."""
SMALLEST, LARGEST = 5.5, 8.0
"""Points."""


def labels_of(atlas: Atlas, prompt: int) -> list[str] | None:
    """None where they are too many or must not be shown."""
    facts = atlas.prompts[prompt]
    tokens = facts["tokens"]
    if tokens is None or len(tokens) > LABELLED:
        return None
    unknown = set(facts.get("unknown", ()))
    return [UNKNOWN if i in unknown else short(visible(token), 14) for i, token in enumerate(tokens)]


def visible(token: str) -> str:
    """A token with its white space seen, and a mark for one that stands for no text."""
    return token.replace("\n", "↵").replace("\t", "→").removeprefix(" ") or ("␣" if token else "∅")


def points(count: int) -> float:
    """The size that so many labels are written in."""
    return max(SMALLEST, min(LARGEST, 220 / count))


def fitting(labels: list[str] | None, inches: float) -> list[str] | None:
    """The labels, or None where so many cannot be written apart within an axis of that length."""
    return labels if labels is not None and len(labels) * SMALLEST <= 72 * inches else None


def room(labels: Sequence[str] | None) -> float:
    """Inches that the longest of them needs."""
    if not labels:
        return 0.0
    return 0.0113 * points(len(labels)) * max(map(len, labels))


def token_axes(ax: Axes, labels: Sequence[str] | None, n: int, *, both: bool) -> None:
    if both:
        ax.tick_params(axis="y", pad=9)  # beside the band
    if labels is None:
        whole_ticks(ax.xaxis, 5)
        if both:
            whole_ticks(ax.yaxis, 5)
        return
    ax.set_xticks(range(n), labels, rotation=90, fontsize=points(n))
    if both:
        ax.set_yticks(range(n), labels, fontsize=points(n))
    ax.tick_params(length=1.5)
