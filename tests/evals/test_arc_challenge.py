"""arc_challenge: lm-evaluation-harness' prompt, options by their texts, labels in letters or numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.loader import load_task

SHARED = Path(__file__).parents[3] / "shared" / "data"
TASK = load_task("arc_challenge")
ROW = {
    "id": "1",
    "question": "Which one floats?",
    "choices": {"text": ["a stone", "a cork", "an iron bar", "a coin"], "label": ["A", "B", "C", "D"]},
    "answerKey": "B",
}


@pytest.fixture(scope="module")
def shared() -> str:
    if not (SHARED / "arc_challenge").is_dir():
        pytest.skip(f"no real rows in {SHARED / 'arc_challenge'}")
    return str(SHARED)


def write(root: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    path = root / "arc_challenge" / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / "arc_challenge" / f"{split}.jsonl").read_text().split("\n") if line]


def test_the_prompt_of_a_row_written_for_it(tmp_path: Path) -> None:
    write(tmp_path, "test", [ROW])
    write(tmp_path, "validation", [{**ROW, "question": "Which one sinks?", "answerKey": "D"}])
    (sample,) = TASK.samples(shots=1, shot_seed=0, limit=None, data_dir=str(tmp_path))
    assert sample.text == "Question: Which one sinks?\nAnswer: a coin\n\nQuestion: Which one floats?\nAnswer:"
    assert (sample.options, sample.target) == ((" a stone", " a cork", " an iron bar", " a coin"), 1)


@pytest.mark.parametrize(
    ("labels", "key", "target"),
    [("1234", "1", 0), ("1234", "4", 3), ("ABC", "C", 2), ("12345", "5", 4), ("ABCDE", "E", 4), ("DCBA", "A", 3)],
)
def test_the_right_one_is_found_by_its_label(tmp_path: Path, labels: str, key: str, target: int) -> None:
    """Labels 1 to 4 stand in some of the published rows; an answer '1' is the first option, not the second."""
    choices = {"text": [f"t{label}" for label in labels], "label": list(labels)}
    write(tmp_path, "test", [{**ROW, "choices": choices, "answerKey": key}])
    (sample,) = TASK.samples(shots=0, shot_seed=0, limit=None, data_dir=str(tmp_path))
    assert sample.target == target and sample.options[target] == f" t{key}" and len(sample.options) == len(labels)


@pytest.mark.shared
def test_every_prompt_is_lm_evaluation_harness_s(shared: str) -> None:
    """By doc_to_text, doc_to_choice and doc_to_target of lm_eval/tasks/arc/arc_easy.yaml."""
    test = rows("test")
    answers = {
        r["question"]: r["choices"]["text"][r["choices"]["label"].index(r["answerKey"])] for r in rows("validation")
    }
    samples = TASK.samples(shots=25, shot_seed=0, limit=None, data_dir=shared)
    assert len(samples) == 1172 == len({s.id for s in samples})
    shots = samples[0].segments[:-1]
    assert len({s.text for s in shots}) == 25
    for shot in shots:
        question, _, answer = shot.text.removeprefix("Question: ").partition("\nAnswer: ")
        assert answer == answers[question] + "\n\n"
    front = "".join(s.text for s in shots)
    for sample in samples:
        row = test[int(sample.id)]
        assert sample.text == f"{front}Question: {row['question']}\nAnswer:"
        assert sample.options == tuple(f" {text}" for text in row["choices"]["text"])
        assert row["choices"]["label"][sample.target] == row["answerKey"]
    assert TASK.chance == pytest.approx(sum(1 / len(s.options) for s in samples) / 1172, abs=1e-3)


@pytest.mark.shared
def test_the_likeliest_option_per_character_is_the_answer(shared: str) -> None:
    for sample in TASK.samples(shots=0, shot_seed=0, limit=None, data_dir=shared):
        lengths = [len(option) - 1 for option in sample.options]
        gold = TASK.choose(sample, [-length * (0.5 if i == sample.target else 1) for i, length in enumerate(lengths)])
        assert gold.value == 1 and gold.extracted == sample.options[sample.target][1:] and gold.extra["acc_norm"] == 1
        wrong = TASK.choose(sample, [-length * (2 if i == sample.target else 1.5) for i, length in enumerate(lengths)])
        assert wrong.value == 0
        nothing = TASK.choose(sample, [-math.inf if i == sample.target else -1.0 for i in range(len(lengths))])
        assert nothing.value == 0 == nothing.extra["acc"]


def test_facts() -> None:
    assert (TASK.metric, TASK.output_type, TASK.shots) == ("acc_norm", "multiple_choice", 25)
    assert (TASK.data.path, TASK.data.name) == ("allenai/ai2_arc", "ARC-Challenge")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"answerKey": "E"}, "'E' is not in list"),
        ({"answerKey": 2}, "2 is not in list"),
        ({"choices": {"text": ["a"], "label": ["B"]}}, "the number of options is 1"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}, "answerKey": "C"}, "the right answer is option 2"),
        ({"choices": {"text": ["a", None], "label": ["A", "B"]}}, "an option is None, not text"),
        ({"choices": {"text": "ab", "label": ["A", "B"]}}, "not a list"),
        ({"choices": []}, "has no attribute 'label'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    path = write(tmp_path, "test", [ROW, {**ROW, **change}])
    with pytest.raises(KvcliError, match=what) as caught:
        TASK.samples(shots=0, shot_seed=0, limit=None, data_dir=str(tmp_path))
    assert caught.value.what.startswith(f"{path}:2: ") and caught.value.code == 2
