"""mmlu and mmlu_mc: prompts as lm-evaluation-harness builds them, one task for all subjects, and the letters found."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks, load_task
from kvcli.evals.spec import Sample, Segment

SHARED = Path(__file__).parents[3] / "shared" / "data"
GENERATED, CHOSEN = load_task("mmlu"), load_task("mmlu_mc")
DEV = [
    {"question": f"{s} {i}?", "subject": s, "choices": [f"a{i}", f"b{i}", f"c{i}", f"d{i}"], "answer": i % 4}
    for s in ("high_school_knots", "tides")
    for i in range(6)
]
TEST = [
    {
        "question": " Which knot?\n",
        "subject": "high_school_knots",
        "choices": ["reef", "1,000", " x", "_"],
        "answer": 3,
    },
    {"question": "When?", "subject": "tides", "choices": ["noon", "dusk", "dawn", "never"], "answer": 0},
]


@pytest.fixture(scope="module")
def shared() -> str:
    if not (SHARED / "mmlu").is_dir():
        pytest.skip(f"no real rows in {SHARED / 'mmlu'}")
    return str(SHARED)


@pytest.fixture
def small(tmp_path: Path) -> str:
    write(tmp_path, "dev", DEV)
    write(tmp_path, "test", TEST)
    return str(tmp_path)


def write(root: Path, split: str, rows: list[dict[str, Any]]) -> Path:
    path = root / "mmlu" / f"{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / "mmlu" / f"{split}.jsonl").read_text().split("\n") if line]


def harness_text(test: dict[str, Any], exemplars: list[dict[str, Any]]) -> str:
    """By the rule of lm_eval/tasks/mmlu/default/_default_template_yaml and _generate_configs.py."""

    def ask(row: dict[str, Any]) -> str:
        options = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", row["choices"], strict=True))
        return f"{row['question'].strip()}\n{options}Answer:"

    about = " ".join(test["subject"].split("_"))
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return head + "".join(f"{ask(e)} {'ABCD'[e['answer']]}\n\n" for e in exemplars) + ask(test)


def test_the_prompt_of_a_row_written_for_it(small: str) -> None:
    for task in (GENERATED, CHOSEN):
        samples = {s.id: s for s in task.samples(shots=2, shot_seed=0, limit=None, data_dir=small)}
        assert samples["0"].text == (
            "The following are multiple choice questions (with answers) about high school knots.\n\n"
            "high_school_knots 0?\nA. a0\nB. b0\nC. c0\nD. d0\nAnswer: A\n\n"
            "high_school_knots 1?\nA. a1\nB. b1\nC. c1\nD. d1\nAnswer: B\n\n"
            "Which knot?\nA. reef\nB. 1,000\nC.  x\nD. _\nAnswer:"
        )
        assert [(s.region, s.shot) for s in samples["0"].segments] == [
            ("system", -1), ("shot", 0), ("shot", 1), ("question", -1),
        ]  # fmt: skip
        assert [samples[i].cluster for i in "01"] == ["high_school_knots", "tides"]
        assert samples["1"].text.startswith("The following are multiple choice questions (with answers) about tides.")


def test_the_two_tasks_ask_the_same(small: str) -> None:
    kwargs: dict[str, Any] = {"shots": 5, "shot_seed": 4, "limit": 1, "data_dir": small}
    (generated,), (chosen,) = GENERATED.samples(**kwargs), CHOSEN.samples(**kwargs)
    assert (generated.id, generated.text) == (chosen.id, chosen.text)
    assert chosen.options == (" A", " B", " C", " D") and generated.options == ()
    assert "ABCD"[chosen.target] == generated.target


def test_facts() -> None:
    for task in (GENERATED, CHOSEN):
        assert (task.shots, task.chance, task.ability) == (5, 0.25, "world knowledge")
    assert GENERATED.reference["llama3.1-8b-instruct"] == {0: 0.6262, 5: 0.6882} and GENERATED.suites == (
        "kvfundabench",
    )
    assert (GENERATED.metric, GENERATED.output_type, GENERATED.until) == (
        "exact_match", "generate_until", ("</s>", "\n"),
    )  # fmt: skip
    assert (CHOSEN.metric, CHOSEN.output_type, CHOSEN.suites) == ("acc", "multiple_choice", ())
    assert "mmlu" in {task.name for task in find_tasks(["kvfundabench"])}


@pytest.mark.shared
def test_every_prompt_is_lm_evaluation_harness_s(shared: str) -> None:
    test, dev = rows("test"), rows("dev")
    by_subject = {s: [r for r in dev if r["subject"] == s] for s in {r["subject"] for r in dev}}
    start = time.monotonic()
    samples = CHOSEN.samples(shots=5, shot_seed=0, limit=None, data_dir=shared)
    assert time.monotonic() - start < 20, "14,042 rows in seconds"
    assert len(samples) == 14042 == len({s.id for s in samples}) and len({s.cluster for s in samples}) == 57
    for sample in samples:
        row = test[int(sample.id)]
        assert sample.text == harness_text(row, by_subject[row["subject"]])
        assert sample.target == row["answer"] and sample.cluster == row["subject"]
    assert Counter(s.target for s in samples) == {0: 3222, 1: 3462, 2: 3582, 3: 3776}


@pytest.mark.shared
@pytest.mark.parametrize("shots", [0, 1, 2, 4, 5])
def test_fewer_shots_are_the_first_of_the_subject(shared: str, shots: int) -> None:
    test, dev = rows("test"), rows("dev")
    for sample in GENERATED.samples(shots=shots, shot_seed=0, limit=20, data_dir=shared):
        row = test[int(sample.id)]
        assert sample.text == harness_text(row, [r for r in dev if r["subject"] == row["subject"]][:shots])


@pytest.mark.shared
def test_gold_letters_are_right_and_empty_outputs_wrong(shared: str) -> None:
    samples = GENERATED.samples(shots=0, shot_seed=0, limit=None, data_dir=shared)
    for s in samples:
        score = GENERATED.score(s, f" {s.target}\n\nQuestion")
        assert (score.value, score.extracted, score.extra) == (1.0, s.target, {"letter": 1.0, "strict": 1.0})
        assert GENERATED.score(s, "").value == 0 and GENERATED.score(s, "").extracted is None
    for s in CHOSEN.samples(shots=0, shot_seed=0, limit=200, data_dir=shared):
        lls = [-9.0, -9.0, -9.0, -9.0]
        lls[s.target] = -8.0
        score = CHOSEN.choose(s, lls)
        assert (score.value, score.extracted) == (1.0, "ABCD"[s.target])
        lls[s.target] = -10.0
        assert CHOSEN.choose(s, lls).value == 0


@pytest.mark.parametrize(
    ("output", "extracted", "letter", "strict"),
    [
        (" B", "B", 1, 1),
        ("(B)", "B", 1, 1),
        ("B.", "B", 1, 1),
        ("**B**", "B", 1, 1),
        ("b", "B", 1, 1),
        (" B\nC", "B", 1, 1),
        ("B</s>C", "B", 1, 1),
        ("B) dusk", "B", 1, 0),
        ("**B.** dusk", "B", 1, 0),
        ("Answer: B.", "B", 1, 0),
        ("The correct answer is (B).", "B", 1, 0),
        ("The answer is \\boxed{B}.", "B", 1, 0),
        ("B is the correct answer.", "B", 1, 0),
        ("The answer is not C. The answer is B", "B", 1, 0),
        ("C", "C", 0, 0),
        ("The answer is C, not B.", "C", 0, 0),
        ("E", None, 0, 0),
        ("A dog", None, 0, 0),
        ("Both A and B", None, 0, 0),
        ("B or C", None, 0, 0),
        ("B, C", None, 0, 0),
        ("dusk", None, 0, 0),
        ("bank", None, 0, 0),
        ("2", None, 0, 0),
        ("", None, 0, 0),
        (" \n", None, 0, 0),
        ("\nB", None, 0, 0),
        ("...", None, 0, 0),
    ],
)
def test_tricky_outputs(output: str, extracted: str | None, letter: int, strict: int) -> None:
    """strict: what lm-evaluation-harness' mmlu_generative makes of them."""
    score = GENERATED.score(Sample("0", (Segment("?", "question"),), "B"), output)
    assert (score.value, score.extracted) == (letter, extracted)
    assert score.extra == {"letter": float(letter), "strict": float(strict)}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"answer": 4}, "the right answer is option 4, and the options are 0 to 3"),
        ({"answer": -1}, "the right answer is option -1"),
        ({"answer": "E"}, "the right answer 'E' is none of the options"),
        ({"choices": ["a", "b", "c"]}, "has no element 3"),
        ({"choices": None}, "None.* has no element 0"),
        ({"choices": ["a", "b", None, "d"]}, "is null, not text"),
        ({"question": 7}, "has no attribute 'strip'"),
        ({"subject": None}, "'subject' is None, not a text that rows can share"),
    ],
)
@pytest.mark.parametrize("task", [GENERATED, CHOSEN], ids=["mmlu", "mmlu_mc"])
def test_bad_rows_are_named(tmp_path: Path, task: Any, change: dict[str, Any], what: str) -> None:
    path = write(tmp_path, "test", [TEST[0], {**TEST[1], **change}])
    with pytest.raises(KvcliError, match=what) as caught:
        task.samples(shots=0, shot_seed=0, limit=None, data_dir=str(tmp_path))
    assert caught.value.what.startswith(f"{path}:2: ") and "\n" not in caught.value.what and caught.value.code == 2


def test_a_missing_field_a_cut_line_and_an_empty_split(tmp_path: Path) -> None:
    def fails(what: str, shots: int = 0) -> None:
        with pytest.raises(KvcliError, match=what):
            GENERATED.samples(shots=shots, shot_seed=0, limit=None, data_dir=str(tmp_path))

    path = write(tmp_path, "test", [TEST[0], {k: v for k, v in TEST[1].items() if k != "subject"}])
    fails(r"test\.jsonl:2: no field 'subject'")
    path.write_text(json.dumps(TEST[0]) + "\n" + json.dumps(TEST[1])[:40])
    fails(r"test\.jsonl:2: the line is cut off")
    path.write_text("\n")
    fails(r"test\.jsonl: split 'test' is empty")
    write(tmp_path, "test", TEST)
    fails(r"no split 'dev' of task 'mmlu'", shots=5)
    write(tmp_path, "dev", [*DEV[:6], {**DEV[6], "answer": 9}, *DEV[7:]])
    fails(r"dev\.jsonl:7: the right answer is option 9", shots=5)
    write(tmp_path, "dev", DEV)
    fails(r"6 exemplars of '\w+' in dev for this row", shots=7)


def test_the_hub_s_name() -> None:
    for task in (GENERATED, CHOSEN):
        assert (task.data.path, task.data.name, task.test_split, task.fewshot_split) == (  # type: ignore[attr-defined]
            "cais/mmlu", "all", "test", "dev",
        )  # fmt: skip
