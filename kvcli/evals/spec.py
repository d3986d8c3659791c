"""What a task is: its facts, its samples as segments of text, and how an output is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcli.config import stable_hash
from kvcli.grammar import task_base
from kvcli.spans import REGIONS as REGIONS
from kvcli.spans import Segment as Segment


@dataclass(frozen=True)
class Sample:
    """One question: its prompt in segments (their texts joined give the whole prompt) and what is right.

    cluster: samples that share a passage, subject or generation form one cluster in the statistics. options:
    continuations to choose from, each with the white space it begins with; then nothing is generated, the likeliest
    one is the answer, and `target` is the index of the right one. meta: what scoring needs; the engine adds `thinking`,
    true where the rendered prompt ends in an opened `<think>`.
    """

    id: str
    segments: tuple[Segment, ...]
    target: Any
    cluster: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "".join(s.text for s in self.segments)

    @property
    def answer(self) -> Any:
        """What is right, as records have it: of options the text."""
        return self.options[self.target].strip() if self.options else self.target

    @property
    def fingerprint(self) -> str:
        """Tells prompts apart without showing them, and without a tokenizer."""
        return stable_hash([[s.text, s.region, s.shot] for s in self.segments], 16)


Tokens = Callable[[str], int]
"""How many tokens a text has."""


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
    output_type: str = "generate_until"
    """Or multiple_choice: samples have options."""
    chat: bool = True
    """False: prompts are raw text even where the tokenizer has a chat template."""
    reference: dict[str, dict[int, float]] = field(default_factory=dict)
    """Published full-cache scores: model -> shots -> score."""
    suites: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    """Names in a score's `extra` that say where a sample stands (a depth, a length) and are no scores."""
    source: str = ""
    """The definition's file."""
    digest: str = ""
    """Hash of the definition's file and of the code it names: an edited task is another task."""
    shots_asked: int | None = None
    """From `--task NAME:shots=N`: what `usual_shots` is, while `shots` stays the definition's."""

    @property
    def base(self) -> str:
        """The name without settings: `niah` of `niah:depth=0.5`. What is the same for all settings of a task (the order
        of its samples, the folder of its data) hangs on it."""
        return task_base(self.name)

    @property
    def usual_shots(self) -> int:
        """The number of shots where --shots says nothing."""
        return self.shots if self.shots_asked is None else self.shots_asked

    def check(self) -> None:
        """Raises KvcliError where this machine cannot score the task. Asked before weights are loaded."""
        return

    def remarks(self, *, shots: int, data_dir: str | None) -> list[str]:
        """What a user should know of the prompts of a run with these settings, in sentences that name the task: the
        run's warnings. Raises what `samples` would raise."""
        return []

    @abstractmethod
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
        """The first `limit` samples of one permutation fixed by the task's name (nested: 20 is inside 100).

        shot_order: 0 as they come, another number shuffles the same shots (`kvcli.evals.data.reordered`). tokens: how
        many tokens a text has for the run's tokenizer, for tasks that are generated to a length.
        """

    @abstractmethod
    def score(self, sample: Sample, output: str) -> Score:
        """Judges one output text."""

    def judged(self, sample: Sample, output: str, loglikelihoods: Sequence[float]) -> Score:
        """`choose` where options have log-likelihoods, else `score`. Raises ValueError for a score outside of 0..1."""
        found = self.choose(sample, loglikelihoods) if loglikelihoods else self.score(sample, output)
        if not 0 <= found.value <= 1:
            raise ValueError(f"the scorer of {self.name} gave {found.value}, scores lie in 0..1")
        return found

    @property
    def published(self) -> dict[str, dict[str, float]]:
        """`reference` with keys as JSON has them."""
        return {model: {str(shots): score for shots, score in by.items()} for model, by in self.reference.items()}

    def choose(self, sample: Sample, loglikelihoods: Sequence[float]) -> Score:
        """Judges a choice among the sample's options by their log-likelihoods in nats, summed over tokens.

        Rule: lm-evaluation-harness `multiple_choice`: `acc` takes the likeliest option, `acc_norm` the likeliest per
        character of the option without the blank in front. Both are stored; the task's metric is the score.
        """
        texts = [option.lstrip() for option in sample.options]
        per_length = [v / max(1, len(text)) for v, text in zip(loglikelihoods, texts, strict=True)]
        best = {"acc": _first_best(loglikelihoods), "acc_norm": _first_best(per_length)}
        extra = {name: float(at == sample.target) for name, at in best.items()}
        metric = self.metric if self.metric in best else "acc"
        return Score(extra[metric], texts[best[metric]], extra)


def _first_best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])
