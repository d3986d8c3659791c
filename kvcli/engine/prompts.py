"""The prompts of a task: made from its samples, and which part of each is prefilled and compressed."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvcli.config import SweepConfig, stable_hash
from kvcli.engine.cells import PromptKey
from kvcli.errors import KvcliError
from kvcli.evals.spec import Sample, Task
from kvcli.spans import question_start

if TYPE_CHECKING:
    from kvcli.models.prompt import Prompt


THOUGHTS = "<think>"
"""What the templates of models that think first end with: their answers begin inside of the thoughts."""


class NothingBefore(KvcliError):
    """A prompt that is nothing but its question."""


@dataclass
class PromptSet:
    """The samples and prompts of one task under one `PromptKey`. contexts: what stands before each prompt's question,
    where only that is compressed."""

    task: Task
    key: PromptKey
    samples: list[Sample]
    prompts: list[Prompt]
    contexts: list[Prompt] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    """Places in the task's order, ascending from 0, of samples left out because of --max-prompt-tokens."""

    @property
    def too_long(self) -> int:
        return len(self.left_out)

    def within(self, limit: int | None) -> int:
        """How many of the samples are among the first `limit` of the task's order, where those left out count too."""
        if limit is None:
            return len(self.samples)
        return min(len(self.samples), limit - bisect_left(self.left_out, limit))

    @property
    def parts(self) -> Sequence[Prompt]:
        """What is prefilled and compressed of each prompt."""
        return self.contexts or self.prompts

    @cached_property
    def clusters(self) -> dict[str, str]:
        """What each sample shares with others by its id: what its task says and, where one selection from a context
        serves many questions, that context; samples joined by either are one cluster."""
        names = [sample.cluster for sample in self.samples]
        if self.contexts:
            names = _joined([[c.sha] + [f"task:{n}"] * bool(n) for c, n in zip(self.contexts, names, strict=True)])
        return {sample.id: name for sample, name in zip(self.samples, names, strict=True)}

    def behind(self, index: int) -> list[int] | None:
        """What the template puts behind the message, where only the context is read; None where it is all there."""
        if not self.contexts:
            return None
        from kvcli.models.reconstruction import trailing

        prompt = self.prompts[index]
        return prompt.ids[len(prompt.ids) - trailing(prompt.regions, ("special",)) :]

    @property
    def choosing(self) -> bool:
        """Whether answers are chosen among options instead of being generated."""
        return any(prompt.options for prompt in self.prompts)

    def new_tokens(self, asked: int | None) -> int:
        """The longest answer there can be. asked: --max-new-tokens."""
        longest = max((len(ids) for prompt in self.prompts for ids in prompt.options), default=0)
        return longest or asked or self.task.max_new_tokens

    def agnostic(self) -> PromptSet:
        """The same prompts, compressed before their question is known (DESIGN: --query agnostic).

        Raises NothingBefore where nothing stands before the question.
        """
        cut: dict[str, Prompt] = {}
        parts = []
        for sample, prompt in zip(self.samples, self.prompts, strict=True):
            context = _before_question(prompt)
            if not context.ids:
                what = (
                    f"{self.task.name} sample {sample.id}: nothing stands before the question that could be compressed"
                )
                raise NothingBefore(
                    what, given=f"--query agnostic, {self.key.shots} shots", fix="--shots 4, or --query aware"
                )
            parts.append(cut.setdefault(context.sha, context))
        return PromptSet(
            self.task, self.key._replace(query="agnostic"), self.samples, self.prompts, parts, self.left_out
        )


def _joined(marks: Sequence[Sequence[str]]) -> list[str]:
    """One name for each item; items that share a mark, directly or over others, share the name."""
    root: dict[str, str] = {}

    def find(mark: str) -> str:
        while root.setdefault(mark, mark) != mark:
            root[mark] = mark = root[root[mark]]
        return mark

    for first, *others in marks:
        for other in others:
            root[find(other)] = find(first)
    return [find(first) for first, *_ in marks]


def _before_question(prompt: Prompt) -> Prompt:
    end = question_start(prompt.regions)
    regions = [dataclasses.replace(r, end=min(r.end, end)) for r in prompt.regions if r.start < end]
    sha = stable_hash([prompt.ids[:end], [[r.label, r.start, r.end] for r in regions]], 16)
    return dataclasses.replace(
        prompt, ids=prompt.ids[:end], regions=regions, offsets=prompt.offsets[:end], sha=sha, options=[]
    )


@dataclass
class PromptMaker:
    """Builds prompt sets. context: the model's longest text."""

    config: SweepConfig
    tokenizer: Any
    context: int | None
    _refused: list[KvcliError] = field(default_factory=list)
    _made: int = 0

    def prompts(self, task: Task, key: PromptKey, limit: int | None) -> PromptSet:
        """The prompts of one task without those longer than --max-prompt-tokens.

        Raises KvcliError for data that cannot be read and for a prompt that does not fit the model.
        """
        from kvcli.models.prompt import TooLong

        samples = task.samples(
            shots=key.shots, shot_seed=key.shot_seed, shot_order=key.shot_order, limit=limit,
            data_dir=self.config.data_dir, tokens=self._tokens,
        )  # fmt: skip
        found = PromptSet(task, key._replace(query="aware"), [], [])
        for place, sample in enumerate(samples):
            try:
                prompt = self._build(task, sample)
            except TooLong as error:
                self._refused.append(error)
                found.left_out.append(place)
                continue
            if prompt.text.rstrip().endswith(THOUGHTS):
                sample = dataclasses.replace(sample, meta={**sample.meta, "thinking": True})
            found.samples.append(sample)
            found.prompts.append(prompt)
        self._made += len(found.prompts)
        return found

    def check(self) -> None:
        """Raises the first refusal where no prompt at all is left."""
        if self._refused and not self._made:
            raise self._refused[0]

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _build(self, task: Task, sample: Sample) -> Prompt:
        from kvcli.models.aliases import TESTBEDS
        from kvcli.models.prompt import TooLong, build_prompt

        config = self.config
        try:
            return self._built(build_prompt, task, sample)
        except TooLong:
            raise
        except KvcliError as error:
            made_for = [name for name, (_, suite) in TESTBEDS.items() if suite in task.suites]
            mine = TESTBEDS.get(config.model)
            if mine and made_for and config.model not in made_for and mine[1] not in task.suites:
                error.given = f"--model {config.model} --task {task.base}"
                error.fix = f"--model {made_for[-1]}, or --task {mine[1]} for the tasks of {config.model}"
            raise

    def _built(self, build_prompt: Any, task: Task, sample: Sample) -> Prompt:
        config = self.config
        found: Prompt = build_prompt(
            sample, self.tokenizer, template=config.template, chat_allowed=task.chat, system=config.system,
            thinking=config.thinking, max_prompt_tokens=config.max_prompt_tokens, context_limit=self.context,
            truncate=config.truncate, max_new_tokens=config.max_new_tokens or task.max_new_tokens, task=task.name,
        )  # fmt: skip
        return found


def said_of(prompts: PromptSet, limit: int | None = None) -> list[str]:
    """Warnings about samples that were left out or cut. limit: of the command's first samples alone."""
    found, name, there = [], prompts.task.name, prompts.within(limit)
    whole = min(len(prompts.samples) + prompts.too_long, limit or len(prompts.samples) + prompts.too_long)
    if whole > there:
        found.append(f"{name}: {whole - there} of {whole} prompts left out, longer than --max-prompt-tokens")
    cut = [p.truncated for p in prompts.prompts[:there] if p.truncated]
    if cut:
        found.append(f"{name}: {len(cut)} of {whole} prompts truncated, by up to {max(cut):,} tokens")
    return found
