"""`--task lm_eval:NAME`: which tasks there are, their prompts byte for byte, their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.loader import load_task
from tests.harness import reference
from tests.harness.reference import NO_HARNESS, write

pytest.importorskip("lm_eval", reason=NO_HARNESS)

from kvcli.evals.harness.task import HarnessTask
from kvcli.evals.harness.tasks import find

pytestmark = pytest.mark.slow  # lm-eval's own tasks are slow to build
LIMIT = 20


def one(name: str) -> HarnessTask:
    (task,) = find(name)
    return task


def asked(task: HarnessTask, data: Path | str, shots: int, **more: Any) -> list[Any]:
    return task.samples(**{"shots": shots, "shot_seed": 0, "limit": LIMIT, "data_dir": str(data), **more})


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "shots"),
    [
        ("gsm8k", 5), ("gsm8k", 0), ("gsm8k_cot", 8), ("mmlu_anatomy", 5), ("mmlu_anatomy", 0), ("arc_challenge", 0),
    ],
)  # fmt: skip
def test_prompts_are_lm_eval_s_byte_for_byte(name: str, shots: int, tmp_path: Path) -> None:
    """Against a run of lm-eval over all samples, in which its sampler goes on from sample to sample."""
    data = reference.first_rows(tmp_path)
    samples = asked(one(name), data, shots)
    own = reference.prompts(reference.own_task(name, shots, data, tmp_path))
    assert len(samples) == LIMIT and len({s.id for s in samples}) == LIMIT
    for sample in samples:
        assert sample.text == own[sample.id]
        shown = [s for s in sample.segments if s.region == "shot"]
        assert [s.shot for s in shown] == list(range(shots)) and sample.meta["spans"] == "shots"
        assert sample.segments[-1].region == "question"


@pytest.mark.shared
def test_options_are_lm_eval_s(tmp_path: Path) -> None:
    data = reference.shared("data")
    samples = asked(one("arc_challenge"), data, 0)
    task = reference.own_task("arc_challenge", 0, data, tmp_path)
    for sample in samples:
        requests = [i for i in task.instances if str(i.doc_id) == sample.id]
        assert list(sample.options) == [i.args[1] for i in requests]
        assert sample.target == task.doc_to_target(requests[0].doc)


@pytest.mark.shared
def test_kvcli_s_gsm8k_has_the_prompts_of_gsm8k_cot() -> None:
    """The same rows are asked under --limit, too, where names agree: gsm8k_cot has an order of its own."""
    data = reference.shared("data")
    own = {s.id: s.text for s in load_task("gsm8k").samples(shots=8, shot_seed=0, limit=None, data_dir=str(data))}
    for sample in asked(one("gsm8k_cot"), data, 8):
        assert own[sample.id] == sample.text


@pytest.mark.shared
def test_kvcli_s_mmlu_mc_has_the_prompts_and_options_of_mmlu() -> None:
    data = reference.shared("data")
    own = load_task("mmlu_mc").samples(shots=5, shot_seed=0, limit=None, data_dir=str(data))
    mine = {sample.text: (sample.options, sample.target) for sample in own}
    for subject in ("anatomy", "world_religions"):
        for sample in asked(one(f"mmlu_{subject}"), data, 5):
            assert mine[sample.text] == (sample.options, sample.target)


@pytest.mark.shared
def test_kvcli_s_arc_challenge_asks_as_lm_eval_does() -> None:
    """Without shots: with them its exemplars come from another split."""
    data = reference.shared("data")
    own = {
        s.id: (s.text, s.options, s.target)
        for s in load_task("arc_challenge").samples(shots=0, shot_seed=0, limit=LIMIT, data_dir=str(data))
    }
    assert own == {s.id: (s.text, s.options, s.target) for s in asked(one("arc_challenge"), data, 0)}


GSM8K = [{"question": f"How many are {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(40)]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write(tmp_path / "gsm8k" / "test.jsonl", GSM8K[:20])
    write(tmp_path / "gsm8k" / "train.jsonl", GSM8K[20:])
    rows = [
        {"question": f"Which is {i}?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": i % 4}
        for subject in ("anatomy", "virology")
        for i in range(6)
    ]
    write(tmp_path / "mmlu" / "test.jsonl", rows)
    write(tmp_path / "mmlu" / "dev.jsonl", rows)
    return tmp_path


def test_samples_are_nested_and_shots_stay(small: Path) -> None:
    task = one("gsm8k")
    many, few = asked(task, small, 3), asked(task, small, 3, limit=5)
    assert [(s.id, s.text) for s in few] == [(s.id, s.text) for s in many[:5]]
    other = asked(task, small, 3, shot_seed=7)
    assert [s.id for s in other] == [s.id for s in many] and [s.text for s in other] != [s.text for s in many]
    assert [s.text for s in asked(task, small, 3, shot_seed=1234)] == [s.text for s in many]


def test_shot_order_shuffles_the_same_shots(small: Path) -> None:
    task = one("gsm8k")
    for plain, moved in zip(asked(task, small, 4), asked(task, small, 4, shot_order=2), strict=True):
        texts = [[s.text for s in sample.segments] for sample in (plain, moved)]
        assert texts[0] != texts[1] and sorted(texts[0][:-1]) == sorted(texts[1][:-1]) and texts[0][-1] == texts[1][-1]
        assert [s.shot for s in moved.segments] == [0, 1, 2, 3, -1]


def test_a_subject_is_found_in_the_file_of_all(small: Path) -> None:
    samples = asked(one("mmlu_anatomy"), small, 2, limit=None)
    assert len(samples) == 6
    assert all("about anatomy" in s.segments[0].text and s.segments[0].region == "system" for s in samples)


def test_a_subject_without_rows_is_named_and_does_not_become_all_of_them(small: Path) -> None:
    path = small / "mmlu" / "test.jsonl"
    with pytest.raises(KvcliError, match="no row has the subject 'astronomy'") as caught:
        asked(one("mmlu_astronomy"), small, 0)
    assert str(path) in caught.value.what and str(small / "mmlu" / "astronomy" / "test.jsonl") in caught.value.fix
    own = [{"question": f"Why {i}?", "choices": ["a", "b", "c", "d"], "answer": 0} for i in range(3)]
    write(small / "mmlu" / "astronomy" / "test.jsonl", own)
    assert len(asked(one("mmlu_astronomy"), small, 0)) == 3
    assert len(asked(one("mmlu_anatomy"), small, 0, limit=None)) == 6


def test_gold_answers_score_1_empty_ones_0(small: Path) -> None:
    task = one("gsm8k")
    for sample in asked(task, small, 0):
        right = task.score(sample, f" {sample.target}")
        assert (right.value, right.extracted) == (1, sample.target.rpartition(" ")[2])
        assert right.extra == {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}
        assert (task.score(sample, "").value, task.score(sample, "").extracted) == (0, None)
        bare = task.score(sample, " " + sample.target.rpartition(" ")[2])
        assert bare.extra == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
        assert task.score(sample, f" {sample.target}\n\nQuestion: 3?\nAnswer: #### 3").value == 1


def test_another_filter_can_give_the_score(small: Path) -> None:
    from kvcli.evals.loader import find_tasks

    (task,) = find_tasks(["lm_eval:gsm8k:filter_name=flexible-extract"])
    (sample, *_) = task.samples(shots=0, shot_seed=0, limit=1, data_dir=str(small))
    assert task.score(sample, " so " + sample.target.rpartition(" ")[2]).value == 1
    (wrong,) = find_tasks(["lm_eval:gsm8k:filter_name=nothing"])
    with pytest.raises(KvcliError, match="no filter 'nothing'"):
        wrong.samples(shots=0, shot_seed=0, limit=1, data_dir=str(small))


def test_the_likeliest_option_is_chosen(small: Path) -> None:
    task = one("mmlu_anatomy")
    for sample in asked(task, small, 1):
        right = [-1.0 if i == sample.target else -2.0 for i in range(4)]
        assert (task.choose(sample, right).value, task.choose(sample, right).extracted) == (1, "ABCD"[sample.target])
        wrong = [-3.0 if i == sample.target else -2.0 for i in range(4)]
        assert task.choose(sample, wrong).value == 0


def test_groups_and_tags_are_their_tasks() -> None:
    names = [task.name for task in find("mmlu")]
    assert len(set(names)) == 57 and "lm_eval:mmlu_anatomy" in names
    assert {task.name for task in find("mmlu_stem")} < set(names)
    assert [task.name for task in find("ai2_arc")] == ["lm_eval:arc_challenge", "lm_eval:arc_easy"]
    for task in find("mmlu_stem")[:2]:
        assert one(task.source).digest == task.digest


def test_one_task_as_its_group_sets_it() -> None:
    """The name of a task that its group changes finds it with these changes; the plain name finds it without."""
    task = find("openllm")[0]
    assert (task.name, task.shots) == ("lm_eval:openllm/arc_challenge", 25)
    assert one(task.source).digest == task.digest != one(task.plain).digest


def test_a_task_s_own_file(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = (
        "task: gsm8k_mine\ndataset_path: gsm8k\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: 'Q {{question}}'\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: exact_match, "
        "aggregation: mean, higher_is_better: true}]\ngeneration_kwargs: {until: '.', max_new_tokens: 7}\n"
    )
    file.write_text(text)
    task = one(f"lm_eval:{file}")
    assert (task.shots, task.until, task.max_new_tokens, task.metric) == (0, (".",), 7, "exact_match")
    assert asked(task, small, 0)[0].text.startswith("Q How many")
    file.write_text(text.replace("'Q ", "'Question "))
    find.__globals__["_leaves"].cache_clear()
    assert one(f"lm_eval:{file}").digest != task.digest


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wikitext", "perplexity of whole texts"), ("lambada_openai", "the greedy answer"),
        ("humaneval", "without a sandbox"), ("squadv2", "Python class"), ("gsm8k_cot_self_consistency", "64 answers"),
        ("gsm8kk", "unknown task 'gsm8kk'"), ("./nowhere.yaml", "no file nowhere.yaml"),
        ("mmlu/gsm8k", "unknown task 'gsm8k'"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_with_a_reason(name: str, why: str) -> None:
    with pytest.raises(KvcliError, match=why) as e:
        find(name)
    assert e.value.fix and "lm_eval:" in e.value.given


def test_a_task_fixed_to_0_shots_takes_none(small: Path) -> None:
    with pytest.raises(KvcliError, match="fixed to 0 shots"):
        asked(one("gsm8k_cot_zeroshot"), small, 2)


def test_a_row_without_a_right_option_is_named(small: Path) -> None:
    rows = reference.lines(small / "mmlu" / "test.jsonl")
    write(small / "mmlu" / "test.jsonl", [{**row, "answer": 4 if i == 2 else 0} for i, row in enumerate(rows)])
    with pytest.raises(KvcliError, match="row 3: the right answer is none of the 4 options"):
        asked(one("mmlu_anatomy"), small, 0, limit=None)


def test_bad_data_is_named(small: Path) -> None:
    task = one("gsm8k")
    with pytest.raises(KvcliError, match="Sample larger than population"):
        asked(task, small, 21)
    (small / "gsm8k" / "test.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": ')
    with pytest.raises(KvcliError, match=r"test\.jsonl:2: the line is cut off"):
        asked(task, small, 0)
    write(small / "gsm8k" / "test.jsonl", [{"question": 3, "answer": "x"}, {"question": ["a"], "answer": "x"}])
    with pytest.raises(KvcliError, match=r"test\.jsonl: its rows do not make a table"):
        asked(task, small, 0)
    write(small / "gsm8k" / "test.jsonl", [{"text": "a", "answer": "b"}])
    with pytest.raises(KvcliError, match="'question' is undefined"):
        asked(task, small, 0)
    (small / "gsm8k" / "train.jsonl").unlink()
    write(small / "gsm8k" / "test.jsonl", GSM8K)
    with pytest.raises(KvcliError, match="no split 'train'"):
        asked(task, small, 2)
    with pytest.raises(KvcliError, match="no rows for task 'arc_easy'"):
        asked(one("arc_easy"), small, 0)
