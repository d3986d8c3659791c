"""The ordinary task: each row of a data set is a question; its texts come from templates."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvcli.errors import KvcliError
from kvcli.evals.data import (
    DataSet,
    Row,
    bad_row,
    find_folder,
    first_of,
    permutation,
    read_jsonl,
    read_split,
    reordered,
)
from kvcli.evals.extract import Filter, cut
from kvcli.evals.plugin import load_object
from kvcli.evals.scorers import SCORERS, Judge, Metric, Rules
from kvcli.evals.spec import Sample, Score, Segment, Task, Tokens
from kvcli.evals.template import Template


@dataclass(frozen=True)
class Fewshot:
    """Where exemplars come from, as `fewshot_config` of lm-evaluation-harness; `file` is kvcli's own.

    The pool is `samples`, else the rows of `file` in the data set's folder when it is there. Asked for more than the
    pool holds, or without a pool, exemplars are drawn from the task's `fewshot_split` by the shot seed.
    """

    sampler: Literal["default", "first_n"] = "default"
    samples: tuple[dict[str, Any], ...] = ()
    file: str | None = None
    doc_to_text: Template | None = None
    doc_to_target: Template | None = None


@dataclass(frozen=True, kw_only=True)
class RowTask(Task):
    """A task wholly described by its YAML file (docs/adding-a-task.md)."""

    doc_to_text: Template
    doc_to_target: Template
    dataset_path: str | None = None
    dataset_name: str | None = None
    revision: str | None = None
    test_split: str = "test"
    fewshot_split: str | None = None
    fewshot_config: Fewshot = field(default_factory=Fewshot)
    description: str = ""
    fewshot_delimiter: str = "\n\n"
    target_delimiter: str = " "
    filter_list: tuple[Filter, ...] = ()
    metric_list: tuple[Metric, ...] = (Metric("exact_match"),)
    scorer: str = "exact_match"
    cluster: Template | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if len(self.metric_list) != 1:
            raise ValueError("'metric_list' must have one entry: a task has one score (filters add further ones)")
        if ":" in self.scorer:
            load_object(self.scorer, Path(self.source).parent)
        elif self.scorer not in SCORERS:
            raise ValueError(f"'scorer: {self.scorer}' is not one of {', '.join(SCORERS)} or file.py:function")

    @property
    def data(self) -> DataSet:
        return DataSet(self.name, self.dataset_path, self.dataset_name, self.revision)

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
        """Description, shots joined by the delimiters, the question: the text lm-evaluation-harness builds."""
        rows = read_split(self.data, self.test_split, data_dir)
        chosen = [rows[i] for i in first_of(self.name, len(rows), limit)]
        exemplars = self._exemplars(shots, shot_seed, data_dir)
        return [self._sample(row, exemplars, shots, shot_order) for row in chosen]

    def score(self, sample: Sample, output: str) -> Score:
        golds = sample.target if isinstance(sample.target, list) else [sample.target]
        output = cut(output, self.until)
        if self.scorer in SCORERS:
            return SCORERS[self.scorer](output, golds, Rules(self.filter_list, self.metric_list[0]))
        judge: Judge = load_object(self.scorer, Path(self.source).parent)
        return judge(output, golds)

    def _sample(self, row: Row, exemplars: list[Row], shots: int, shot_order: int) -> Sample:
        """A row is never its own exemplar: `exemplars` holds one to spare when it is drawn from the tested split."""
        others = reordered([e for e in exemplars if e.where != row.where][:shots], shot_order)
        segments = [Segment(self.description, "system")] if self.description else []
        segments += [Segment(self._shot(e), "shot", i) for i, e in enumerate(others)]
        segments.append(Segment(self._text(row, self.doc_to_text), "question"))
        cluster = "" if self.cluster is None else str(self._read(row, self.cluster))
        return Sample(str(row.index), tuple(segments), self._gold(row), cluster, {"where": row.where})

    def _shot(self, row: Row) -> str:
        own = self.fewshot_config
        text = self._text(row, own.doc_to_text or self.doc_to_text)
        target = self._gold(row, own.doc_to_target or self.doc_to_target)
        answer = target[0] if isinstance(target, list) else target
        return text + self.target_delimiter + answer + self.fewshot_delimiter

    def _text(self, row: Row, template: Template) -> str:
        try:
            return template.render(row.values)
        except ValueError as e:
            raise bad_row(row, str(e), self.name, self.source) from e

    def _read(self, row: Row, template: Template) -> Any:
        try:
            return template.value(row.values)
        except ValueError as e:
            raise bad_row(row, str(e), self.name, self.source) from e

    def _gold(self, row: Row, template: Template | None = None) -> str | list[str]:
        """The right answer, or a list of right answers; numbers become text."""
        value = self._read(row, template or self.doc_to_target)
        answers = value if isinstance(value, list) else [value]
        for answer in answers:
            if not isinstance(answer, str | int | float) or isinstance(answer, bool) or not str(answer).strip():
                raise bad_row(row, f"the right answer is {answer!r}, not text", self.name, self.source)
        if not answers:
            raise bad_row(row, "there is no right answer", self.name, self.source)
        return [str(a) for a in answers] if isinstance(value, list) else str(value)

    def _exemplars(self, shots: int, shot_seed: int, data_dir: str | None) -> list[Row]:
        """`shots` rows (one more when the tested split is the source).

        A fixed pool keeps its order under shot seed 0; otherwise the seed fixes one order of the source, of which the
        first rows are taken: 2 shots are the first 2 of 8.
        """
        if shots < 0:
            raise KvcliError("shots cannot be negative", given=f"--shots {shots}", fix="--shots 0")
        if shots == 0:
            return []
        pool, where = self._pool(data_dir)
        fixed = True
        if shots > len(pool) and (self.fewshot_split or not pool):
            pool, where = self._drawn_from(where, data_dir)
            fixed = self.fewshot_config.sampler == "first_n"
        wanted = shots + (where == self.test_split)
        if wanted > len(pool):
            fix = f"--shots {len(pool) - (wanted - shots)} or fewer"
            raise KvcliError(f"{self.name} has {len(pool)} exemplars in {where}", given=f"--shots {shots}", fix=fix)
        keep_order = fixed and shot_seed == 0
        order = range(len(pool)) if keep_order else permutation(f"kvcli:shots:{self.name}:{shot_seed}", len(pool))
        return [pool[i] for i in order[:wanted]]

    def _pool(self, data_dir: str | None) -> tuple[list[Row], str]:
        config = self.fewshot_config
        if config.samples:
            return [Row(v, i, f"{self.source} samples[{i}]") for i, v in enumerate(config.samples)], self.source
        if config.file and data_dir is not None:
            path = find_folder(self.data, data_dir) / config.file
            return (read_jsonl(path) if path.is_file() else []), str(path)
        return [], config.file or ""

    def _drawn_from(self, file: str, data_dir: str | None) -> tuple[list[Row], str]:
        if self.fewshot_split is None:
            missing = f"no fewshot_split in {self.source}" + (f" and no {file}" if file else "")
            what = f"{self.name} has no exemplars: {missing}"
            raise KvcliError(what, given=f"--task {self.name}", fix="--shots 0, or add a line fewshot_split: train")
        return read_split(self.data, self.fewshot_split, data_dir), self.fewshot_split
