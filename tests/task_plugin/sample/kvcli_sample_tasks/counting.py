"""A task that is a class: which number comes next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcli.evals.data import first_of
from kvcli.evals.spec import Sample, Score, Segment, Task


@dataclass(frozen=True)
class Counting(Task):
    """`size` questions after the next number; each begins at a number of its own."""

    name: str = "counting"
    version: str = "1"
    ability: str = "counting"
    metric: str = "accuracy"
    shots: int = 0
    max_new_tokens: int = 2
    until: tuple[str, ...] = ("\n",)
    chance: float | None = 0.0
    chat: bool = False
    suites: tuple[str, ...] = ("sample_suite",)
    size: int = 20
    step: int = 1

    def samples(self, *, limit: int | None, **_: Any) -> list[Sample]:
        return [self._sample(i) for i in first_of(self.name, self.size, limit)]

    def _sample(self, start: int) -> Sample:
        text = " ".join(str(start + k * self.step) for k in range(8))
        return Sample(str(start), (Segment(text, "question"),), str(start + 8 * self.step))

    def score(self, sample: Sample, output: str) -> Score:
        words = output.split()
        return Score(float(words[:1] == [sample.target]), words[0] if words else None)
