"""The examples of docs/adding-a-task.md, loaded and scored as printed there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvcli.evals.loader import find_tasks

DOC = Path(__file__).parents[2] / "docs" / "adding-a-task.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    (tmp_path / "capitals.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    folder = tmp_path / "mydata" / "capitals"
    folder.mkdir(parents=True)
    for split, rows in zip(("test", "train"), blocks("json"), strict=True):
        (folder / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    return tmp_path


def test_the_example_loads_and_scores(example: Path) -> None:
    (task,) = find_tasks([str(example / "capitals.yaml")])
    assert (task.name, task.ability, task.shots, task.until) == ("capitals", "my geography", 2, ("\n",))
    samples = task.samples(shots=2, shot_seed=0, limit=None, data_dir=str(example / "mydata"))
    assert sorted(s.id for s in samples) == ["0", "1", "2"]
    norway = next(s for s in samples if s.id == "0")
    assert [s.region for s in norway.segments] == ["shot", "shot", "question"]
    assert norway.segments[2].text == "Question: What is the capital of Norway?\nAnswer:"
    assert {s.text for s in norway.segments[:2]} == {
        "Question: What is the capital of Kenya?\nAnswer: Nairobi\n\n",
        "Question: What is the capital of Japan?\nAnswer: Tokyo\n\n",
    }
    for sample in samples:
        gold = sample.target[-1] if isinstance(sample.target, list) else sample.target
        assert task.score(sample, f" It is {gold}.\n\nQuestion: and").value == 1
        assert task.score(sample, "") == task.score(sample, " \n") and task.score(sample, "").value == 0
    assert task.score(norway, " Bergen\nOslo").value == 0, "text behind a stop is not read"
    assert task.score(norway, " Oslofjord").value == 0


def test_the_scorer_of_the_example(example: Path) -> None:
    (example / "judge.py").write_text(blocks("python")[0], encoding="utf-8")
    path = example / "capitals.yaml"
    path.write_text(path.read_text().replace("scorer: contains", "scorer: judge.py:half_credit"))
    (task,) = find_tasks([str(path)])
    sample = next(
        s for s in task.samples(shots=0, shot_seed=0, limit=None, data_dir=str(example / "mydata")) if s.id == "0"
    )
    assert [task.score(sample, o).value for o in ("Oslo", "is Oslo", "Bergen", "")] == [1.0, 0.5, 0.0, 0.0]


def test_another_length_of_a_testbed_task(tmp_path: Path) -> None:
    path = tmp_path / "needle_700.yaml"
    path.write_text(blocks("yaml")[1], encoding="utf-8")
    (task,) = find_tasks([str(path)])
    sample = task.samples(shots=2, shot_seed=0, limit=1, data_dir=None)[0]
    assert 680 < len(sample.text.split()) <= 700 and task.score(sample, sample.target).value == 1
