"""Needles that heads are profiled on: prompts that hold their answer once, and where it stands in their tokens."""

from __future__ import annotations

import dataclasses
import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvcli.errors import KvcliError
from kvcli.evals.loader import load_task
from kvcli.evals.spec import Sample, Score, Segment, Task
from kvcli.models.prompt import Prompt, build_prompt
from kvcli.models.wrapper import Model
from kvcli.spans import Span

SEED = 1_000_003
"""`--shot-seed` of the samples: exams count from 0, so no profiled prompt is an exam's."""
NEEDLE = "tb_needle"
"""What a model that reads the testbed's language is profiled on; any other on `PassKeys`."""

SENTENCES = (
    "The river runs past the old mill and turns north behind the hill.", "Rain is expected in the late afternoon.",
    "A train leaves the station every twenty minutes.", "The library opens at nine and closes at six.",
    "Most of the houses in this street have a small garden.", "She put the letters back into the drawer.",
    "The bakery on the corner sells bread made with rye flour.", "Two boats were tied to the wooden pier.",
    "He had forgotten to wind the clock in the hall.", "The path through the forest is closed in winter.",
    "Nobody remembered who had planted the oak tree.", "The museum shows maps from four centuries.",
    "They painted the fence green last summer.", "A cat was asleep on the window sill.",
    "The bus stops in front of the town hall.", "In spring the meadow is full of flowers.",
)  # fmt: skip
DOORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")


@dataclass(frozen=True, kw_only=True)
class PassKeys(Task):
    """Numbers of four doors hidden between plain sentences; the prompt ends where the number of one must follow."""

    prompt_tokens: int = 1024
    count: Callable[[str], int] = len
    """Tokens of a text."""

    def samples(self, *, shot_seed: int, limit: int | None, **_: Any) -> list[Sample]:
        return [self._sample(i, shot_seed) for i in range(limit or 1)]

    def score(self, sample: Sample, output: str) -> Score:
        return Score(float(output.split()[:1] == [sample.target]), None)

    def _sample(self, index: int, seed: int) -> Sample:
        rng = random.Random(f"passkeys:{self.prompt_tokens}:{seed}:{index}")
        doors = rng.sample(DOORS, 4)
        keys = rng.sample(range(10_000, 100_000), 4)
        facts = [f"The pass key of the {door} door is {key}." for door, key in zip(doors, keys, strict=True)]
        asked = rng.randrange(4)
        question = f"The pass key of the {doors[asked]} door is"
        room = self.prompt_tokens - self.count(" ".join([*facts, question]))
        filler: list[str] = []
        while (room := room - self.count(sentence := rng.choice(SENTENCES))) > 0:
            filler.append(sentence)
        places = sorted(rng.randint(0, len(filler)) for _ in facts)
        for moved, (place, fact) in enumerate(zip(places, facts, strict=True)):
            filler.insert(place + moved, fact)
        segments = (Segment(" ".join(filler) + "\n\n", "context"), Segment(question, "question"))
        return Sample(str(index), segments, str(keys[asked]))


def default_task(tokenizer: Any, prompt_tokens: int | None, context: int | None) -> Task:
    """The testbed's needles for a tokenizer that knows its words, pass keys for any other."""
    needle = load_task(NEEDLE)
    words = needle.samples(shots=needle.shots, shot_seed=SEED, limit=1, data_dir=None)[0].text.split()
    if set(words) <= set(tokenizer.get_vocab()):
        return dataclasses.replace(needle, prompt_tokens=prompt_tokens) if prompt_tokens else needle  # type: ignore[call-arg]
    tokens = prompt_tokens or min(PassKeys.prompt_tokens, (context or PassKeys.prompt_tokens) - 64)
    return PassKeys(
        name="pass keys", version="1", ability="long-context retrieval", metric="accuracy", shots=0, max_new_tokens=16,
        chat=False, prompt_tokens=tokens,
        count=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
    )  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """A prompt, the tokens [start, end) of it that hold the answer, and the answer's tokens."""

    prompt: Prompt
    needle: Span
    answer: list[int]


def probes_of(
    task: Task, model: Model, limit: int, *, seed: int = SEED, template: str = "auto", data_dir: str | None = None
) -> tuple[list[Probe], int]:
    """The samples whose answer stands exactly once in the prompt, outside of the question; and how many were read."""
    samples = task.samples(shots=task.usual_shots, shot_seed=seed, limit=limit, data_dir=data_dir)
    probes = []
    for sample in samples:
        target = sample.target.strip() if isinstance(sample.target, str) else ""
        if not target:
            continue
        prompt = build_prompt(
            sample, model.tokenizer, template=template, chat_allowed=task.chat, context_limit=model.shapes.context,
            max_new_tokens=task.max_new_tokens, task=task.name,
        )  # fmt: skip
        needle = needle_of(prompt, target)
        if needle is not None:
            probes.append(Probe(prompt, needle, answer_ids(prompt, target, model.tokenizer)))
    return probes, len(samples)


def needles_of(task: Task, model: Model, limit: int, **how: Any) -> tuple[list[Probe], int]:
    """As `probes_of`; raises KvcliError where there are none."""
    probes, read = probes_of(task, model, limit, **how)
    if not probes:
        what = f"no prompt of {task.name} holds its answer exactly once outside of the question"
        fix = "--task with a passage and an answer that is quoted from it"
        raise KvcliError(what, given=f"--task {task.name} --limit {limit}", fix=fix)
    return probes, read


def needle_of(prompt: Prompt, target: str) -> Span | None:
    """The tokens of `target` where it stands once in the whole text, as words of its own, outside of the question."""
    found = list(re.finditer(rf"(?<!\w){re.escape(target)}(?!\w)", prompt.text))
    if len(found) != 1:
        return None
    start = bisect_right(prompt.offsets, found[0].start())
    end = bisect_left(prompt.offsets, found[0].end()) + 1
    region = next(r for r in prompt.regions if r.start <= start < r.end)
    return (start, end) if region.kind in ("context", "shot") and end <= region.end else None


def answer_ids(prompt: Prompt, target: str, tokenizer: Any) -> list[int]:
    """The answer's tokens as they follow the prompt."""
    text = target if not prompt.text or prompt.text[-1].isspace() else f" {target}"
    whole = tokenizer(prompt.text + text, add_special_tokens=False, verbose=False)["input_ids"]
    own = len(prompt.ids) - (len(prompt.ids) > 0 and prompt.offsets[0] == 0)  # without a BOS that the text lacks
    if list(whole[:own]) == prompt.ids[len(prompt.ids) - own :] and len(whole) > own:
        return list(whole[own:])
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
