"""LongBench: a prompt of instruction, long context and question; the official metric of each data set.

Prompts, lengths and metrics: THUDM/LongBench LongBench/config/dataset2prompt.json, dataset2maxlen.json and eval.py
(commit 2e00731, MIT). Differs: nothing is cut off unless `--truncate middle` asks for it (the official rule).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvcli import hub
from kvcli.errors import KvcliError
from kvcli.evals.data import DataSet, Row, bad_row, find_folder, first_of, read_jsonl, read_split
from kvcli.evals.extract import cut
from kvcli.evals.longbench_metrics import METRICS, NEED_JIEBA, OF_NUMBERS, numbers
from kvcli.evals.spec import Sample, Score, Segment, Task, Tokens

HUB = "zai-org/LongBench"
ARCHIVE = "data.zip"
"""The hub's data set is a loading script, which `datasets` 4 no longer runs, and this archive of JSON Lines."""


@dataclass(frozen=True, kw_only=True)
class LongBench(Task):
    """One data set of LongBench. prompt: the official one with {context} and {input}; what stands before the context
    is region system, the context is region context, the rest region question.

    first_line: only the first line of an output is judged.
    """

    dataset_name: str
    prompt: str
    first_line: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if self.prompt.count("{context}") != 1:
            raise ValueError("'prompt' must have {context} once")
        if self.metric not in METRICS:
            raise ValueError(f"'metric: {self.metric}' is not one of {', '.join(METRICS)}")

    def check(self) -> None:
        if self.metric in NEED_JIEBA and importlib.util.find_spec("jieba") is None:
            what = f"{self.base} is scored on Chinese words, for which the package jieba is needed"
            raise KvcliError(what, given=f"--task {self.name}", fix="pip install 'kvcli[longbench]'")

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
        """The examples of few-shot data sets are part of their contexts."""
        if shots:
            what = f"{self.base} has no exemplars"
            raise KvcliError(what, given=f"--shots {shots}", fix="--shots 0")
        rows, read = self._rows(data_dir)
        return [self._sample(rows[i], *read(rows[i])) for i in first_of(self.name, len(rows), limit)]

    def score(self, sample: Sample, output: str) -> Score:
        """The best value over the right answers."""
        output = cut(output, self.until)
        judged = output.lstrip("\n").split("\n")[0] if self.first_line else output
        classes = sample.meta.get("classes") or ()
        value = max(METRICS[self.metric](judged, gold, classes) for gold in sample.target)
        answer = ", ".join(numbers(judged)) if self.metric in OF_NUMBERS else judged.strip()
        return Score(value, answer or None)

    def _rows(self, data_dir: str | None) -> tuple[list[Row], Callable[[Row], tuple[str, str, list[str]]]]:
        """Rows, and what reads (context, question, right answers) from one."""
        data = DataSet("longbench", HUB, self.dataset_name)
        if data_dir is None:
            return _from_archive(self.dataset_name), self._read
        file = find_folder(data, data_dir) / f"{self.dataset_name}.jsonl"
        rows = read_jsonl(file) if file.is_file() else []
        return rows or read_split(data, "test", data_dir), self._read

    def _read(self, row: Row) -> tuple[str, str, list[str]]:
        answers = row.values.get("answers")
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a for a in answers):
            raise bad_row(
                row, f"the field 'answers' is {str(answers)[:60]}, not a list of texts", self.name, self.source
            )
        if self.metric in ("retrieval", "retrieval_zh") and not all(map(numbers, answers)):
            raise bad_row(row, f"the right answer names no paragraph: {answers}", self.name, self.source)
        return self._text(row, "context"), self._text(row, "input", empty=True), answers

    def _text(self, row: Row, name: str, empty: bool = False) -> str:
        value = row.values.get(name)
        if not isinstance(value, str) or not (empty or value.strip()):
            raise bad_row(row, f"the field '{name}' is {str(value)[:60]!r}, not text", self.name, self.source)
        return value

    def _sample(self, row: Row, context: str, question: str, answers: list[str]) -> Sample:
        head, _, tail = self.prompt.partition("{context}")
        texts = [("system", head), ("context", context), ("question", tail.replace("{input}", question))]
        segments = tuple(Segment(text, region) for region, text in texts if text)
        shared = hashlib.sha256(context.encode()).hexdigest()[:12]
        meta: dict[str, Any] = {"where": row.where}
        if row.values.get("all_classes"):
            meta["classes"] = row.values["all_classes"]
        return Sample(str(row.index), segments, answers, shared, meta)


@dataclass(frozen=True, kw_only=True)
class HotpotQA(LongBench):
    """Document QA of KVFundaBench. rows: LongBench's 200, or the 7,405 of HotpotQA's own validation split with ten
    passages each (`distractor`), in the same prompt."""

    rows: Literal["longbench", "distractor"] = "longbench"

    def _rows(self, data_dir: str | None) -> tuple[list[Row], Callable[[Row], tuple[str, str, list[str]]]]:
        if self.rows == "longbench":
            return super()._rows(data_dir)
        data = DataSet("hotpotqa", "hotpotqa/hotpot_qa", "distractor")
        return read_split(data, "validation", data_dir), self._distractor

    def _distractor(self, row: Row) -> tuple[str, str, list[str]]:
        """The passages in LongBench's form: `Passage 1:`, title and text on a line each."""
        try:
            given = row.values["context"]
            pairs = list(zip(given["title"], given["sentences"], strict=True))
            passages = [f"Passage {i}:\n{title}\n{''.join(parts)}" for i, (title, parts) in enumerate(pairs, 1)]
        except (KeyError, TypeError, ValueError) as e:
            what = "the field 'context' does not have 'title' and 'sentences' of equal length"
            raise bad_row(row, what, self.name, self.source) from e
        return "\n\n".join(passages), self._text(row, "question"), [self._text(row, "answer")]


def _from_archive(name: str) -> list[Row]:
    """All rows of a data set in the hub's archive, or in an earlier download of it when the hub is away."""
    reason = hub.unreachable("dataset", HUB, None)
    try:
        with hub.offline() if reason else contextlib.nullcontext():
            path = _download()
        with zipfile.ZipFile(path) as archive:
            lines = archive.read(f"data/{name}.jsonl").decode("utf-8").split("\n")
        where = f"{HUB} {name}.jsonl"
        found = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
        return [Row(json.loads(line), i, f"{where}:{n}") for i, (n, line) in enumerate(found)]
    except Exception as e:
        fix = f"--data-dir DIR with longbench/{name}.jsonl in it"
        first = str(e).strip().split("\n")[0]
        why = (
            f"the hub cannot be reached for data set {HUB}: {reason}" if reason else f"{HUB} cannot be loaded: {first}"
        )
        raise KvcliError(why, given=f"--task longbench_{name}", fix=fix) from e


def _download() -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(HUB, ARCHIVE, repo_type="dataset"))
