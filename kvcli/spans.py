"""Stretches of a prompt: segments of its text, regions and spans of its tokens. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REGIONS = ("system", "context", "shot", "question")
"""What a task's text can be; the prompt builder adds `special` for template tokens and BOS."""

Span = tuple[int, int]
"""[start, end) in token positions."""


@dataclass(frozen=True)
class Segment:
    """A stretch of prompt text in one region; `shot` counts from 0."""

    text: str
    region: str
    shot: int = -1

    def __post_init__(self) -> None:
        if self.region not in REGIONS or (self.region == "shot") != (self.shot >= 0):
            raise ValueError(f"a segment is one of {REGIONS}, and only a shot has a number: {self.region} {self.shot}")


@dataclass(frozen=True)
class Region:
    """A named stretch of the prompt's tokens: system, context, shot (with index), question or special."""

    kind: str
    start: int
    end: int
    index: int = -1

    @property
    def label(self) -> str:
        return f"shot {self.index}" if self.kind == "shot" else self.kind

    def __len__(self) -> int:
        return self.end - self.start


def question_start(regions: Sequence[Region]) -> int:
    """First token of the question; the prompt's last token where it has none."""
    return next((r.start for r in regions if r.kind == "question"), regions[-1].end - 1)
