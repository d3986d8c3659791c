"""LongGenBench: K questions in one prompt, one long output that answers them all, T times (arXiv:2410.04199).

Prompt: Dominic789654/LongGenBench longgenbench_GSM8K_openai.py and longgenbench_MMLU_openai.py; of CommonsenseQA, which
has no official script, Linking-ai/SCOPE longgenbench_CSQA.py. The examples' questions stand first, their answers
behind, so a shot is two stretches. Numbering goes on from the examples to the questions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvcli.errors import KvcliError
from kvcli.evals.data import (
    DataSet,
    Row,
    bad_row,
    first_of,
    permutation,
    read_split,
    reordered,
)
from kvcli.evals.long_answers import (
    letter_in,
    number_in,
    official_gsm8k,
    official_mmlu,
    same_number,
    scope,
    sections,
)
from kvcli.evals.spec import Sample, Score, Segment, Task, Tokens
from kvcli.evals.written import Written, remark, written

SYSTEM = (
    "Answer each question step by step, adhering to the format shown in the examples provided. Start each response "
    "with 'Answer_' and introduce the final response with 'The answer is'. Do not repeat the question. Ensure that you "
    "respond to all the questions presented, regardless of their number."
)
SUBJECT = " The following are multiple choice questions (with answers) about {}."


@dataclass(frozen=True)
class Item:
    """A question: its text with options, the right answer, and for examples the answer as it is written out."""

    question: str
    gold: str
    written: str = ""


@dataclass(frozen=True)
class Layout:
    """What the data sets' prompts differ in: behind an example's `Question_1:`, behind each question, behind all."""

    heading: str
    between: str
    end: str
    letters: str = ""


LAYOUTS = {
    "gsm8k": Layout(": \n", "\n", "\n"),
    "mmlu": Layout(":\n", "\n\n", "", "ABCD"),
    "commonsense_qa": Layout(": \n", "\n\n", "\n", "ABCDE"),
}


@dataclass(frozen=True, kw_only=True)
class LongGenBench(Task):
    """`t` generations of `k` questions each, in the data set's order: generation i has questions ik to ik + k - 1; of
    MMLU generation i is about subject i mod 57, its first `k` questions.

    order: length sorts the questions of a generation from shortest to longest, as the paper does; the released script
    keeps their order. rule: what the score is (docs/long-tasks.md); all rules are stored with every record.
    """

    data: Literal["gsm8k", "mmlu", "commonsense_qa"]
    dataset_path: str
    dataset_name: str | None = None
    test_split: str = "test"
    fewshot_split: str = "train"
    exemplars: str = ""
    """File of worked examples in the data set's folder; `harness`: the lm-eval task that has them too."""
    harness: str = ""
    k: int = 30
    t: int = 20
    order: Literal["dataset", "length"] = "dataset"
    rule: Literal["all", "official", "scope"] = "all"

    def __post_init__(self) -> None:
        """Raises ValueError for settings that cannot work."""
        if self.k < 1 or self.t < 1:
            raise ValueError("'k' and 't' must be at least 1")
        if self.rule == "official" and self.data == "commonsense_qa":
            raise ValueError("'rule: official': LongGenBench released no script for CommonsenseQA; rule: scope")

    def remarks(self, *, shots: int, data_dir: str | None) -> list[str]:
        """That the examples are rows of a split, without the paper's reasoning or with another."""
        found = self._written(data_dir)
        subject = str(found.rows[0].values.get("subject", "")) if found.rows and self.data == "mmlu" else ""
        there = len(self._written_out(subject, found))
        if not (self.exemplars or self.harness) or shots <= there:
            return []
        why = f"{found.where} has {there} for {shots} shots" if there else found.absent
        return [remark(self.name, self.fewshot_split, "the LongGenBench paper", why)]

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
        """One sample per generation."""
        if shots < 0:
            raise KvcliError("shots cannot be negative", given=f"--shots {shots}", fix="--shots 0")
        groups = self._groups(read_split(self._source, self.test_split, data_dir))
        chosen = first_of(self.name, self.t, limit)
        examples: dict[str, list[Item]] = {}
        for subject in {groups[i][0] for i in chosen}:
            drawn = self._examples(subject, shots, shot_seed, data_dir)
            examples[subject] = reordered(drawn, shot_order)
        return [self._sample(i, *groups[i], examples[groups[i][0]]) for i in chosen]

    def score(self, sample: Sample, output: str) -> Score:
        """Share of the questions answered right; extra: the share answered at all, and the other rules' values."""
        letters, golds = LAYOUTS[self.data].letters, list(sample.target)
        texts = sections(output, sample.meta["first"], len(golds), sample.meta["examples"])
        answers = [None if t is None else letter_in(t, letters) if letters else number_in(t) for t in texts]
        same: Callable[[str, str], bool] = str.__eq__ if letters else same_number
        right = sum(a is not None and same(a, g) for a, g in zip(answers, golds, strict=True))
        values = {"all": right / len(golds), "scope": scope(output, golds, bool(letters))}
        if self.data != "commonsense_qa":
            values["official"] = (official_mmlu if letters else official_gsm8k)(output, golds)
        found = [f"{sample.meta['first'] + i}: {a}" for i, a in enumerate(answers) if a is not None]
        answered = sum(a is not None for a in answers) / len(golds)
        return Score(values[self.rule], ", ".join(found) or None, {"answered": answered, **values})

    @property
    def _source(self) -> DataSet:
        return DataSet(self.name, self.dataset_path, self.dataset_name)

    def _groups(self, rows: Sequence[Row]) -> list[tuple[str, list[Item]]]:
        """(subject, questions) of each generation. Raises KvcliError when there are not enough questions."""
        by_subject: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            by_subject[self._text(row, "subject") if self.data == "mmlu" else ""].append(row)
        subjects = sorted(by_subject)
        groups = []
        for i in range(self.t):
            subject, start = subjects[i % len(subjects)], i // len(subjects) * self.k
            mine = by_subject[subject][start : start + self.k]
            if len(mine) < self.k:
                there = f"{len(by_subject[subject])} questions" + (f" about {subject}" if subject else "")
                what = f"{self.base} has {there}: too few for generation {i + 1} of {self.t} with {self.k} questions"
                fix = f"--task {self.base}:t={i}, or a smaller k" if i else f"--task {self.base}:k={len(mine)}"
                raise KvcliError(what, given=f"k={self.k}, t={self.t}", fix=fix)
            items = [self._item(row) for row in mine]
            groups.append((subject, sorted(items, key=lambda x: len(x.question)) if self.order == "length" else items))
        return groups

    def _sample(self, index: int, subject: str, items: list[Item], examples: list[Item]) -> Sample:
        layout, first = LAYOUTS[self.data], len(examples) + 1
        about = SUBJECT.format(subject.replace("_", " ")) if subject else ""
        segments = [Segment(SYSTEM + about + "\n\n" + ("Examples: \n" if examples else ""), "system")]
        for i, e in enumerate(examples):
            segments.append(Segment(f"Question_{i + 1}{layout.heading}{e.question}\n\n", "shot", i))
        for i, e in enumerate(examples):
            segments.append(Segment(f"Answer_{i + 1}:\n{e.written}\n\n", "shot", i))
        asked = [f"Question_{first + i}:\n{item.question}{layout.between}" for i, item in enumerate(items)]
        question = ("Following Question: \n" if examples else "") + "".join(asked) + layout.end
        segments.append(Segment(question, "question"))
        meta = {"first": first, "examples": [e.written for e in examples], **({"subject": subject} if subject else {})}
        return Sample(str(index), tuple(segments), [x.gold for x in items], subject or f"generation {index}", meta)

    def _examples(self, subject: str, shots: int, seed: int, data_dir: str | None) -> list[Item]:
        """`shots` worked examples: the written ones (`kvcli.evals.written`), in their order under seed 0; without
        them, or for more than there are, rows of `fewshot_split` by the seed (MMLU: the subject's, in order)."""
        if shots == 0:
            return []
        pool, fixed = self._written_out(subject, self._written(data_dir)), True
        if shots > len(pool):
            rows = read_split(self._source, self.fewshot_split, data_dir)
            if subject:
                rows = [row for row in rows if self._text(row, "subject") == subject]
            pool, fixed = [self._item(row) for row in rows], bool(subject)
        if shots > len(pool):
            what = f"{self.base} has {len(pool)} examples" + (f" about {subject}" if subject else "")
            raise KvcliError(what, given=f"--shots {shots}", fix=f"--shots {len(pool)} or fewer")
        keep = fixed and seed == 0
        order = range(len(pool)) if keep else permutation(f"kvcli:shots:{self.base}:{subject}:{seed}", len(pool))
        return [pool[i] for i in order[:shots]]

    def _written(self, data_dir: str | None) -> Written:
        return written(self._source, self.exemplars or None, self.harness or None, data_dir)

    def _written_out(self, subject: str, found: Written) -> list[Item]:
        """The written examples: fields question and target; of MMLU subject and prompt (`Q: .. A: ..`)."""
        rows = found.rows
        if not subject:
            return [Item(self._text(r, "question"), "", _lines(self._text(r, "target"))) for r in rows]
        prompts = [self._text(row, "prompt") for row in rows if self._text(row, "subject") == subject]
        pairs = [piece.partition("\nA: ") for prompt in prompts for piece in prompt.split("\n\nQ: ")[1:]]
        return [Item(q.strip(), "", a.strip()) for q, _, a in pairs]

    def _item(self, row: Row) -> Item:
        """A row as a question, and as the example it would be."""
        question = self._text(row, "question")
        if self.data == "gsm8k":
            worked, mark, gold = self._text(row, "answer").rpartition("#### ")
            gold = gold.strip()
            if not mark or not re.fullmatch(r"-?\$?[\d,]*\.?\d+", gold):
                raise bad_row(row, "no number behind '#### ' in the field 'answer'", self.name, self.source)
            return Item(question, gold, re.sub("<<.*?>>", "", worked).strip() + f"\nThe answer is {gold}.")
        return self._choices(row, question)

    def _choices(self, row: Row, question: str) -> Item:
        """The options as the data set's prompts write them: of MMLU without a blank between them."""
        letters, mmlu = LAYOUTS[self.data].letters, self.data == "mmlu"
        choices = row.values.get("choices")
        texts = choices if mmlu else choices.get("text") if isinstance(choices, dict) else None
        if not isinstance(texts, list) or len(texts) != len(letters) or not all(isinstance(t, str) for t in texts):
            raise bad_row(row, f"the field 'choices' does not have {len(letters)} texts", self.name, self.source)
        answer = row.values.get("answer" if mmlu else "answerKey")
        gold = letters[answer] if mmlu and isinstance(answer, int) and 0 <= answer < len(letters) else answer
        if not isinstance(gold, str) or gold not in letters or not gold:
            raise bad_row(row, f"the right answer is {answer!r}, not one of {letters}", self.name, self.source)
        options = ("" if mmlu else " ").join(f"({x}) {t}" for x, t in zip(letters, texts, strict=True))
        return Item(f"{question}\n{options}", gold, f"The answer is ({gold}).")

    def _text(self, row: Row, name: str) -> str:
        value = row.values.get(name)
        if not isinstance(value, str) or not value.strip():
            raise bad_row(row, f"the field '{name}' is {value!r}, not text", self.name, self.source)
        return value


def _lines(text: str) -> str:
    """A worked answer with one sentence a line, as LongGenBench prints them."""
    return re.sub(r"\. (?=[A-Z0-9])", ".\n", text)
