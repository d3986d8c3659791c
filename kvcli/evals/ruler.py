"""What all tasks of RULER share: a template around a context of the wanted length, examples, and the metric.

Source: NVIDIA/RULER scripts/data/synthetic/*.py and constants.py (commit c3f5e3b, Apache-2.0). As there, `length` is
prompt and answer together, and the beginning of the answer stands at the end of the prompt; chance has other numbers.
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcli.errors import KvcliError
from kvcli.evals.data import first_of, reordered
from kvcli.evals.lengths import counter, fitted
from kvcli.evals.spec import Sample, Score, Segment, Task, Tokens


@dataclass(frozen=True)
class Episode:
    """A question before its length is settled. build(n): the context of n units, at least `least`; guess: units for a
    whole prompt; own: kvcli's own words or text are in it."""

    template: str
    build: Callable[[int], str]
    answers: tuple[str, ...]
    least: int = 1
    guess: int = 100
    own: bool = False

    def prompt(self, n: int) -> str:
        return self.template.replace("{context}", self.build(n))


@dataclass(frozen=True, kw_only=True)
class Ruler(Task):
    """`size` prompts of at most `length` tokens less the answer's, as near to that as one unit of context allows."""

    length: int = 4096
    size: int = 500

    def __post_init__(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if self.length < 1 or self.size < 1:
            raise ValueError("'length' and 'size' must be at least 1")

    @abstractmethod
    def episodes(self, data_dir: str | None) -> Callable[[int, random.Random], Episode]:
        """What makes episode number i."""

    def example(self, data_dir: str | None, rng: random.Random, tokens: Tokens) -> str:
        """A worked example. Raises KvcliError for tasks that have none."""
        raise KvcliError(f"{self.base} has no exemplars", given=f"--task {self.base} with --shots", fix="--shots 0")

    def samples(
        self,
        *,
        shots: int,
        shot_seed: int,
        limit: int | None,
        data_dir: str | None,
        shot_order: int = 0,
        tokens: Tokens | None = None,
    ) -> list[Sample]:
        """Raises KvcliError where `length` has no room."""
        if shots < 0:
            raise KvcliError("shots cannot be negative", given=f"--shots {shots}", fix="--shots 0")
        count, make = counter(tokens), self.episodes(data_dir)
        chosen, samples, guess = first_of(self.name, self.size, limit), [], 0
        for i in chosen:
            seeds = [f"kvcli:{self.base}:{i}:example:{shot_seed}:{j}" for j in range(shots)]
            examples = reordered([self.example(data_dir, random.Random(s), count) for s in seeds], shot_order)
            episode = make(i, random.Random(f"kvcli:{self.base}:{i}"))
            guess = self._units(episode, examples, guess or episode.guess, count)
            samples.append(self._sample(i, episode, examples, guess))
        return samples

    def score(self, sample: Sample, output: str) -> Score:
        """The share of the right answers that stand in the output, in any case.

        Rule: NVIDIA/RULER scripts/eval/synthetic/constants.py `string_match_all`.
        """
        return self._judged(sample, output, lambda hits: sum(hits) / len(hits))

    def _judged(self, sample: Sample, output: str, fold: Callable[[Sequence[bool]], float]) -> Score:
        text = re.sub(r"[\x00-\x1f]", "\n", output).strip()
        hits = [gold.lower() in text.lower() for gold in sample.target]
        return Score(fold(hits), text or None, {"length": float(self.length)})

    def _units(self, episode: Episode, examples: Sequence[str], guess: int, tokens: Tokens) -> int:
        room, before = self.length - self.max_new_tokens, "".join(examples)
        n = fitted(lambda n: before + episode.prompt(n), tokens, room, guess, episode.least)
        if n < episode.least:
            least = tokens(before + episode.prompt(episode.least)) + self.max_new_tokens
            what = f"{self.base}: no prompt and answer have as few as {self.length} tokens"
            raise KvcliError(what, given=f"length={self.length}", fix=f"--task {self.base}:length={least} or more")
        return n

    def _sample(self, index: int, episode: Episode, examples: Sequence[str], n: int) -> Sample:
        head, _, tail = episode.template.partition("{context}")
        shots = [Segment(text, "shot", i) for i, text in enumerate(examples)]
        parts = [Segment(head, "system"), Segment(episode.build(n), "context"), Segment(tail, "question")]
        name = f"{self.length}-{index}" + ("-own" if episode.own else "")
        meta = {"length": self.length, "units": n}
        return Sample(name, (*shots, *parts), list(episode.answers), f"episode {index}", meta)
