"""The ordinary task: each row of a data set is a question; its texts come from templates."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcli.errors import KvcliError
from kvcli.evals.choices import check, choices_of, right_one
from kvcli.evals.data import DataSet, Row, bad_row, first_of, read_split
from kvcli.evals.extract import Filter, cut
from kvcli.evals.fewshot import Exemplars, Fewshot, Pool
from kvcli.evals.plugin import load_object
from kvcli.evals.scorers import SCORERS, Judge, Metric, Rules
from kvcli.evals.spec import Sample, Score, Segment, Task, Tokens
from kvcli.evals.template import Template, template
from kvcli.evals.written import Written, remark, written

CHOICE_METRICS = ("acc", "acc_norm")


@dataclass(frozen=True, kw_only=True)
class RowTask(Task):
    """A task wholly described by its YAML file (docs/adding-a-task.md)."""

    doc_to_text: Template
    doc_to_target: Template
    doc_to_choice: tuple[str, ...] = ()
    """The options, or one template or field that gives them."""
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
    metric_list: tuple[Metric, ...] = ()
    scorer: str = "exact_match"
    cluster: Template | None = None
    parallel: str | None = None
    """Tasks of one such name have the same problems row by row: one order for all, and rows of one number together."""

    def __post_init__(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if self.output_type == "multiple_choice":
            self._check_choice()
        elif len(self.metric_list) > 1:
            raise ValueError("'metric_list' must have one entry: a task has one score (filters add further ones)")
        check(self.doc_to_choice)
        if self.description.strip():
            template(self.description)
        if ":" in self.scorer:
            load_object(self.scorer, Path(self.source).parent)
        elif self.scorer not in SCORERS:
            raise ValueError(f"'scorer: {self.scorer}' is not one of {', '.join(SCORERS)} or file.py:function")

    @property
    def data(self) -> DataSet:
        return DataSet(self.name, self.dataset_path, self.dataset_name, self.revision)

    def remarks(self, *, shots: int, data_dir: str | None) -> list[str]:
        """That exemplars come from the split although the definition knows of written ones."""
        if not shots or not self.fewshot_split or not (self.fewshot_config.file or self.fewshot_config.harness):
            return []
        found = self._written(data_dir)
        if shots <= len(found.rows):
            return []
        whose = f"lm-evaluation-harness ({self.fewshot_config.harness})" if self.fewshot_config.harness else "others"
        why = f"{found.where} has {len(found.rows)} for {shots} shots" if found.rows else found.absent
        return [remark(self.name, self.fewshot_split, whose, why)]

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
        if shots < 0:
            raise KvcliError("shots cannot be negative", given=f"--shots {shots}", fix="--shots 0")
        salt = self.parallel or self.base
        rows = read_split(self.data, self.test_split, data_dir)
        chosen = [rows[i] for i in first_of(salt, len(rows), limit)]
        pool = self._pool(shots, data_dir) if shots else Pool()
        group = None if self.fewshot_config.group is None else self._group
        exemplars = Exemplars(self.name, salt, pool, shots, shot_seed, shot_order, self._shot, group)
        return [self._sample(row, exemplars) for row in chosen]

    def score(self, sample: Sample, output: str) -> Score:
        golds = sample.target if isinstance(sample.target, list) else [sample.target]
        output = cut(output, self.until)
        if self.scorer in SCORERS:
            metric = self.metric_list[0] if self.metric_list else Metric("exact_match")
            return SCORERS[self.scorer](output, golds, Rules(self.filter_list, metric))
        judge: Judge = load_object(self.scorer, Path(self.source).parent)
        return judge(output, golds)

    def _check_choice(self) -> None:
        if not self.doc_to_choice:
            raise ValueError("'output_type: multiple_choice' needs a line doc_to_choice: [A, B, C, D], or a template")
        if any(metric.metric not in CHOICE_METRICS for metric in self.metric_list):
            raise ValueError(
                f"'metric_list' of multiple_choice can hold {' and '.join(CHOICE_METRICS)}; the first counts"
            )
        if not self.metric_list:
            object.__setattr__(self, "metric", "acc")

    def _sample(self, row: Row, exemplars: Exemplars) -> Sample:
        segments = [Segment(text, "system") for text in (self._description(row),) if text]
        segments += exemplars.of(row)
        segments.append(Segment(self._text(row, self.doc_to_text), "question"))
        meta = {"where": row.where}
        if self.output_type != "multiple_choice":
            return Sample(str(row.index), tuple(segments), self._gold(row), self._cluster(row), meta)
        choices, right = self._choices(row, self.doc_to_choice, self.doc_to_target)
        options = tuple(self.target_delimiter + choice for choice in choices)
        return Sample(str(row.index), tuple(segments), right, self._cluster(row), meta, options)

    def _cluster(self, row: Row) -> str:
        if self.cluster is not None:
            return self._label(row, self.cluster)
        return f"{self.parallel}/{row.index}" if self.parallel else ""

    def _group(self, row: Row) -> str:
        group = self.fewshot_config.group
        return "" if group is None else self._label(row, group)

    def _label(self, row: Row, template: Template) -> str:
        """What several rows share."""
        value = self._read(row, template)
        if not isinstance(value, str | int):
            raise self._bad(row, f"'{template.text}' is {value!r}, not a text that rows can share")
        return str(value)

    def _description(self, row: Row) -> str:
        """A field of the row, or a template over it; anything else stands as it is."""
        text = self.description
        if "{" not in text and text not in row.values:
            return text
        return self._text(row, template(text))

    def _shot(self, row: Row) -> str:
        own = self.fewshot_config
        answer = self._gold(row, own)
        answer = answer[0] if isinstance(answer, list) else answer
        text = self._text(row, own.doc_to_text or self.doc_to_text)
        return text + self.target_delimiter + answer + self.fewshot_delimiter

    def _text(self, row: Row, template: Template) -> str:
        try:
            return template.render(row.values)
        except ValueError as e:
            raise self._bad(row, str(e)) from e

    def _read(self, row: Row, template: Template) -> Any:
        try:
            return template.value(row.values)
        except ValueError as e:
            raise self._bad(row, str(e)) from e

    def _gold(self, row: Row, own: Fewshot | None = None) -> str | list[str]:
        """The right answer, or a list of right answers; numbers become text, with options the right one's text.

        own: the exemplars' way to it. An answer in words from a `doc_to_target` of their own need not be an option.
        """
        target = (own and own.doc_to_target) or self.doc_to_target
        options = (own and own.doc_to_choice) or self.doc_to_choice
        value = self._read(row, target)
        in_words = isinstance(value, str) and not value.strip().isdecimal()
        if options and not (in_words and own and own.doc_to_target):
            choices, right = self._choices(row, options, target)
            return choices[right]
        answers = value if isinstance(value, list) else [value]
        for answer in answers:
            if not isinstance(answer, str | int | float) or isinstance(answer, bool) or not str(answer).strip():
                raise self._bad(row, f"the right answer is {answer!r}, not text")
        if not answers:
            raise self._bad(row, "there is no right answer")
        return [str(a) for a in answers] if isinstance(value, list) else str(value)

    def _choices(self, row: Row, options: tuple[str, ...], target: Template) -> tuple[list[str], int]:
        value = self._read(row, target)
        try:
            choices = choices_of(options, row.values)
            return choices, right_one(value, choices, rendered=not target.is_field)
        except ValueError as e:
            raise self._bad(row, str(e)) from e

    def _bad(self, row: Row, what: str) -> KvcliError:
        """What is wrong may quote the row, which must not be seen of a harmful one."""
        shown = "the templates do not fit this row, whose text is not shown" if self.harmful else what
        return bad_row(row, shown, self.name, self.source)

    def _pool(self, shots: int, data_dir: str | None) -> Pool:
        """Samples, else the file, where they have enough or there is no split; else the split."""
        config = self.fewshot_config
        found = self._written(data_dir)
        if shots <= len(found.rows) or (found.rows and not self.fewshot_split):
            return Pool(found.rows, found.where, fixed=True)
        if self.fewshot_split is None:
            missing = f"no fewshot_split in {self.source}" + (f", and {found.absent}" if found.absent else "")
            what = f"{self.name} has no exemplars: {missing}"
            raise KvcliError(what, given=f"--task {self.name}", fix="--shots 0, or add a line fewshot_split: train")
        rows = read_split(self.data, self.fewshot_split, data_dir)
        return Pool(rows, self.fewshot_split, config.sampler == "first_n", self.fewshot_split == self.test_split)

    def _written(self, data_dir: str | None) -> Written:
        config = self.fewshot_config
        if config.samples:
            rows = (Row(v, i, f"{self.source} samples[{i}]") for i, v in enumerate(config.samples))
            return Written(tuple(rows), self.source)
        return written(self.data, config.file, config.harness, data_dir)
