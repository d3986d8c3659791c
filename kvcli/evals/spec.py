"""What a task is: its facts, its samples as segments of text, and how an output is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from kvcli.spans import REGIONS as REGIONS
from kvcli.spans import Segment as Segment


@dataclass(frozen=True)
class Sample:
    """One question: its prompt in segments (their texts joined give the whole prompt) and what is right.

    cluster: samples that share a passage, subject or generation form one cluster in the statistics.
    """

    id: str
    segments: tuple[Segment, ...]
    target: Any
    cluster: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(s.text for s in self.segments)


@dataclass(frozen=True)
class Score:
    """value in [0, 1]; extracted: the answer found in the output, None when there is none."""

    value: float
    extracted: str | None
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task(ABC):
    """A task definition as loaded from tasks/NAME.yaml (docs/adding-a-task.md).

    A builder class adds fields of its own; each may be set by a key of the same name in the YAML file.
    """

    name: str
    version: str
    ability: str
    metric: str
    shots: int
    max_new_tokens: int
    until: tuple[str, ...] = ()
    chance: float | None = None
    harmful: bool = False
    chat: bool = True
    """False: prompts are raw text even where the tokenizer has a chat template."""
    reference: dict[str, float] = field(default_factory=dict)
    suites: tuple[str, ...] = ()
    source: str = ""
    """The definition's file."""
    digest: str = ""
    """Hash of the definition's file and of the code it names: an edited task is another task."""

    @abstractmethod
    def samples(self, *, shots: int, shot_seed: int, limit: int | None, data_dir: str | None) -> list[Sample]:
        """The first `limit` samples of one permutation fixed by the task's name (nested: 20 is inside 100)."""

    @abstractmethod
    def score(self, sample: Sample, output: str) -> Score:
        """Judges one output text."""
