"""RULER's questions over documents: those that answer among others of the same data set.

Source: NVIDIA/RULER scripts/data/synthetic/qa.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvcli.errors import KvcliError
from kvcli.evals.data import DataSet, Row, bad_row, read_split
from kvcli.evals.ruler import Episode, Ruler
from kvcli.evals.spec import Sample, Score

ASKING = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
DOCUMENTS = f"{ASKING}\n\nThe following are given documents.\n\n{{context}}\n\n{ASKING}\n\nQuestion: {{query}} Answer:"
SPLIT = "validation"
Question = tuple[str, tuple[str, ...], list[int], list[int]]
"""Question, right answers, numbers of the documents needed, numbers of related ones."""


@dataclass(frozen=True, kw_only=True)
class Documents(Ruler):
    """Questions over documents, the right ones among others of the data set."""

    documents: Literal["squad", "hotpotqa"]

    def episodes(self, data_dir: str | None) -> Callable[[int, random.Random], Episode]:
        read = self._squad if self.documents == "squad" else self._hotpotqa
        questions, texts = read(data_dir)
        questions = questions[: self.size]

        def make(index: int, rng: random.Random) -> Episode:
            query, answers, needed, related = questions[index % len(questions)]
            used = {*needed, *related}
            rest = [i for i in range(len(texts)) if i not in used]
            others = needed + rng.sample(related, len(related)) + rng.sample(rest, len(rest))
            salt = rng.random()

            def build(n: int) -> str:
                chosen = [texts[others[i % len(others)]] for i in range(n)]
                random.Random(salt).shuffle(chosen)
                return "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(chosen, 1))

            return Episode(DOCUMENTS.replace("{query}", query), build, answers, len(needed), self.length // 150)

        return make

    def score(self, sample: Sample, output: str) -> Score:
        """1 if one of the right answers stands in the output. Rule: RULER `string_match_part`."""
        return self._judged(sample, output, lambda hits: float(any(hits)))

    def _squad(self, data_dir: str | None) -> tuple[list[Question], list[str]]:
        """Answerable questions of SQuAD 2.0; paragraphs of the same article come first among the others."""
        rows = self._rows(DataSet("squad", "rajpurkar/squad_v2"), data_dir)
        texts = sorted({self._field(row, "context", str) for row in rows})
        number = {text: i for i, text in enumerate(texts)}
        article: dict[str, list[int]] = {}
        for row in rows:
            mine = article.setdefault(self._field(row, "title", str), [])
            if number[row.values["context"]] not in mine:
                mine.append(number[row.values["context"]])
        found = []
        for row in rows:
            answers = self._field(row, "answers", dict).get("text")
            if answers:
                here = number[row.values["context"]]
                related = [i for i in article[row.values["title"]] if i != here]
                found.append((self._field(row, "question", str), tuple(dict.fromkeys(answers)), [here], related))
        return found, texts

    def _hotpotqa(self, data_dir: str | None) -> tuple[list[Question], list[str]]:
        rows = self._rows(DataSet("hotpotqa", "hotpotqa/hotpot_qa", "distractor"), data_dir)
        passages = []
        for row in rows:
            given = self._field(row, "context", dict)
            pairs = zip(given.get("title", ()), given.get("sentences", ()), strict=False)
            passages.append([f"{title}\n{''.join(parts)}" for title, parts in pairs])
        texts = sorted({text for each in passages for text in each})
        number = {text: i for i, text in enumerate(texts)}
        found: list[Question] = []
        for row, mine in zip(rows, passages, strict=True):
            needed = [number[text] for text in dict.fromkeys(mine)]
            found.append((self._field(row, "question", str), (self._field(row, "answer", str),), needed, []))
        return found, texts

    def _rows(self, data: DataSet, data_dir: str | None) -> list[Row]:
        """All rows of a data set that is no task's own. Raises KvcliError naming this task, the data set and where its
        rows belong."""
        try:
            return read_split(data, SPLIT, data_dir)
        except KvcliError as e:
            given = e.given.replace(f"--task {data.task}", f"--task {self.name}")
            what, fix = e.what, e.fix
            if data_dir is None:
                what = f"{self.name}: {what}"
            elif given.startswith("--data-dir"):
                given = f"--task {self.name} {given}"
                what = f"{self.name} has no rows of {data.path}: {what.rpartition(': ')[2]}"
                fix = f"put them, one a line, into {Path(data_dir) / data.task / SPLIT}.jsonl, or leave --data-dir out"
            raise KvcliError(what, given=given, fix=fix, code=e.code) from e

    def _field(self, row: Row, name: str, kind: type[Any]) -> Any:
        value = row.values.get(name)
        if not isinstance(value, kind) or not value:
            wanted = "text" if kind is str else "a mapping"
            raise bad_row(row, f"the field '{name}' is {str(value)[:60]!r}, not {wanted}", self.name, self.source)
        return value
