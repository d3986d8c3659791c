"""longbench_*: official prompts in three regions, official metrics, rows from folders and from the hub's archive."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.loader import load_task, task_names
from kvcli.evals.longbench_metrics import METRICS, NEED_JIEBA, code_similarity, qa_f1
from kvcli.evals.rouge import rouge_l
from kvcli.evals.spec import Sample, Segment, Task

SHARED = Path(__file__).parents[3] / "shared" / "data" / "longbench"
LOCAL = (
    "2wikimqa", "gov_report", "hotpotqa", "multifieldqa_en", "multifieldqa_zh", "musique", "passage_count",
    "passage_retrieval_en", "passage_retrieval_zh", "qasper", "qmsum",
)  # fmt: skip
NAMES = [name for name in task_names() if name.startswith("longbench_")]


@pytest.fixture(scope="module")
def shared() -> str:
    if not SHARED.is_dir():
        pytest.skip(f"no real rows in {SHARED}")
    return str(SHARED.parent)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if x]


def task_of(name: str) -> Task:
    task = load_task(f"longbench_{name}")
    if task.metric in NEED_JIEBA:
        pytest.importorskip("jieba")
    return task


def samples(task: Task, data_dir: str | None, limit: int | None = None) -> list[Sample]:
    return task.samples(shots=0, shot_seed=0, limit=limit, data_dir=data_dir)


def test_all_21_data_sets_have_a_definition() -> None:
    assert len(NAMES) == 21
    raw = {name for name in NAMES if not load_task(name).chat}
    assert raw == {f"longbench_{n}" for n in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench_p")}
    lines = {name for name in NAMES if load_task(name).first_line}  # type: ignore[attr-defined]
    assert lines == {f"longbench_{n}" for n in ("trec", "triviaqa", "samsum", "lsht")}


@pytest.mark.shared
@pytest.mark.parametrize("name", LOCAL)
def test_the_prompt_is_the_official_one_in_three_regions(shared: str, name: str) -> None:
    """`prompt_format.format(**row)` of the official pred.py, of every row."""
    task = load_task(f"longbench_{name}")
    built, real = samples(task, shared), rows(name)
    assert sorted(int(s.id) for s in built) == list(range(len(real)))
    for sample in built:
        row = real[int(sample.id)]
        assert sample.text == task.prompt.format(**row)  # type: ignore[attr-defined]
        assert [s.region for s in sample.segments] == ["system", "context", "question"]
        assert sample.segments[1].text == row["context"] and sample.target == row["answers"]


@pytest.mark.shared
@pytest.mark.parametrize("name", LOCAL)
def test_gold_answers_score_1_and_nothing_scores_0(shared: str, name: str) -> None:
    task = task_of(name)
    for sample in samples(task, shared, 12):
        for gold in sample.target:
            good = task.score(sample, gold)
            assert good.value == pytest.approx(1, abs=1e-7) and good.extracted is not None
        for nothing in ("", "\n", " \n "):
            empty = task.score(sample, nothing)
            assert (empty.value, empty.extracted) == (0, None)


@pytest.mark.shared
def test_samples_of_one_document_are_one_cluster(shared: str) -> None:
    for name in ("qmsum", "passage_retrieval_zh"):
        built = samples(load_task(f"longbench_{name}"), shared)
        contexts = {s.segments[1].text: s.cluster for s in built}
        assert len(set(contexts.values())) == len(contexts)


def judge(metric: str, output: str, golds: list[str], classes: list[str] | None = None) -> float:
    return max(METRICS[metric](output, gold, classes or []) for gold in golds)


@pytest.mark.parametrize(
    ("metric", "output", "golds", "value"),
    [
        ("qa_f1", "The Dylan, Bob!", ["Bob Dylan"], 1),
        ("qa_f1", "It is Bob Dylan", ["Bob Dylan"], 2 / 3),
        ("qa_f1", "Bob", ["nobody", "Bob Dylan"], 2 / 3),
        ("qa_f1", "the", ["the"], 0),
        ("qa_f1", "no no no", ["no"], 0.5),
        ("count", "46", ["46"], 1),
        ("count", "46 or 47", ["46"], 0.5),
        ("count", "there are 4 6", ["46"], 0),
        ("count", "forty-six", ["46"], 0),
        ("retrieval", "Paragraph 19", ["Paragraph 19"], 1),
        ("retrieval", "19", ["Paragraph 19"], 1),
        ("retrieval", "Paragraph 1, or 19", ["Paragraph 19"], 0.5),
        ("retrieval", "Paragraph 190", ["Paragraph 19"], 0),
        ("retrieval_zh", "段落7", ["段落7"], 1),
        ("retrieval_zh", "第7段", ["段落7"], 1),
        ("code_similarity", "return x", ["return x"], 1),
        ("code_similarity", "\n```python\n# a comment\nreturn x\nmore", ["return x"], 1),
        ("code_similarity", "// all\n# comments", ["return x"], 0),
        ("code_similarity", "return y", ["return x"], 0.88),
        ("rouge", "a b c.", ["a b c."], 1),
        ("rouge", "...", ["a b c."], 0),
        ("rouge", "a x c", ["a b c"], 2 / 3),
    ],
)
def test_tricky_outputs(metric: str, output: str, golds: list[str], value: float) -> None:
    assert judge(metric, output, golds) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("output", "value"), [("City", 1), ("City or Animal", 0.5), ("an Animal", 0), ("city", 0), ("", 0)]
)
def test_classes_named_in_the_output(output: str, value: float) -> None:
    assert judge("classification", output, ["City"], ["City", "Animal", "Number"]) == value


def test_a_class_inside_the_right_one_does_not_count() -> None:
    """And the official loop skips the class behind the one it removes."""
    assert judge("classification", "Other City", ["Other City"], ["City", "Other City"]) == 1
    assert judge("classification", "abc", ["abc"], ["a", "b", "c", "abc"]) == 0.5


@pytest.mark.parametrize(("output", "value"), [("答案是厦门大学", 1 / 2), ("厦门大学。", 1), ("北京", 0), ("", 0)])
def test_chinese_words(output: str, value: float) -> None:
    pytest.importorskip("jieba")
    assert judge("qa_f1_zh", output, ["厦门大学。"]) == pytest.approx(value)


def sentence_soup(rng: random.Random, words: int) -> str:
    ends = [" ", " ", " ", " ", "  ", ". ", ".", "\n"]
    return "".join(rng.choice("abcdefgh") + rng.choice(ends) for _ in range(words))


def test_rouge_l_is_that_of_the_package() -> None:
    package = pytest.importorskip("rouge").Rouge(metrics=["rouge-l"])
    rng = random.Random(1)
    for _ in range(300):
        one, other = (sentence_soup(rng, rng.randrange(1, 40)) for _ in range(2))
        expected = package.get_scores([one], [other], avg=True)["rouge-l"]["f"]
        assert rouge_l(one, other) == pytest.approx(expected, abs=1e-12)


@pytest.mark.shared
def test_rouge_l_is_that_of_the_package_on_real_summaries(shared: str) -> None:
    package = pytest.importorskip("rouge").Rouge(metrics=["rouge-l"])
    golds = [row["answers"][0] for row in rows("gov_report")[:4]]
    for one in golds[:2]:
        for other in golds:
            expected = package.get_scores([one[:1500]], [other[:2500]], avg=True)["rouge-l"]["f"]
            assert rouge_l(one[:1500], other[:2500]) == pytest.approx(expected, abs=1e-12)


def test_similarity_is_that_of_fuzzywuzzy_s_formula() -> None:
    """Whole percent of twice the matched characters over all characters."""
    assert code_similarity("abcd", "abxd") == 0.75
    assert code_similarity("ab", "abc") == 0.8 and code_similarity("aab", "b") == 0.5
    assert code_similarity("x" * 7, "x" * 8) == 0.93


def test_only_the_first_line_counts_where_the_official_script_cuts() -> None:
    sample = Sample("0", (Segment("?", "question"),), ["Oslo"])
    assert load_task("longbench_triviaqa").score(sample, "\n\nOslo\nPassage: more").value == 1
    assert load_task("longbench_hotpotqa").score(sample, "Oslo\nPassage: more").value == pytest.approx(2 / 4)
    classes = Sample("0", (Segment("?", "question"),), ["City"], meta={"classes": ["City", "Animal"]})
    assert load_task("longbench_trec").score(classes, "City\nType: Animal").value == 1


def write(folder: Path, line: str) -> Task:
    (folder / "longbench").mkdir()
    (folder / "longbench" / "hotpotqa.jsonl").write_text(line + "\n")
    return load_task("longbench_hotpotqa")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "q", "answers": ["a"]}', "hotpotqa.jsonl:1: the field 'context' is 'None', not text"),
        ('{"input": "q", "context": "c", "answers": []}', "hotpotqa.jsonl:1: the field 'answers' is"),
        ('{"input": "q", "context": "c", "answers": "a"}', "hotpotqa.jsonl:1: the field 'answers' is a, not a list"),
        ('{"input": 3, "context": "c", "answers": ["a"]}', "hotpotqa.jsonl:1: the field 'input' is '3', not text"),
        ('{"input": "q", "context"', "hotpotqa.jsonl:1: .*JSON|cut off"),
        ("", "no split 'test'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(KvcliError, match=message):
        samples(write(tmp_path, line), str(tmp_path))


def test_braces_in_a_context_are_left_alone(tmp_path: Path) -> None:
    task = write(tmp_path, '{"input": "who {x}?", "context": "{input} {context} {}", "answers": ["a"]}')
    (sample,) = samples(task, str(tmp_path))
    assert sample.segments[1].text == "{input} {context} {}" and "Question: who {x}?\n" in sample.text


def test_shots_are_refused(tmp_path: Path) -> None:
    task = write(tmp_path, '{"input": "q", "context": "c", "answers": ["a"]}')
    with pytest.raises(KvcliError, match="has no exemplars"):
        task.samples(shots=2, shot_seed=0, limit=None, data_dir=str(tmp_path))


def test_a_missing_package_is_said_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    load_task("longbench_hotpotqa").check()
    with pytest.raises(KvcliError, match="the package jieba is needed"):
        load_task("longbench_multifieldqa_zh").check()


def test_rows_come_from_the_hub_s_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive as the hub has it: data/NAME.jsonl."""
    line = '{"input": "q", "context": "c\\u2028d", "answers": ["a"]}\n'
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/hotpotqa.jsonl", line + line)
    asked: list[tuple[Any, ...]] = []

    def download(*args: Any, **options: Any) -> str:
        asked.append((*args, options["repo_type"]))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr("kvcli.hub.unreachable", lambda *_: "")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    built = samples(load_task("longbench_hotpotqa"), None)
    assert asked == [("zai-org/LongBench", "data.zip", "dataset")]
    assert len(built) == 2 and built[0].segments[1].text == "c\u2028d"
    with pytest.raises(KvcliError, match=r"cannot be loaded: .*qasper"):
        samples(load_task("longbench_qasper"), None)


def test_a_hub_that_is_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("kvcli.hub.unreachable", lambda *_: "no route")
    with pytest.raises(
        KvcliError, match="the hub cannot be reached for data set zai-org/LongBench: no route"
    ) as caught:
        samples(load_task("longbench_hotpotqa"), None)
    assert "longbench/hotpotqa.jsonl" in caught.value.fix


def test_f1_of_repeated_words_counts_each_once_per_gold() -> None:
    assert qa_f1("paris paris", "Paris") == pytest.approx(2 / 3)
