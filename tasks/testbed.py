"""Prompts and scores of the testbed tasks `tb_*`: exam episodes of kvcli's own small language (docs/testbed.md)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from kvcli.errors import KvcliError
from kvcli.evals.data import first_of, reordered
from kvcli.evals.spec import Sample, Score, Segment, Task
from kvcli.testbed import language
from kvcli.testbed import vocabulary as V


@dataclass(frozen=True, kw_only=True)
class Exam(Task):
    """`size` episodes of one family with prompts of about `prompt_tokens` tokens.

    operators: how many an arithmetic episode may have; distractors: the share of exemplars that are of other families.
    """

    family: Literal["knowledge", "choice", "recall", "arithmetic", "code", "safety", "needle", "longgen"]
    prompt_tokens: int = 448
    size: int = 400
    operators: int = language.PLAIN.operators
    distractors: float = language.PLAIN.distractors

    def __post_init__(self) -> None:
        if self.prompt_tokens < 16 or self.size < 1:
            raise ValueError("'prompt_tokens' must be at least 16 and 'size' at least 1")
        if not 2 <= self.operators <= len(V.OPERATORS) or not 0 <= self.distractors < 1:
            raise ValueError(f"'operators' lies in 2..{len(V.OPERATORS)}, 'distractors' in 0..1 (1 excluded)")

    def samples(self, *, shots: int, shot_seed: int, limit: int | None, shot_order: int = 0, **_: Any) -> list[Sample]:
        """Needs no data; the random numbers are never those of training, whose seeds are numbers."""
        if shots < 0:
            raise KvcliError("shots cannot be negative", given=f"--shots {shots}", fix="--shots 0")
        if shot_order and self.family in BUILDING:
            what = f"the examples of {self.name} build on those before them"
            raise KvcliError(what, given=f"--shot-order {shot_order}", fix="--shot-order 0, or another task")
        return [self._sample(i, shots, shot_seed, shot_order) for i in first_of(self.name, self.size, limit)]

    def score(self, sample: Sample, output: str) -> Score:
        words = output.split()
        words = words[: words.index(V.END)] if V.END in words else words
        return SCORERS[self.family](words, sample.target.split())

    def _sample(self, index: int, shots: int, shot_seed: int, shot_order: int) -> Sample:
        seed = f"testbed-exam:{self.family}:{self.prompt_tokens}:{shots}:{shot_seed}:{index}"
        dialect = language.Dialect(self.operators, self.distractors)
        try:
            episode = language.exam_episode(random.Random(seed), self.family, self.prompt_tokens, shots, dialect)
        except (ValueError, IndexError) as e:
            fix = f"--shots {self.shots}, or a copy of {self.source} with its own name and another prompt_tokens"
            raise KvcliError(f"{self.name}: {e}", given=f"--shots {shots}", fix=fix) from e
        plain = shots == self.shots and shot_seed == 0
        name = str(index) if plain else f"{index}@{shots}.{shot_seed}"  # other shots, other question
        return Sample(name, segments(episode, shot_order), " ".join(episode.shots[-1].answer))


def segments(episode: language.Episode, shot_order: int = 0) -> tuple[Segment, ...]:
    """The prompt without `<bos>`, which the tokenizer adds: words joined by single spaces, each segment but the last
    ending in one, so that no word spans two segments."""
    *exemplars, test = episode.shots
    exemplars = reordered(exemplars, shot_order)
    head = [V.TAG[episode.family]] + (episode.header if episode.header_region == "system" else [])
    passage = [] if episode.header_region == "system" else episode.header
    parts = [("system", -1, head), ("context", -1, passage)]
    parts += [("shot", i, [*shot.question, *shot.answer, V.END]) for i, shot in enumerate(exemplars)]
    spaced = [Segment(" ".join(words) + " ", region, shot) for region, shot, words in parts if words]
    return (*spaced, Segment(" ".join(test.question), "question"))


def _letter(words: list[str], right: list[str]) -> Score:
    """The letter, the second word, decides; the option before it is the model's way there."""
    letter = words[1] if len(words) > 1 and words[1] in V.LETTERS else None
    return Score(float(letter == right[1]), letter)


def _whole(form: str) -> Callable[[list[str], list[str]], Score]:
    """All words must be right; an answer is found when they have the form (K key, V value, N number)."""

    def judge(words: list[str], right: list[str]) -> Score:
        found = re.fullmatch(form, "".join(map(_kind, words)))
        return Score(float(words == right), " ".join(words) if found else None)

    return judge


def _chain(words: list[str], right: list[str]) -> Score:
    """The whole worked chain must be right; extra `final` says whether the number behind '#' is."""
    final = words[-1] if len(words) > 1 and words[-2] == "#" and words[-1] in V.NUMBERS else None
    return Score(float(words == right), final, {"final": float(final == right[-1])})


def _refusal(words: list[str], right: list[str]) -> Score:
    """The decision, the second word, counts; extra `refused` is its direction."""
    decision = words[1] if len(words) > 1 and words[1] in ("refuse", "comply") else None
    return Score(float(decision == right[1]), decision, {"refused": float(decision == "refuse")})


def _pairs(words: list[str], right: list[str]) -> Score:
    """Share of the key-value pairs restated right. A key's first restatement counts, wherever it stands: one lost word
    costs its own pair, not all behind it."""
    found: dict[str, str] = {}
    for key, value in pairwise(words):
        if _kind(key) == "K" and _kind(value) == "V":
            found.setdefault(key, value)
    keys, values = right[0::2], right[1::2]
    hits = sum(found.get(key) == value for key, value in zip(keys, values, strict=True))
    return Score(hits / len(keys), " ".join(f"{k} {v}" for k, v in found.items()) or None)


def _kind(word: str) -> str:
    return KINDS.get(word, "-")


BUILDING = ("code",)
"""Families whose questions use what earlier ones set: their order cannot be changed."""
KINDS = dict.fromkeys(V.KEYS, "K") | dict.fromkeys(V.VALUES, "V") | dict.fromkeys(V.NUMBERS, "N")
SCORERS: dict[str, Callable[[list[str], list[str]], Score]] = {
    "knowledge": _letter, "choice": _letter, "recall": _whole("V"), "arithmetic": _chain, "code": _whole("K*N"),
    "safety": _refusal, "needle": _whole("VVV"), "longgen": _pairs,
}  # fmt: skip
