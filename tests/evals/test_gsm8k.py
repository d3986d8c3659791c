"""gsm8k: prompts as lm-evaluation-harness gsm8k_cot builds them, and its two answer rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvcli.errors import KvcliError
from kvcli.evals import data
from kvcli.evals.data import Row
from kvcli.evals.harness import package
from kvcli.evals.loader import load_task
from kvcli.evals.spec import Sample, Segment

SHARED = Path(__file__).parents[3] / "shared" / "data"
TASK = load_task("gsm8k")


@pytest.fixture(scope="module")
def shared() -> str:
    if not (SHARED / "gsm8k").is_dir():
        pytest.skip(f"no real rows in {SHARED / 'gsm8k'}")
    return str(SHARED)


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (SHARED / "gsm8k" / f"{name}.jsonl").read_text().split("\n") if line]


def sample(shared: str, shots: int, seed: int = 0) -> Sample:
    return TASK.samples(shots=shots, shot_seed=seed, limit=1, data_dir=shared)[0]


def gold(answer: str) -> Sample:
    return Sample("0", (Segment("Q: ?\nA:", "question"),), answer)


@pytest.mark.shared
def test_the_prompt_is_lm_evaluation_harness_s(shared: str) -> None:
    """Text of `fewshot_context` with num_fewshot=8: question, ' ', target, blank line; at last the question."""
    built = sample(shared, 8)
    question = rows("test")[int(built.id)]["question"]
    block = "".join(f"Q: {r['question']}\nA: {r['target']}\n\n" for r in rows("cot_8shot_exemplars"))
    assert built.text == f"{block}Q: {question}\nA:"
    assert [(s.region, s.shot) for s in built.segments] == [("shot", i) for i in range(8)] + [("question", -1)]
    assert (TASK.until, TASK.shots, TASK.max_new_tokens) == (("Q:", "</s>", "<|im_end|>"), 8, 256)


@pytest.mark.shared
def test_fewer_shots_are_the_first_ones(shared: str) -> None:
    eight = [s.text for s in sample(shared, 8).segments[:-1]]
    for k in (0, 1, 2, 4, 6):
        assert [s.text for s in sample(shared, k).segments[:-1]] == eight[:k]
    other = [s.text for s in sample(shared, 8, seed=1).segments[:-1]]
    assert sorted(other) == sorted(eight) and other != eight
    assert [s.text for s in sample(shared, 4, seed=1).segments[:-1]] == other[:4]


def test_facts() -> None:
    published = TASK.reference["llama3.1-8b-instruct"]
    assert (published[8], published[1], published[50]) == (0.7945, 0.7149, 0.8235)
    assert TASK.reference["qwen3-4b-base"] == {8: 0.8779} and TASK.suites == ("kvfundabench",)
    assert (TASK.data.path, TASK.data.name) == ("openai/gsm8k", "main")  # type: ignore[attr-defined]


@pytest.mark.shared
def test_fifty_shots_come_from_train(shared: str) -> None:
    shots = [s.text for s in sample(shared, 50).segments[:-1]]
    questions = {r["question"] for r in rows("train")}
    assert len(set(shots)) == 50
    for text in shots:
        question, _, answer = text.removeprefix("Q: ").partition("\nA: ")
        assert question in questions and answer.endswith(".\n\n")
        assert not re.search("<<|>>|####", text) and "The answer is " in answer
    assert [s.text for s in sample(shared, 9).segments[:-1]] == shots[:9], "more than the file's 8: all from train"
    turned = TASK.samples(shots=50, shot_seed=0, limit=1, data_dir=shared, shot_order=2)[0].segments[:-1]
    assert sorted(s.text for s in turned) == sorted(shots) and [s.text for s in turned] != shots


@pytest.mark.shared
def test_every_gold_answer_scores_by_both_rules(shared: str) -> None:
    """Worked solutions of all 1,319 rows, in the form the exemplars teach; and the bare numbers."""
    samples = TASK.samples(shots=0, shot_seed=0, limit=None, data_dir=shared)
    assert len(samples) == 1319
    for s in samples:
        assert re.fullmatch(r"-?[\d,.]+", str(s.target))
        both = TASK.score(s, f" So we add. The answer is {s.target}.\n\n")
        assert both.value == 1 and both.extra == {"strict": 1.0, "flexible": 1.0}
        assert TASK.score(s, f" {s.target}").value == 1
        assert TASK.score(s, "").value == 0 and TASK.score(s, "").extracted is None


@pytest.mark.shared
def test_exemplars_drawn_from_train_score_as_right(shared: str) -> None:
    for s in sample(shared, 50).segments[:-1]:
        answer = s.text.partition("\nA:")[2]
        final = re.findall(r"The answer is (\S+)\.\n\n", answer)
        assert len(final) == 1 and TASK.score(gold(final[0]), answer).extra == {"strict": 1.0, "flexible": 1.0}


@pytest.mark.parametrize(
    ("output", "answer", "flexible", "strict", "extracted"),
    [
        (" 5 + 4 = 9. The answer is 9.", "9", 1, 1, "9."),
        (" The answer is 9", "9", 1, 1, "9"),
        (" The answer is 18", "18", 1, 1, "18"),
        (" The answer is 1,234.", "1234", 1, 1, "1,234."),
        (" The answer is 1234.", "1,234", 1, 1, "1234."),
        (" The answer is -7.", "-7", 1, 1, "-7."),
        (" The answer is $18.", "18", 1, 0, "$18."),
        (" the answer is 9.", "9", 1, 0, "9."),
        (" The answer is: 9", "9", 1, 0, "9"),
        (" **Answer: $9**", "9", 1, 0, "$9"),
        (r" \boxed{9}", "9", 1, 0, "9"),
        (" She has 9 dogs left.", "9", 1, 0, "9"),
        (" The answer is 9.\n\nQ: 3 dogs and 4?\nA: The answer is 7.", "9", 1, 1, "9."),
        (" The answer is 9.<|im_end|>\n12", "9", 1, 1, "9."),
        (" The answer is 9. But 2 of them", "9", 0, 1, "2"),
        (" The answer is 8. No: the answer is 9.", "9", 1, 0, "9."),
        (" The answer is 9.50.", "9.50", 1, 1, "9.50."),
        (" The answer is 9.0.", "9", 0, 0, "9.0."),
        (" The answer is 19.", "9", 0, 0, "19."),
        (" The answer is nine.", "9", 0, 0, None),
        (" 9 and so on ...", "9", 0, 0, "..."),
        ("9 9 9 9 9 9", "9", 1, 0, "9"),
        ("", "9", 0, 0, None),
        ("\n\n \n", "9", 0, 0, None),
        ("Q: 9", "9", 0, 0, None),
    ],
)
def test_tricky_outputs(output: str, answer: str, flexible: int, strict: int, extracted: str | None) -> None:
    """What lm-evaluation-harness makes of them; '9.0' and '...' are losses its rule really has."""
    score = TASK.score(gold(answer), output)
    assert (score.value, score.extracted) == (flexible, extracted)
    assert score.extra == {"flexible": float(flexible), "strict": float(strict)}


def test_without_the_exemplar_file_train_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"question": "How many?", "answer": "Two.\\n#### 2"}\n')
    answer = "He has 3*4=<<3*4=12>>12.\\nHe pays $<<12/2=6>>6.\\n#### 1,006 "
    (folder / "train.jsonl").write_text(f'{{"question": "What?", "answer": "{answer}"}}\n')
    (built,) = TASK.samples(shots=1, shot_seed=0, limit=None, data_dir=str(tmp_path))
    assert built.text == "Q: What?\nA: He has 3*4=12.\nHe pays $6.\nThe answer is 1,006.\n\nQ: How many?\nA:"
    with pytest.raises(KvcliError, match="gsm8k has 1 exemplars in train"):
        TASK.samples(shots=2, shot_seed=0, limit=None, data_dir=str(tmp_path))


WORKED = '{"question": "Why?", "target": "So. The answer is 1."}\n'


def test_exemplars_that_come_from_train_are_told_of(tmp_path: Path) -> None:
    """Which exemplars are meant, where they are not, and nothing where they are."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    (said,) = TASK.remarks(shots=1, data_dir=str(tmp_path))
    assert said.startswith("gsm8k: exemplars come from the train split, so the prompts are not those of lm-evaluation-")
    assert str(folder / "cot_8shot_exemplars.jsonl") in said
    assert TASK.remarks(shots=0, data_dir=str(tmp_path)) == []
    (folder / "cot_8shot_exemplars.jsonl").write_text(WORKED)
    assert TASK.remarks(shots=1, data_dir=str(tmp_path)) == []
    (said,) = TASK.remarks(shots=2, data_dir=str(tmp_path))
    assert said.endswith("cot_8shot_exemplars.jsonl has 1 for 2 shots")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as the hub gives them."""
    rows = [Row({"question": f"How many {i}?", "answer": f"Some.\n#### {i}"}, i, f"hub:{i}") for i in range(20)]
    monkeypatch.setattr(data, "load_hub", lambda *_: rows)


def test_rows_of_the_hub_get_the_exemplars_of_lm_eval(hub: None) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'kvcli[lm-eval]')")
    assert TASK.remarks(shots=8, data_dir=None) == []
    built = TASK.samples(shots=8, shot_seed=0, limit=1, data_dir=None)[0]
    texts = [s.text for s in built.segments[:-1]]
    assert len(set(texts)) == 8 and all(re.search(r"The answer is \d+\.\n\n$", text) for text in texts)
    assert not any("How many" in text and "####" in text for text in texts)
    if (SHARED / "gsm8k").is_dir():
        written = [f"Q: {r['question']}\nA: {r['target']}\n\n" for r in rows("cot_8shot_exemplars")]
        assert texts == written
    (said,) = TASK.remarks(shots=9, data_dir=None)
    assert said.endswith("lm-eval's gsm8k_cot has 8 for 9 shots")


def test_without_lm_eval_rows_of_the_hub_get_train_and_it_is_said(hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    package.samples_of.cache_clear()
    try:
        (said,) = TASK.remarks(shots=2, data_dir=None)
        built = TASK.samples(shots=2, shot_seed=0, limit=1, data_dir=None)[0]
    finally:
        package.samples_of.cache_clear()
    assert "pip install 'kvcli[lm-eval]'" in said and "train split" in said
    assert all(s.text.startswith("Q: How many") for s in built.segments)


def test_a_row_without_the_gold_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "How many?", "answer": "Two."}\n')
    with pytest.raises(KvcliError, match=r"test\.jsonl:1: .*no '#### ' in the field"):
        TASK.samples(shots=0, shot_seed=0, limit=None, data_dir=str(tmp_path))
