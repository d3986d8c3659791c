"""The prompts of a task, and which part of each is prefilled and compressed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from kvcli.config import stable_hash
from kvcli.engine.plan import PromptKey
from kvcli.errors import KvcliError
from kvcli.evals.spec import Sample, Task
from kvcli.spans import question_start

if TYPE_CHECKING:
    from kvcli.models.prompt import Prompt


@dataclass
class PromptSet:
    """The samples and prompts of one task under one `PromptKey`. contexts: what stands before each prompt's question,
    where only that is compressed."""

    task: Task
    key: PromptKey
    samples: list[Sample]
    prompts: list[Prompt]
    contexts: list[Prompt] = field(default_factory=list)

    @property
    def parts(self) -> Sequence[Prompt]:
        """What is prefilled and compressed of each prompt."""
        return self.contexts or self.prompts

    @cached_property
    def clusters(self) -> dict[str, str]:
        """What each sample shares with others by its id: what its task says; where one selection from a context serves
        many questions, that context."""
        if not self.contexts:
            return {sample.id: sample.cluster for sample in self.samples}
        return {sample.id: context.sha for sample, context in zip(self.samples, self.contexts, strict=True)}

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

        Raises KvcliError where nothing stands before the question.
        """
        cut: dict[str, Prompt] = {}
        parts = []
        for sample, prompt in zip(self.samples, self.prompts, strict=True):
            context = _before_question(prompt)
            if not context.ids:
                what = (
                    f"{self.task.name} sample {sample.id}: nothing stands before the question that could be compressed"
                )
                raise KvcliError(
                    what, given=f"--query agnostic, {self.key.shots} shots", fix="--shots 4, or --query aware"
                )
            parts.append(cut.setdefault(context.sha, context))
        return PromptSet(self.task, self.key._replace(query="agnostic"), self.samples, self.prompts, parts)


def _before_question(prompt: Prompt) -> Prompt:
    end = question_start(prompt.regions)
    regions = [dataclasses.replace(r, end=min(r.end, end)) for r in prompt.regions if r.start < end]
    sha = stable_hash([prompt.ids[:end], [[r.label, r.start, r.end] for r in regions]], 16)
    return dataclasses.replace(
        prompt, ids=prompt.ids[:end], regions=regions, offsets=prompt.offsets[:end], sha=sha, options=[]
    )
