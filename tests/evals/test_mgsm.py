"""mgsm in eleven languages: lm-evaluation-harness' native chain-of-thought prompts and its two answer rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks, load_task
from kvcli.evals.spec import Sample, Segment

SHARED = Path(__file__).parents[3] / "shared" / "data"
WORDS = {
    "bn": ("প্রশ্ন:", "ধাপে ধাপে উত্তর:", "উত্তর হল {}।"),
    "de": ("Frage:", "Schritt-für-Schritt-Antwort:", "Die Antwort lautet {}."),
    "en": ("Question:", "Step-by-Step Answer:", "The answer is {}."),
    "es": ("Pregunta:", "Respuesta paso a paso:", "La respuesta es {}."),
    "fr": ("Question :", "Réponse étape par étape :", "La réponse est {}."),
    "ja": ("問題：", "ステップごとの答え:", "答えは{}です。"),
    "ru": ("Задача:", "Пошаговоерешение:", "Ответ — {}."),
    "sw": ("Swali:", "Jibu la Hatua kwa Hatua:", "Jibu ni {}."),
    "te": ("ప్రశ్న:", "దశలవారీగా సమాధానం:", "సమాధానం {}."),
    "th": ("โจทย์:", "คำตอบทีละขั้นตอน:", "คำตอบคือ {}"),
    "zh": ("问题：", "逐步解答:", "答案是 {}。"),
}
"""The words QUESTION, ANSWER and REGEX of lm_eval/tasks/mgsm/utils.py; Bengali's closing words are the exemplars'."""
EACH = pytest.mark.parametrize("language", list(WORDS))
TASKS = {language: load_task(f"mgsm_{language}") for language in WORDS}


@pytest.fixture(scope="module")
def shared() -> str:
    if not (SHARED / "mgsm").is_dir():
        pytest.skip(f"no real rows in {SHARED / 'mgsm'}")
    return str(SHARED)


def rows(language: str, split: str) -> list[dict[str, Any]]:
    path = SHARED / "mgsm" / f"{language}_{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def gold(answer: int) -> Sample:
    return Sample("0", (Segment("?", "question"),), str(answer))


def test_facts() -> None:
    assert {t.name for t in find_tasks(["mgsm"])} == {f"mgsm_{language}" for language in WORDS}
    assert {t.name for t in TASKS.values()} <= {t.name for t in find_tasks(["multilingual"])}
    for language, task in TASKS.items():
        assert (task.shots, task.chance, task.max_new_tokens) == (8, 0.0, 256)
        assert task.until == (WORDS[language][0], "</s>", "<|im_end|>")
        assert (task.data.path, task.data.name) == ("juletxara/mgsm", language)  # type: ignore[attr-defined]


@pytest.mark.shared
@EACH
def test_every_prompt_is_lm_evaluation_harness_s(language: str, shared: str) -> None:
    """By the templates of mgsm_native_cot_*.yaml: the answer's own heading and one character more are cut off."""
    question, answer, _ = WORDS[language]
    train, test = rows(language, "train"), rows(language, "test")
    skip = len(answer) + 1
    front = "".join(f"{r['question']}\n{answer} {r['answer'][skip:]}\n\n" for r in train)
    samples = TASKS[language].samples(shots=8, shot_seed=0, limit=None, data_dir=shared)
    assert len(samples) == 250
    for sample in samples:
        row = test[int(sample.id)]
        assert sample.text == f"{front}{question} {row['question']}\n{answer}"
        assert sample.target == str(row["answer_number"])
        assert [(s.region, s.shot) for s in sample.segments] == [("shot", i) for i in range(8)] + [("question", -1)]


@pytest.mark.shared
def test_languages_of_a_problem_belong_together(shared: str) -> None:
    chosen = {
        language: [(s.id, s.cluster, s.target) for s in task.samples(shots=0, shot_seed=0, limit=30, data_dir=shared)]
        for language, task in TASKS.items()
    }
    assert len(set(map(tuple, chosen.values()))) == 1, "the same problems under --limit, and the same answers"
    assert {c for _, c, _ in chosen["en"]} == {f"mgsm/{i}" for i, _, _ in chosen["en"]}


@pytest.mark.shared
@EACH
def test_gold_answers_are_right_and_empty_outputs_wrong(language: str, shared: str) -> None:
    task = TASKS[language]
    question, _, closing = WORDS[language]
    for s in task.samples(shots=0, shot_seed=0, limit=None, data_dir=shared):
        closed = task.score(s, f" 1 + 2 = 3. {closing.format(s.target)}\n\n{question} 7")
        assert closed.value == 1 and closed.extra == {"flexible": 1.0, "strict": 1.0}, s.target
        thousands = f"{int(s.target):,}"
        assert task.score(s, closing.format(thousands)).extra == {"flexible": 1.0, "strict": 1.0}
        assert task.score(s, f" {s.target}").extra == {"flexible": 1.0, "strict": 0.0}
        for empty in ("", "\n\n", f"{question} {s.target}"):
            score = task.score(s, empty)
            assert (score.value, score.extracted, score.extra["strict"]) == (0.0, None, 0.0)


@pytest.mark.shared
@EACH
def test_worked_solutions_of_the_exemplars_score(language: str, shared: str) -> None:
    """flexible finds the number in all; strict in those that close with the usual words, which is most of them."""
    task = TASKS[language]
    scores = [task.score(gold(r["answer_number"]), " " + r["answer"]) for r in rows(language, "train")]
    assert sum(s.extra["strict"] for s in scores) >= {"ja": 5, "de": 7}.get(language, 8)
    assert sum(s.extra["flexible"] for s in scores) == 8


@pytest.mark.parametrize(
    ("language", "output", "flexible", "strict", "extracted"),
    [
        ("en", " The answer is 18.", 1, 1, "18."),
        ("en", " The answer is 18", 1, 1, "18"),
        ("en", " The answer is 1,8.", 1, 1, "1,8."),
        ("en", " **18**", 1, 0, "18"),
        ("en", " $18", 1, 0, "$18"),
        ("en", " 18 apples", 1, 0, "18"),
        ("en", " The answer is -18.", 1, 1, "-18."),
        ("en", " The answer is 18.0", 0, 0, "18.0"),
        ("en", " The answer is 18. 2 more", 0, 1, "2"),
        ("en", " the answer is 18.", 1, 0, "18."),
        ("en", " eighteen", 0, 0, None),
        ("en", " 18\n\nQuestion: 5 ducks", 1, 0, "18"),
        ("en", " ...", 0, 0, "..."),
        ("de", " Die Antwort lautet 18.", 1, 1, "18."),
        ("de", " Die Antwort ist 18.", 1, 0, "18."),
        ("fr", " La réponse est 18 $.", 0, 1, "$."),
        ("bn", " উত্তর হল 18।", 1, 1, "18"),
        ("bn", " The answer is 18.", 1, 0, "18."),
        ("bn", " উত্তর হল ১৮।", 0, 0, None),
        ("th", " คำตอบคือ ๑๘", 0, 0, None),
        ("ja", " 答えは18です。", 1, 1, "18"),
        ("ja", " 答えは18個です。", 1, 0, "18"),
        ("ja", " 答えは１８です。", 0, 0, None),
        ("zh", " 答案是 18。", 1, 1, "18"),
        ("zh", " 答案是18。", 1, 0, "18"),
        ("zh", " 答案是 18", 1, 0, "18"),
        ("zh", " 十八", 0, 0, None),
        ("ru", " Ответ — 18.", 1, 1, "18."),
        ("ru", " Ответ: 18.", 1, 0, "18."),
    ],
)
def test_tricky_outputs(language: str, output: str, flexible: int, strict: int, extracted: str | None) -> None:
    """What lm-evaluation-harness makes of them: ASCII digits only; sign and point are punctuation, which is ignored."""
    score = TASKS[language].score(gold(18), output)
    assert (score.value, score.extracted) == (flexible, extracted)
    assert score.extra == {"flexible": float(flexible), "strict": float(strict)}


@pytest.mark.parametrize(
    ("split", "row", "what"),
    [
        ("test", {"question": "q"}, "no field 'answer_number'"),
        ("test", {"question": "q", "answer_number": None}, "the right answer is None"),
        ("test", {"question": None, "answer_number": 3}, "is null, not text"),
        ("train", {"question": "q", "answer": None, "answer_number": 3}, "has no attribute|not subscriptable"),
        ("train", {"question": "q", "answer": "Answer: x", "answer_number": 3}, "right answer is ''"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, split: str, row: dict[str, Any], what: str) -> None:
    (tmp_path / "mgsm").mkdir()
    good = {"question": "Question: q", "answer": "Step-by-Step Answer: The answer is 3.", "answer_number": 3}
    for name in ("test", "train"):
        lines = [good, row if name == split else good]
        (tmp_path / "mgsm" / f"en_{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    with pytest.raises(KvcliError, match=what) as caught:
        TASKS["en"].samples(shots=2, shot_seed=0, limit=None, data_dir=str(tmp_path))
    assert re.search(rf"mgsm/en_{split}\.jsonl:2: ", caught.value.what) and caught.value.code == 2
