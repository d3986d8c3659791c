"""commonsense_qa and commonsense_qa_mc: lm-evaluation-harness' prompt, generated and by log-likelihood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks, load_task
from kvcli.evals.spec import Sample, Segment, Task

SHARED = Path(__file__).parents[3] / "shared" / "data"
GENERATED, CHOSEN = load_task("commonsense_qa"), load_task("commonsense_qa_mc")
BOTH = pytest.mark.parametrize("task", [GENERATED, CHOSEN], ids=["generated", "mc"])
ROW = {
    "id": "x1",
    "question": " Where do boats rest? ",
    "question_concept": "boat",
    "choices": {"label": list("ABCDE"), "text": ["harbour", "hill", "oven", "desk", "cloud"]},
    "answerKey": "A",
}


@pytest.fixture(scope="module")
def shared() -> str:
    if not (SHARED / "commonsense_qa").is_dir():
        pytest.skip(f"no real rows in {SHARED / 'commonsense_qa'}")
    return str(SHARED)


def write(root: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    path = root / "commonsense_qa" / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / "commonsense_qa" / f"{split}.jsonl").read_text().split("\n") if line]


def ask(row: dict[str, Any]) -> str:
    """By doc_to_text of lm_eval/tasks/commonsense_qa/default.yaml."""
    options = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCDE", row["choices"]["text"], strict=True))
    return f"Question: {row['question'].strip()}\n{options}Answer:"


@BOTH
def test_the_prompt_of_a_row_written_for_it(task: Task, tmp_path: Path) -> None:
    write(tmp_path, "validation", [ROW])
    write(tmp_path, "train", [{**ROW, "question": "Train?", "answerKey": "E"}])
    (sample,) = task.samples(shots=1, shot_seed=0, limit=None, data_dir=str(tmp_path))
    options = "A. harbour\nB. hill\nC. oven\nD. desk\nE. cloud\n"
    assert sample.text == (f"Question: Train?\n{options}Answer: E\n\nQuestion: Where do boats rest?\n{options}Answer:")
    assert [(s.region, s.shot) for s in sample.segments] == [("shot", 0), ("question", -1)]


def test_facts() -> None:
    for task in (GENERATED, CHOSEN):
        assert (task.shots, task.chance, task.ability) == (4, 0.2, "commonsense")
        assert (task.data.path, task.data.name, task.test_split) == ("tau/commonsense_qa", None, "validation")  # type: ignore[attr-defined]
    assert GENERATED.reference == {"llama3.1-8b-instruct": {4: 0.7748}} and GENERATED.until == ("</s>", "\n")
    assert (CHOSEN.metric, CHOSEN.output_type) == ("acc", "multiple_choice")
    assert "commonsense_qa" in {task.name for task in find_tasks(["kvfundabench"])}


@pytest.mark.shared
@BOTH
def test_every_prompt_is_lm_evaluation_harness_s(task: Task, shared: str) -> None:
    validation, train = rows("validation"), {ask(r): r for r in rows("train")}
    samples = task.samples(shots=4, shot_seed=0, limit=None, data_dir=shared)
    assert len(samples) == 1221 == len({s.id for s in samples})
    front = "".join(s.text for s in samples[0].segments[:-1])
    for shot in samples[0].segments[:-1]:
        question, _, letter = shot.text.rstrip("\n").rpartition(" ")
        assert train[question]["answerKey"] == letter and shot.text.endswith(f" {letter}\n\n")
    for sample in samples:
        row = validation[int(sample.id)]
        assert sample.text == front + ask(row)
        right = "ABCDE"[sample.target] if sample.options else sample.target
        assert right == row["answerKey"] and sample.options in ((), (" A", " B", " C", " D", " E"))


@pytest.mark.shared
def test_both_tasks_ask_the_same_and_shots_follow_the_seed(shared: str) -> None:
    def texts(task: Task, shots: int, **more: int) -> list[str]:
        samples = task.samples(shots=shots, limit=3, data_dir=shared, **{"shot_seed": 0, **more})
        return [s.text for s in samples]

    def shot_texts(shots: int, **more: int) -> list[str]:
        samples = GENERATED.samples(shots=shots, limit=1, data_dir=shared, **{"shot_seed": 0, **more})
        return [s.text for s in samples[0].segments[:-1]]

    assert texts(GENERATED, 4) == texts(CHOSEN, 4) and texts(GENERATED, 4, shot_seed=1) == texts(CHOSEN, 4, shot_seed=1)
    four = shot_texts(4)
    assert len(set(four)) == 4 and shot_texts(2) == four[:2] and not set(shot_texts(4, shot_seed=1)) & set(four)
    turned = shot_texts(4, shot_order=1)
    assert sorted(turned) == sorted(four) and turned != four


@pytest.mark.shared
def test_gold_letters_are_right_and_empty_outputs_wrong(shared: str) -> None:
    for s in GENERATED.samples(shots=0, shot_seed=0, limit=None, data_dir=shared):
        assert GENERATED.score(s, f" {s.target}").extra == {"letter": 1.0, "strict": 1.0}
        assert GENERATED.score(s, f"The answer is ({s.target}).").value == 1
        for empty in ("", "\n", "\n\nQuestion: A"):
            assert (GENERATED.score(s, empty).value, GENERATED.score(s, empty).extracted) == (0.0, None)
    for s in CHOSEN.samples(shots=0, shot_seed=0, limit=None, data_dir=shared):
        for at in range(5):
            score = CHOSEN.choose(s, [-1.0 if i == at else -1.5 for i in range(5)])
            assert (score.value, score.extracted) == (float(at == s.target), "ABCDE"[at])


@pytest.mark.parametrize(
    ("output", "extracted", "strict"),
    [
        (" E", "E", 1),
        ("e.", "E", 1),
        ("E. cloud", "E", 0),
        ("Answer: E.", "E", 0),
        ("The best answer is **E**", "E", 0),
        ("D or E", None, 0),
        ("F", None, 0),
        ("cloud", None, 0),
        ("Everything", None, 0),
    ],
)
def test_tricky_outputs(output: str, extracted: str | None, strict: int) -> None:
    score = GENERATED.score(Sample("0", (Segment("?", "question"),), "E"), output)
    assert (score.value, score.extracted) == (float(extracted == "E"), extracted)
    assert score.extra["strict"] == strict


@BOTH
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"answerKey": ""}, "the right answer '' is none of the options A, B, C, D, E"),
        ({"answerKey": "F"}, "the right answer 'F' is none of"),
        ({"answerKey": None}, "the right answer None is none of"),
        ({"choices": {"label": list("ABCD"), "text": list("abcd")}}, "has no element 4"),
        ({"choices": {"label": list("ABCDE")}}, "has no attribute 'text'"),
        ({"question": None}, "has no attribute 'strip'"),
    ],
)
def test_bad_rows_are_named(task: Task, tmp_path: Path, change: dict[str, Any], what: str) -> None:
    path = write(tmp_path, "validation", [ROW, {**ROW, **change}])
    with pytest.raises(KvcliError, match=what) as caught:
        task.samples(shots=0, shot_seed=0, limit=None, data_dir=str(tmp_path))
    assert caught.value.what.startswith(f"{path}:2: ") and caught.value.code == 2


def test_an_exemplar_without_an_answer_is_named(tmp_path: Path) -> None:
    write(tmp_path, "validation", [ROW])
    write(tmp_path, "train", [{**ROW, "question": "Train?", "answerKey": ""}])
    with pytest.raises(KvcliError, match=r"train\.jsonl:1: the right answer ''"):
        GENERATED.samples(shots=1, shot_seed=0, limit=None, data_dir=str(tmp_path))
