"""Settings of tasks from the command line: what they may be, the canonical name, and what stays the same under all."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcli.errors import Exit, KvcliError
from kvcli.evals.loader import find_tasks, load_task, own_digest, text_of
from kvcli.evals.settings import kind_of, settings_of
from kvcli.evals.spec import Task

BUILDER = """
from dataclasses import dataclass
from typing import Any, Literal

from kvcli.evals.data import first_of
from kvcli.evals.spec import Sample, Score, Segment, Task


@dataclass(frozen=True, kw_only=True)
class Count(Task):
    length: int = 8
    depth: float = 0.5
    words: bool = True
    language: Literal["en", "no"] = "en"
    ending: str = "?"
    seed: int | None = None
    many: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if not 0 <= self.depth <= 1:
            raise ValueError("'depth' lies in 0..1")

    def samples(self, *, limit, **_: Any):
        text = f"{self.length} {self.depth} {self.words} {self.language} {self.ending}"
        return [Sample(str(i), (Segment(text, "question"),), "x") for i in first_of(self.name, 50, limit)]

    def score(self, sample, output):
        return Score(float(output == sample.target), output)
"""


@pytest.fixture
def count(tmp_path: Path) -> str:
    (tmp_path / "count.py").write_text(BUILDER)
    (tmp_path / "count.yaml").write_text("task: count\nbuilder: count.py:Count\nlength: 16\n")
    return str(tmp_path / "count.yaml")


def one(text: str) -> Task:
    (task,) = find_tasks([text])
    return task


@pytest.mark.parametrize(
    "typed, name",
    [
        ("length=32", "count:length=32"),
        ("length=16", "count"),
        ("length=8", "count:length=8"),
        ("length=32,depth=0.25", "count:depth=0.25,length=32"),
        ("depth=1", "count:depth=1.0"),
        ("depth=.5", "count"),
        ("words=False", "count:words=false"),
        ("language=no", "count:language=no"),
        ("ending='a, b'", "count:ending='a, b'"),
        ("seed=3", "count:seed=3"),
        ("seed=none", "count"),
    ],
)
def test_names_are_canonical(count: str, typed: str, name: str) -> None:
    task = one(f"{count}:{typed}")
    assert (task.name, task.base) == (name, "count")
    assert one(text_of(task)) == task, "the text of the task finds it again"


def test_settings_reach_the_prompts_and_the_samples_stay_the_same(count: str) -> None:
    ways = [one(count), one(f"{count}:length=32,language=no")]
    plain, other = (task.samples(shots=0, shot_seed=0, limit=9, data_dir=None) for task in ways)
    assert [s.id for s in plain] == [s.id for s in other]
    assert (plain[0].text, other[0].text) == ("16 0.5 True en ?", "32 0.5 True no ?")


def test_what_can_be_set_is_said_with_kinds_and_values(count: str) -> None:
    task = one(count)
    values = {"depth": 0.5, "ending": "?", "language": "en", "length": 16, "seed": None, "words": True}
    assert settings_of(task) == values, "sorted, no tuple"
    kinds = {name: kind_of(task, name) for name in values}
    assert kinds == {
        "depth": "a number", "ending": "text", "language": "en|no", "length": "a whole number",
        "seed": "a whole number or none", "words": "true or false",
    }  # fmt: skip


@pytest.mark.parametrize(
    "typed, what, fix",
    [
        ("lenght=3", "unknown setting 'lenght' of count", "length; the settings of count are depth, ending"),
        ("shots=-1", "'shots' must be a whole number", "count:shots=0"),
        ("version=3", "unknown setting 'version' of count", "settings of count are"),
        ("many=3", "unknown setting 'many' of count", "settings of count are"),
        ("name=x", "unknown setting 'name' of count", "settings of count are"),
        ("length=abc", "'length' must be a whole number", "count:length=16"),
        ("length=1.5", "'length' must be a whole number", "count:length=16"),
        ("length=true", "'length' must be a whole number", "count:length=16"),
        ("depth=nan", "'depth' must be a number", "count:depth=0.5"),
        ("words=1", "'words' must be true or false", "count:words=true"),
        ("language=de", "'language' cannot be 'de'", "en|no"),
        ("depth=2", "'depth' lies in 0..1", "kvcli list tasks count"),
        ("length", "not a setting", "KEY=VALUE"),
        ("", "no setting", "KEY=VALUE"),
        ("length=1,length=2", "given twice", "keep one"),
    ],
)
def test_mistakes(count: str, typed: str, what: str, fix: str) -> None:
    with pytest.raises(KvcliError) as caught:
        find_tasks([f"{count}:{typed}"])
    assert what in caught.value.what and fix in caught.value.fix and caught.value.code == Exit.USAGE
    assert caught.value.given == f"--task {count}:{typed}"


def test_settings_of_shipped_tasks() -> None:
    task = one("tb-recall:prompt_tokens=200,size=50")
    assert task.name == "tb_recall:prompt_tokens=200,size=50" and task.prompt_tokens == 200
    assert (own_digest(task), text_of(task)) == (None, task.name)
    one_sample = task.samples(shots=2, shot_seed=0, limit=1, data_dir=None)
    assert len(one_sample[0].text.split()) < 220


def test_one_task_under_several_settings_is_several_tasks() -> None:
    names = [t.name for t in find_tasks(["tb_recall:size=50,tb_recall,tb_recall:size=400", "tb_recall:size=60"])]
    assert names == ["tb_recall:size=50", "tb_recall", "tb_recall:size=60"]


def test_shots_of_one_task_are_no_part_of_its_name() -> None:
    task = one("tb_recall:shots=4,size=50")
    assert (task.name, task.shots, task.usual_shots) == ("tb_recall:size=50", load_task("tb_recall").shots, 4)
    assert text_of(task) == "tb_recall:size=50,shots=4" and one(text_of(task)) == task
    assert text_of(one("tb_recall:shots=0")) == "tb_recall:shots=0"
    with pytest.raises(KvcliError, match="two numbers of shots for tb_recall") as caught:
        find_tasks(["tb_recall:shots=4,tb_recall:shots=2"])
    assert caught.value.fix == "--task tb_recall --shots 4,2"


def test_a_suite_and_a_glob_give_their_settings_to_each() -> None:
    names = [t.name for t in find_tasks(["tb_c*:size=9"])]
    assert names == ["tb_choice:size=9", "tb_code:size=9"]
    assert {t.size for t in find_tasks(["testbed:size=9"])} == {9}


def test_a_task_in_yaml_alone_has_settings_too_but_not_its_code() -> None:
    task = one("gsm8k:test_split=train")
    assert task.name == "gsm8k:test_split=train" and task.test_split == "train"
    with pytest.raises(KvcliError, match="unknown setting 'scorer' of gsm8k"):
        one("gsm8k:scorer=contains")


def test_an_own_file_is_known_by_its_digest_under_any_settings(count: str) -> None:
    plain, other = one(count), one(f"{count}:length=32")
    assert own_digest(plain) == own_digest(other) == plain.digest != ""
    assert text_of(other) == f"{Path(count).resolve()}:length=32"


def test_settings_do_not_change_where_data_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: question\ndoc_to_target: answer\n")
    task = one(f"{tmp_path / 'mine.yaml'}:description='Be brief. '")
    (sample,) = task.samples(shots=0, shot_seed=0, limit=None, data_dir=str(tmp_path))
    assert sample.text == "Be brief. q"
