"""hotpotqa: LongBench's rows by default, HotpotQA's own on demand; its sentences are units that compete."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks, load_task
from kvcli.evals.spec import Sample, Task

SHARED = Path(__file__).parents[3] / "shared"
TASK = load_task("hotpotqa")


@pytest.fixture(scope="module")
def shared() -> str:
    if not (SHARED / "data" / "longbench" / "hotpotqa.jsonl").is_file():
        pytest.skip(f"no real rows in {SHARED / 'data' / 'longbench'}")
    return str(SHARED / "data")


def some(task: Task, data_dir: str, limit: int | None = None) -> list[Sample]:
    return task.samples(shots=0, shot_seed=0, limit=limit, data_dir=data_dir)


@pytest.mark.shared
def test_rows_and_prompt_are_longbench_s(shared: str) -> None:
    ours = {s.id: s.text for s in some(TASK, shared)}
    theirs = {s.id: s.text for s in some(load_task("longbench_hotpotqa"), shared)}
    assert ours == theirs and TASK.reference == {"llama3-8b": {0: 0.4555}}


@pytest.mark.shared
def test_gold_answers_score_1_and_nothing_scores_0(shared: str) -> None:
    for sample in some(TASK, shared):
        assert TASK.score(sample, sample.target[0]).value == 1
        assert (TASK.score(sample, "").value, TASK.score(sample, "").extracted) == (0, None)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gpt2", "TinyLlama-1.1B-Chat-v1.0", "Qwen2.5-0.5B-Instruct", "Qwen3-8B"])
def test_the_context_is_cut_into_its_sentences(shared: str, name: str) -> None:
    """Units tile the passages, end where sentences end, and are of a sentence's size."""
    from transformers import AutoTokenizer

    from kvcli.methods._units import _pieces
    from kvcli.models.prompt import build_prompt

    tokenizer = AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / name))
    sample = min(some(TASK, shared), key=lambda s: len(s.text))
    prompt = build_prompt(sample, tokenizer, template="raw", max_new_tokens=0)
    (context,) = [r for r in prompt.regions if r.kind == "context"]

    class Ctx:
        token_text = staticmethod(prompt.token_text)

    units = _pieces(Ctx(), (context.start, context.end))  # type: ignore[arg-type]
    assert units[0][0] == context.start and units[-1][1] == context.end
    assert all(a[1] == b[0] for a, b in pairwise(units))
    texts = [prompt.span_text(unit).strip() for unit in units]
    whole = [t for t in texts[:-1] if t.rstrip("\"')]")[-1:] in tuple(".!?")]
    stops = sum(sample.segments[1].text.count(mark) for mark in (". ", ".\n", "? ", "! "))
    assert len(whole) == len(texts) - 1
    assert 0.8 * stops < len(units) < 1.2 * stops + 2
    assert 10 < sum(b - a for a, b in units) / len(units) < 80


def write(folder: Path, row: dict[str, object]) -> Task:
    (folder / "hotpotqa").mkdir()
    (folder / "hotpotqa" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    return find_tasks(["hotpotqa:rows=distractor"])[0]


def test_its_own_rows_take_the_same_prompt(tmp_path: Path) -> None:
    context = {"title": ["Oslo", "Lima"], "sentences": [["Oslo is in Norway.", " It is cold."], ["Lima is in Peru."]]}
    task = write(tmp_path, {"question": "Which is colder?", "answer": "Oslo", "context": context})
    (sample,) = some(task, str(tmp_path))
    assert [s.region for s in sample.segments] == ["system", "context", "question"]
    expected = "Passage 1:\nOslo\nOslo is in Norway. It is cold.\n\nPassage 2:\nLima\nLima is in Peru."
    assert sample.segments[1].text == expected
    assert sample.text.endswith("\n\nQuestion: Which is colder?\nAnswer:") and sample.target == ["Oslo"]


def test_a_row_without_passages_is_named(tmp_path: Path) -> None:
    task = write(tmp_path, {"question": "?", "answer": "Oslo", "context": {"title": ["a"], "sentences": []}})
    with pytest.raises(KvcliError, match=r"validation\.jsonl:1: the field 'context' does not have"):
        some(task, str(tmp_path))
