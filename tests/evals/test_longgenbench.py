"""lg_gsm8k, lg_mmlu, lg_csqa: prompts of LongGenBench and SCOPE, shots in two stretches, and the three rules."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals import data
from kvcli.evals.data import Row
from kvcli.evals.loader import find_tasks, load_task
from kvcli.evals.long_answers import letter_in, number_in, official_gsm8k, official_mmlu, same_number, scope, sections
from kvcli.evals.spec import Sample, Task

SHARED = Path(__file__).parents[3] / "shared"
DATA = SHARED / "data"
NAMES = ("lg_gsm8k", "lg_mmlu", "lg_csqa")
SCOPE_FILES = {"lg_gsm8k": "gsm8k_30", "lg_mmlu": "mmlu_30", "lg_csqa": "csqa_40"}
GSM8K = load_task("lg_gsm8k")


@pytest.fixture(scope="module")
def shared() -> str:
    for name in ("gsm8k", "mmlu", "commonsense_qa", "longgenbench"):
        if not (DATA / name).is_dir():
            pytest.skip(f"no real rows in {DATA / name}")
    return str(DATA)


def all_samples(task: Task, data_dir: str, **options: Any) -> list[Sample]:
    given = {"shots": task.shots, "shot_seed": 0, "limit": None, **options}
    return sorted(task.samples(data_dir=data_dir, **given), key=lambda s: int(s.id))


def scope_rows(name: str) -> list[dict[str, Any]]:
    text = (DATA / "longgenbench" / f"{SCOPE_FILES[name]}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def perfect(sample: Sample, letters: bool) -> str:
    """An output that answers all questions in the form of the examples."""
    form = "Let's think step by step. So. The answer is ({})." if letters else "3 + 4 = 7.\nThe answer is {}."
    first = sample.meta["first"]
    return "\n\n".join(f"Answer_{first + i}:\n{form.format(a)}" for i, a in enumerate(sample.target))


@pytest.mark.shared
def test_the_gsm8k_prompt_is_scope_s_byte_for_byte(shared: str) -> None:
    """SCOPE stored LongGenBench's prompts: all 20 generations equal its first 20, but for `tues- day` in an example."""
    for sample, row in zip(all_samples(GSM8K, shared), scope_rows("lg_gsm8k"), strict=False):
        system, _, rest = sample.text.partition("Examples: \n")
        assert "Examples: \n" + rest == row["prompt"].replace("tues- day", "tuesday")
        assert system.endswith("regardless of their number.\n\n")
        assert [a.rpartition("#### ")[2] for a in row["answers"]] == sample.target


@pytest.mark.shared
def test_the_csqa_questions_are_scope_s_byte_for_byte(shared: str) -> None:
    """Its five examples carry reasoning that is in no data set; questions, numbering and answers are equal."""
    for sample, row in zip(all_samples(load_task("lg_csqa"), shared), scope_rows("lg_csqa"), strict=False):
        assert (
            sample.segments[-1].text == "Following Question: \n" + row["prompt"].partition("Following Question: \n")[2]
        )
        assert sample.target == row["answers"] and len(sample.target) == 40


@pytest.mark.shared
def test_the_mmlu_prompt_is_that_of_the_official_script(shared: str) -> None:
    """Its layout written down again for one subject; and where SCOPE's list is sound, its questions are the same
    (its `nan` is the option `None`, lost in a CSV file)."""
    samples = all_samples(load_task("lg_mmlu"), shared)
    cot = {r["subject"]: r["prompt"] for r in read(DATA / "mmlu" / "cot_5shot_prompts.jsonl")}
    rows = [r for r in read(DATA / "mmlu" / "test.jsonl") if r["subject"] == "anatomy"][:30]
    pieces = [p.split("\nA: ") for p in cot["anatomy"].split("\n\nQ: ")[1:]]
    expected = "Examples: \n"
    expected += "".join(f"Question_{i}:\n{p[0]}\n\n" for i, p in enumerate(pieces, 1))
    expected += "".join(f"Answer_{i}:\n{p[1].strip()}\n\n" for i, p in enumerate(pieces, 1)) + "Following Question: \n"
    for i, row in enumerate(rows, 6):
        options = "".join(f"({'ABCD'[j]}) {c}" for j, c in enumerate(row["choices"]))
        expected += f"Question_{i}:\n{row['question']}\n{options}\n\n"
    (anatomy,) = [s for s in samples if s.cluster == "anatomy"]
    head, _, rest = anatomy.text.partition("Examples: \n")
    assert "Examples: \n" + rest == expected
    assert head.endswith("(with answers) about anatomy.\n\n")
    shifted = {"college_medicine", "econometrics", "high_school_computer_science", "nutrition"}
    for sample, row in zip(samples, scope_rows("lg_mmlu"), strict=True):
        assert sample.cluster == row["task"] and sample.target == row["answers"]
        if row["task"] not in shifted:
            asked = re.split(r"Question_\d+:\n", sample.segments[-1].text)[1:]
            there = [q.replace(") nan(", ") None(").split() for q in row["questions"]]
            assert [a.split() for a in asked] == there


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.shared
@pytest.mark.parametrize("name", NAMES)
def test_a_shot_is_two_stretches(shared: str, name: str) -> None:
    task = load_task(name)
    sample = all_samples(task, shared)[0]
    runs = [(s.region, s.shot) for s in sample.segments]
    n = task.shots
    assert runs == [("system", -1), *(2 * [("shot", i) for i in range(n)]), ("question", -1)]
    for i in range(n):
        question, answer = (s.text for s in sample.segments if s.shot == i)
        assert question.startswith(f"Question_{i + 1}:") and answer.startswith(f"Answer_{i + 1}:\n")


@pytest.mark.shared
@pytest.mark.parametrize("tokenizer", ["gpt2", "TinyLlama-1.1B-Chat-v1.0", "Qwen2.5-0.5B-Instruct", "Qwen3-8B"])
def test_the_spans_of_a_shot_give_back_its_question_and_answer(shared: str, tokenizer: str) -> None:
    """Round trip through a real tokenizer: the tokens of shot i decode to its two texts and nothing else."""
    from transformers import AutoTokenizer

    from kvcli.models.prompt import build_prompt

    loaded = AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / tokenizer))
    for name in NAMES:
        task = load_task(name)
        (sample,) = task.samples(shots=task.shots, shot_seed=0, limit=1, data_dir=shared)
        prompt = build_prompt(sample, loaded, template="raw", max_new_tokens=0)
        for i in range(task.shots):
            spans = [(r.start, r.end) for r in prompt.regions if r.kind == "shot" and r.index == i]
            text = "".join(prompt.span_text(span) for span in spans)
            assert len(spans) == 2
            assert text.split() == "".join(s.text for s in sample.segments if s.shot == i).split()


@pytest.mark.shared
@pytest.mark.parametrize("name", NAMES)
def test_shot_order_changes_both_lists_and_the_numbers(shared: str, name: str) -> None:
    task = load_task(name)
    plain, other = (all_samples(task, shared, shot_order=order)[0] for order in (0, 3))

    def pairs(sample: Sample) -> list[tuple[str, ...]]:
        shots = [s for s in sample.segments if s.region == "shot"]
        texts = [tuple(re.sub(r"^\w+_\d+:", "", s.text) for s in shots if s.shot == i) for i in range(task.shots)]
        assert [s.text.partition(":")[0].split("_")[1] for s in shots] == 2 * [str(i + 1) for i in range(task.shots)]
        return texts

    assert pairs(plain) != pairs(other) and sorted(pairs(plain)) == sorted(pairs(other))
    assert plain.segments[-1] == other.segments[-1]


@pytest.mark.shared
def test_fewer_shots_move_the_numbers_and_none_leave_the_header_out(shared: str) -> None:
    two = all_samples(GSM8K, shared, shots=2)[0]
    assert two.meta["first"] == 3 and "Question_3:\nJanet" in two.segments[-1].text
    none = all_samples(GSM8K, shared, shots=0)[0]
    assert [s.region for s in none.segments] == ["system", "question"]
    assert none.segments[1].text.startswith("Question_1:\nJanet") and "Examples" not in none.text
    fifty = all_samples(GSM8K, shared, shots=50)[0]
    assert fifty.meta["first"] == 51 and "<<" not in "".join(s.text for s in fifty.segments[:-1])


@pytest.mark.shared
def test_order_by_length_sorts_within_a_generation(shared: str) -> None:
    (by_length,) = find_tasks(["lg_gsm8k:order=length,k=5,t=3"])
    plain, sorted_ = (all_samples(t, shared) for t in (find_tasks(["lg_gsm8k:k=5,t=3"])[0], by_length))
    for a, b in zip(plain, sorted_, strict=True):
        questions = [re.split(r"Question_\d+:\n", s.segments[-1].text)[1:] for s in (a, b)]
        questions = [[q.strip() for q in each] for each in questions]
        assert sorted(questions[0]) == sorted(questions[1]) and len(questions[1]) == 5
        lengths = [len(q) for q in questions[1]]
        assert lengths == sorted(lengths)
        assert dict(zip(questions[0], a.target, strict=True)) == dict(zip(questions[1], b.target, strict=True))


@pytest.mark.shared
@pytest.mark.parametrize("name", NAMES)
def test_gold_answers_score_1_and_nothing_scores_0(shared: str, name: str) -> None:
    task = load_task(name)
    samples = all_samples(task, shared)
    assert len(samples) == task.t and len({s.id for s in samples}) == task.t  # type: ignore[attr-defined]
    for sample in samples:
        good = task.score(sample, perfect(sample, name != "lg_gsm8k"))
        assert (good.value, good.extra["answered"]) == (1, 1)
        empty = task.score(sample, "")
        assert (empty.value, empty.extracted, empty.extra["answered"]) == (0, None, 0)
        assert set(empty.extra.values()) == {0.0}


@pytest.mark.shared
@pytest.mark.parametrize("name", NAMES)
def test_the_other_rules_see_gold_answers_too(shared: str, name: str) -> None:
    """Those of the official script and of SCOPE, where all right answers are plain numbers or letters."""
    task = load_task(name)
    plain = [s for s in all_samples(task, shared) if all(re.fullmatch(r"\d+|[A-E]", gold) for gold in s.target)]
    assert len(plain) > task.t / 3  # type: ignore[attr-defined]
    for sample in plain:
        extra = task.score(sample, perfect(sample, name != "lg_gsm8k")).extra
        assert set(extra.values()) == {1.0}


@pytest.mark.shared
def test_the_limit_takes_the_first_of_one_order(shared: str) -> None:
    ids = [[s.id for s in GSM8K.samples(shots=1, shot_seed=0, limit=n, data_dir=shared)] for n in (3, 20)]
    assert ids[1][:3] == ids[0] and sorted(map(int, ids[1])) == list(range(20))
    assert len({s.cluster for s in all_samples(GSM8K, shared, shots=1)}) == 20


def small(folder: Path, n: int, answer: str = "Six.\\n#### 6") -> Task:
    (folder / "gsm8k").mkdir()
    lines = [f'{{"question": "How many are {i}?", "answer": "{answer}"}}\n' for i in range(n)]
    (folder / "gsm8k" / "test.jsonl").write_text("".join(lines))
    (folder / "gsm8k" / "train.jsonl").write_text("".join(lines[:2]))
    return find_tasks(["lg_gsm8k:k=2,t=2"])[0]


def test_too_few_questions_say_how_many_there_are(tmp_path: Path) -> None:
    task = small(tmp_path, 3)
    with pytest.raises(KvcliError, match="has 3 questions: too few for generation 2 of 2 with 2 questions"):
        all_samples(task, str(tmp_path), shots=0)


def test_examples_without_a_file_come_from_train(tmp_path: Path) -> None:
    task = small(tmp_path, 4)
    (first, _) = all_samples(task, str(tmp_path), shots=1)
    assert re.search(r"Answer_1:\nSix\.\nThe answer is 6\.\n\nFollowing Question: \nQuestion_2:\nHow", first.text)
    with pytest.raises(KvcliError, match="lg_gsm8k has 2 examples"):
        all_samples(task, str(tmp_path), shots=3)


def test_examples_of_train_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small(tmp_path, 4)
    (said,) = task.remarks(shots=1, data_dir=str(tmp_path))
    file = tmp_path / "gsm8k" / "cot_8shot_exemplars.jsonl"
    assert said.startswith(f"{task.name}: exemplars come from the train split") and str(file) in said
    assert task.remarks(shots=0, data_dir=str(tmp_path)) == []
    file.write_text('{"question": "Why?", "target": "So. The answer is 1."}\n')
    assert task.remarks(shots=1, data_dir=str(tmp_path)) == []
    assert task.remarks(shots=2, data_dir=str(tmp_path)) != []
    (said,) = load_task("lg_csqa").remarks(shots=5, data_dir=None)
    assert "cot_5shot_exemplars.jsonl is looked for only in --data-dir" in said


def test_rows_of_the_hub_get_the_examples_of_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'kvcli[lm-eval]')")
    rows = [Row({"question": f"How many {i}?", "answer": f"Some.\n#### {i}"}, i, f"hub:{i}") for i in range(4)]
    monkeypatch.setattr(data, "load_hub", lambda *_: rows)
    (task,) = find_tasks(["lg_gsm8k:k=2,t=2"])
    sample = task.samples(shots=8, shot_seed=0, limit=1, data_dir=None)[0]
    assert task.remarks(shots=8, data_dir=None) == [] and len(set(sample.meta["examples"])) == 8
    assert all(re.search(r"\.\nThe answer is \d+\.$", text) for text in sample.meta["examples"])
    if DATA.is_dir():
        mine = GSM8K.samples(shots=8, shot_seed=0, limit=1, data_dir=str(DATA))[0]
        assert mine.meta["examples"] == sample.meta["examples"]


def test_a_row_without_its_mark_is_named(tmp_path: Path) -> None:
    task = small(tmp_path, 4, "Six.")
    with pytest.raises(KvcliError, match=r"test\.jsonl:1: no number behind '#### '"):
        all_samples(task, str(tmp_path), shots=0)


def test_settings_that_cannot_work_are_refused() -> None:
    for text in ("lg_gsm8k:k=0", "lg_csqa:rule=official", "lg_gsm8k:order=random"):
        with pytest.raises(KvcliError):
            find_tasks([text])


def test_answers_belong_to_their_numbers() -> None:
    """A skipped question costs itself, not all behind it."""
    output = "Answer_9:\n1\n\nAnswer_11:\n3\n\nQuestion_12:\nWhat?\nAnswer_12: 4 and\n\nmore 5"
    assert sections(output, 9, 5) == ["1", None, "3", "4 and\n\nmore 5", None]


WORKED = ["3 + 4 = 7.\nThe answer is 7.", "Two left.\nThe answer is 2."]
BARE = ["The answer is (B).", "The answer is (A)."]


def answers(texts: list[str], first: int = 1) -> str:
    return "\n\n".join(f"Answer_{first + i}:\n{text}" for i, text in enumerate(texts))


@pytest.mark.parametrize(
    ("output", "examples", "found"),
    [
        (answers(WORKED), WORKED, [None] * 4),
        (answers(WORKED[:1]), WORKED, [None] * 4),
        (answers([*WORKED, "5", "6"]), WORKED, ["5", "6", None, None]),
        (answers([WORKED[0], "something else", "5"]), WORKED, ["5", None, None, None]),
        (answers(["3 + 4 =  7. The answer is 7."]), WORKED, [None] * 4),
        (
            answers(["The answer is 7.", "The answer is 2."]),
            WORKED,
            ["The answer is 7.", "The answer is 2.", None, None],
        ),
        (answers(["1 + 1 = 2.\nThe answer is 2.", "5"]), WORKED, ["1 + 1 = 2.\nThe answer is 2.", "5", None, None]),
        (answers(BARE), BARE, [None] * 4),
        (answers([BARE[0], BARE[0], BARE[1]]), BARE, [BARE[0], BARE[0], BARE[1], None]),
        (answers([*BARE, *BARE]), [], [*BARE, *BARE]),
    ],
)
def test_copies_of_the_examples_answer_nothing(output: str, examples: list[str], found: list[str | None]) -> None:
    """Two examples, questions 3 to 6. Counted from 1, the examples' own answers would stand for them."""
    assert sections(output, 3, 4, examples) == found


def test_an_output_that_repeats_the_examples_scores_nothing(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    lines = [f'{{"question": "How many are {i}?", "answer": "It is {i}.\\n#### {i}"}}\n' for i in range(8)]
    for split in ("test", "train"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(lines))
    (task,) = find_tasks(["lg_gsm8k:k=4,t=2"])
    sample = task.samples(shots=2, shot_seed=0, limit=1, data_dir=str(tmp_path))[0]
    score = task.score(sample, answers(sample.meta["examples"]))
    assert (score.value, score.extracted, score.extra["answered"]) == (0, None, 0)
    right = task.score(sample, answers([f"So.\nThe answer is {gold}." for gold in sample.target]))
    assert right.value == 1, "counting from 1 is still read as such"


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("Answer_9: 5\nAnswer_10: 6", ["5", "6"]),
        ("**Answer_9:**\n5\n**Answer_10:**\n6", ["**\n5\n**", "**\n6"]),
        ("Answer 9:\n5\nAnswer 10:\n6", ["5", "6"]),
        ("Answer\\_9:\n5", ["5", None]),
        ("Answer_9:\n5\n\nAnswer_9:\n7", ["5", None]),
        ("Answer_1:\n5\n\nAnswer_2:\n6", ["5", "6"]),
        ("Answer_1:\n5\n\nAnswer_3:\n6", [None, None]),
        ("The Answer is 9: no", [None, None]),
        ("", [None, None]),
        ("gibberish 9 10", [None, None]),
        ("Answer_99999999999999999999:\n5", [None, None]),
    ],
)
def test_marks(output: str, found: list[str | None]) -> None:
    assert sections(output, 9, 2) == found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5.\nThe answer is 5.", "5"),
        ("The answer is $1,234.50.", "$1,234.50"),
        ("The answer is -7.", "-7"),
        ("So 23 - 15 = 8", "8"),
        ("She has 23-15", "15"),
        ("The answer is 5. Check: 2 + 3.", "5"),
        ("The answer is eight, from 4 and 4", "4"),
        ("the answer is: **18**", "18"),
        ("The answer is .5", ".5"),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: str | None) -> None:
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Let's think. The answer is (C).", "C"),
        ("The answer is C", "C"),
        ("the answer is: **B**", "B"),
        ("A dog. So (A) or (D)", "D"),
        ("B", "B"),
        ("(B)", "B"),
        ("A cyclic group", None),
        ("The answer is (E).", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(text: str, letter: str | None) -> None:
    assert letter_in(text, "ABCD") == letter


def test_numbers_are_equal_as_numbers() -> None:
    assert same_number("1,000", "1000") and same_number("$18.00", "18") and same_number(".5", "0.5")
    assert not same_number("-7", "7") and not same_number("18.5", "18")


def as_the_script_does(output: str, golds: list[str], pattern: str) -> tuple[int, int]:
    """(right, written) by the steps described in KVFUNDABENCH.md 9.3, through a file of blocks as the script has it."""
    text = "\n".join(output.split("Answer_"))
    answers = [m.group(1).strip() for m in re.finditer(r"(?<=:\n)(.*?)(?=\n\n|$)", text, re.S)]
    blocks = ""
    for i in range(min(len(golds), len(answers))):
        blocks += f"Question: q\nA_model:Q_{i}\n{answers[i]}\nA_gold:\n{golds[i]}\n\n"
    starts = ("Question:", "A_model:", "A_gold:")
    kind, parts = "", []
    for line in blocks.splitlines(keepends=True):
        kind = next((s for s in starts if line.startswith(s)), kind)
        parts.append((kind, line.startswith(starts), line))
    joined: list[tuple[str, str]] = []
    for kind, new, line in parts:
        if new:
            joined.append((kind, line))
        else:
            joined[-1] = (kind, joined[-1][1] + line)
    right = 0
    for _, group in groupby(enumerate(joined), key=lambda x: x[0] // 3):
        _, model, gold = (t for _, (_, t) in group)
        predicted = re.findall(pattern, model.replace(",", ""))
        right += bool(predicted) and predicted[-1] == re.findall(pattern, gold)[-1]
    return right, len(joined) // 3


CRAFTED = [
    "",
    "no marks at all",
    "Answer_9:\n2 + 3 = 5.\nThe answer is 5.\n\nAnswer_10:\nThe answer is 6.\n\nAnswer_11:\nThe answer is 1,000.",
    "Answer_9:\nThe answer is 5.\n\nAnswer_11:\nThe answer is 1000.",  # skipped: all behind it are misjudged
    "Answer_9: The answer is 5.\n\nAnswer_10: The answer is 6.",  # no line break behind the colon: unseen
    "Answer_9:\nno number here\n\nAnswer_10:\nThe answer is -6.",
    "Answer_9:\nSteps:\n1. two\n\n2. three\n\nAnswer_10:\nThe answer is 6.",  # a blank line inside an answer
    "Answer_9:\nThe answer is 5.\nAnswer_10:\nThe answer is 6.\nAnswer_11:\nThe answer is 7.",
    "Answer_9:\nThe answer is 5.0.\n\nAnswer_10:\nThe answer is 6.\n\nAnswer_11:\n0\n\nAnswer_12:\n3\n\nAnswer_13:\n1",
]


@pytest.mark.parametrize("output", CRAFTED)
def test_the_official_rule_of_gsm8k(output: str) -> None:
    golds = ["5", "6", "1,000", "3"]
    right, written = as_the_script_does(output, golds, r"\d*\.?\d+")
    assert official_gsm8k(output, golds) == (right / written if written else 0)


def test_the_official_rule_drops_the_unanswered_and_misjudges_commas() -> None:
    assert official_gsm8k(CRAFTED[3], ["5", "6", "1,000", "3"]) == 0.5
    assert official_gsm8k(CRAFTED[2], ["5", "6", "1,000", "3"]) == pytest.approx(2 / 3)
    assert official_gsm8k("Answer_9:\nno digits", ["0"]) == 1.0


@pytest.mark.parametrize(
    "output",
    [
        "",
        "Answer_6:\nThe answer is (B).\n\nAnswer_7:\nThe answer is (C).",
        "Answer_6:\nnothing said\n\nAnswer_7:\nC",
        "Answer_6:\nBecause Dogs bark.\n\nAnswer_7:\nThe answer is (C)",
    ],
)
def test_the_official_rule_of_mmlu(output: str) -> None:
    golds = ["A", "C", "D"]
    right, _ = as_the_script_does(output, golds, "A|B|C|D")
    assert official_mmlu(output, golds) == right / 3


def test_scope_s_rule_counts_all_questions_by_position() -> None:
    assert (
        scope("Answer_9:\nSo the answer is 5.\n\nAnswer_11:\nthe answer is 1000.", ["5", "6", "1000"], False) == 1 / 3
    )
    assert scope("Answer_6:\nThe answer is (B).\n\nAnswer_7: hm. The answer is (C).", ["B", "C"], True) == 1.0
    assert scope("Answer_6:\nThe answer\nis (B)", ["B"], True) == 0
    assert scope("", ["B"], True) == 0
