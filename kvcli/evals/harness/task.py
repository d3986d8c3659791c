"""A task of lm-evaluation-harness as a kvcli task: its prompts, cut into segments, and its own filters and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcli.errors import KvcliError
from kvcli.evals.data import first_of
from kvcli.evals.harness.judging import judged, probe
from kvcli.evals.harness.live import Asked, Live, opened
from kvcli.evals.spec import Sample, Score, Task, Tokens


@dataclass(frozen=True, kw_only=True)
class HarnessTask(Task):
    """`--task lm_eval:NAME`. config: the settings of lm-eval's definition, functions included.

    Prompts are what `ConfigurableTask.fewshot_context` of lm-eval's `api/task.py` gives, byte for byte, without a chat
    template. A sample has the shots that lm-eval draws for it in a run over all samples: its sampler goes on from
    question to question. Shot seed 0 is lm-eval's own (1234), any other number is that seed.
    """

    config: Mapping[str, Any]
    filter_name: str = ""
    """Which of the task's filters gives the score; empty: the first one."""
    _docs: dict[str, tuple[Live, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def plain(self) -> str:
        """lm-eval's name of it."""
        return str(self.config["task"])

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
        """Rows of the test split (validation, where there is none) in the order that kvcli's task of this name has."""
        self._check_shots(shots)
        live = opened(self.name, self.config, shots, data_dir)
        numbers = first_of(self.plain, len(live.task_docs), limit)
        asked = live.ask(set(numbers), shots, shot_seed, shot_order)
        if numbers:
            probe(live, asked[numbers[0]], self)
        return [self._sample(live, asked[i]) for i in numbers]

    def score(self, sample: Sample, output: str) -> Score:
        live, doc = self._doc(sample)
        return judged(live, doc, [output], self)

    def choose(self, sample: Sample, loglikelihoods: Sequence[float]) -> Score:
        live, doc = self._doc(sample)
        score = judged(live, doc, [(value, False) for value in loglikelihoods], self)
        best = max(range(len(loglikelihoods)), key=lambda i: loglikelihoods[i])
        return Score(score.value, sample.options[best].strip(), score.extra)

    def _sample(self, live: Live, asked: Asked) -> Sample:
        sample_id = str(asked.number)
        self._docs[sample_id] = (live, asked.doc)
        meta = {"where": f"{self.name} row {asked.number + 1}", "spans": asked.spans}
        gold = live.gold(asked.doc)
        if asked.options and not 0 <= gold < len(asked.options):
            what = f"{self.name} row {asked.number + 1}: the right answer is none of the {len(asked.options)} options"
            raise KvcliError(what, given=f"--task {self.name}", fix="mend the row, or leave it out of the file")
        return Sample(sample_id, asked.segments, gold, "", meta, asked.options)

    def _doc(self, sample: Sample) -> tuple[Live, Any]:
        if sample.id not in self._docs:
            raise KvcliError(
                f"{self.name} has no sample {sample.id}", given=self.source, fix="ask for its samples first"
            )
        return self._docs[sample.id]

    def _check_shots(self, shots: int) -> None:
        if shots < 0:
            raise KvcliError("shots cannot be negative", given=f"--shots {shots}", fix="--shots 0")
        if shots and self.config.get("num_fewshot") == 0:
            what = f"lm-eval's task '{self.plain}' is fixed to 0 shots"
            raise KvcliError(what, given=f"--shots {shots}", fix="--shots 0, or a task without num_fewshot: 0")
