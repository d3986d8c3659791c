"""Finding tasks and reading definitions: names, suites, globs, files, and every way a definition can be wrong."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from kvcli.errors import KvcliError
from kvcli.evals import folder
from kvcli.evals.loader import find_tasks, load_task, suites, task_names

TESTBED = ["tb_arithmetic", "tb_choice", "tb_code", "tb_knowledge", "tb_longgen", "tb_needle", "tb_recall", "tb_safety"]
GOOD = "task: mine\ndoc_to_text: question\ndoc_to_target: answer\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def names(*texts: str) -> list[str]:
    return [task.name for task in find_tasks(texts)]


def test_names_suites_globs_and_lists() -> None:
    assert names("gsm8k") == ["gsm8k"] and names("tb-recall") == ["tb_recall"]
    assert names("testbed") == TESTBED == suites()["testbed"]
    assert names("tb_c*") == ["tb_choice", "tb_code"]
    assert names("tb_code,gsm8k", "testbed")[:3] == ["tb_code", "gsm8k", "tb_arithmetic"]
    assert len(names("testbed", "tb_*", "tb_code")) == 8, "no repeats"
    assert {*TESTBED, "gsm8k"} <= set(task_names())


INDEXED = pytest.param("lm_eval:x", marks=pytest.mark.slow)
"""Reads the whole index of lm-eval."""


@pytest.mark.parametrize("text", ["gsm8", "tb_z*", "gsm8k,,tb_code", "", INDEXED, "./no.yaml", "[", "no.yaml"])
def test_unknown_tasks(text: str) -> None:
    with pytest.raises(KvcliError) as caught:
        find_tasks([text])
    assert caught.value.given == f"--task {text}" and caught.value.fix and caught.value.code == 2


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(KvcliError, match="unknown task 'gsm8'") as caught:
        find_tasks(["gsm8"])
    assert caught.value.fix.startswith("gsm8k ")


def test_a_task_of_lm_eval_without_that_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(KvcliError, match="lm-evaluation-harness is not installed") as caught:
        find_tasks(["lm_eval:no_such_task_1"])
    assert caught.value.fix == "pip install 'kvcli[lm-eval]'" and caught.value.code == 2
    assert caught.value.given == "--task lm_eval:no_such_task_1"


def test_every_shipped_definition_is_complete() -> None:
    for name in task_names():
        task = load_task(name)
        assert task.name == name and task.ability != "other" and task.max_new_tokens > 0 and len(task.digest) == 12
        assert Path(task.source).is_file()
        assert task.chance is not None or task.metric == "classification", "there the rows hold the number of classes"


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kvcli.evals.loader import find_tasks, suites; find_tasks(['gsm8k', 'testbed']); suites();"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'tasks') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_loading_code_by_path_leaves_sys_path_alone() -> None:
    before = list(sys.path)
    load_task("tb_code")
    assert sys.path == before and "tasks" not in sys.modules


def test_the_wheels_copy_is_used_where_there_is_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "kvcli"
    (package / "_tasks").mkdir(parents=True)
    (package.parent / "tasks").mkdir()
    for place in (package / "_tasks" / "mine.yaml", package.parent / "tasks" / "foreign.yaml"):
        place.write_text(GOOD)
    monkeypatch.setattr(folder.kvcli, "__file__", str(package / "__init__.py"))
    assert task_names() == ["mine"] and load_task("mine").name == "mine"


def test_a_checkout_comes_before_a_stale_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("kvcli/_tasks/old.yaml", "tasks/mine.yaml"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(GOOD)
    monkeypatch.setattr(folder.kvcli, "__file__", str(tmp_path / "kvcli" / "__init__.py"))
    assert task_names() == ["mine"]


def test_a_file_and_its_defaults(tmp_path: Path) -> None:
    (task,) = find_tasks([str(write(tmp_path, GOOD))])
    assert (task.name, task.version, task.ability, task.metric, task.shots) == ("mine", "1", "other", "exact_match", 0)
    assert (task.max_new_tokens, task.until, task.chat, task.harmful) == (256, ("\n\n",), True, False)


def test_facts_from_a_file(tmp_path: Path) -> None:
    text = GOOD + (
        "metadata: {version: 2.0}\nnum_fewshot: 3\nchance: 0.25\nharmful: true\nchat: false\nsuites: [a, b]\n"
        "reference: {llama3-8b: 0.79, qwen3-4b-base: {0: 0.5, 8: 1}}\ncluster: subject\n"
        "generation_kwargs: {until: [], max_gen_toks: 9, temperature: 0}\n"
        "metric_list: [{metric: accuracy, aggregation: mean, higher_is_better: true}]\n"
    )
    (task,) = find_tasks([str(write(tmp_path, text))])
    assert (task.version, task.shots, task.chance, task.harmful, task.chat) == ("2.0", 3, 0.25, True, False)
    assert (task.suites, task.until) == (("a", "b"), ())
    assert task.reference == {"llama3-8b": {3: 0.79}, "qwen3-4b-base": {0: 0.5, 8: 1.0}}
    assert (task.max_new_tokens, task.metric) == (9, "accuracy")


def test_an_edited_definition_is_another_task(tmp_path: Path) -> None:
    digests = {find_tasks([str(write(tmp_path, GOOD + extra))])[0].digest for extra in ("", "chance: 0\n")}
    code = "from kvcli.evals.spec import Score\ndef judge(output, answers):\n    return Score(0.0, None)\n"
    for extra in ("", "# edited\n"):
        (tmp_path / "judge.py").write_text(code + extra)
        digests.add(find_tasks([str(write(tmp_path, GOOD + "scorer: judge.py:judge\n"))])[0].digest)
    assert len(digests) == 4


FAULTS = {
    "sutes: [a]": (4, "unknown key 'sutes'", "suites"),
    "repeats: 2": (4, "unknown key 'repeats'", "remove it"),
    "num_fewshot: many": (4, "'num_fewshot' must be a whole number", "num_fewshot:"),
    "num_fewshot: true": (4, "'num_fewshot' must be a whole number", "num_fewshot:"),
    "num_fewshot: -1": (4, "'num_fewshot' cannot be negative", "0"),
    "chance: 3": (4, "'chance' must be between 0 and 1", "guessing"),
    "harmful: maybe": (4, "'harmful' must be true or false", "true or false"),
    "description: [a, b]": (4, "'description' must be text", "text"),
    "output_type: loglikelihood": (4, "'output_type' cannot be 'loglikelihood'", "generate_until"),
    "generation_kwargs: {do_sample: true}": (4, "'generation_kwargs.do_sample' cannot be True", "False"),
    "generation_kwargs: {max_gen_toks: 0}": (4, "max_gen_toks must be at least 1", "docs"),
    "generation_kwargs: {until: [{a: 1}]}": (4, r"'generation_kwargs.until\[0\]' must be text", "text"),
    "generation_kwargs: {untill: [a]}": (4, "unknown key 'generation_kwargs.untill'", "until"),
    "generation_kwargs: 5": (4, "'generation_kwargs' must be a mapping", "until"),
    "filter_list: [{filter: [{function: regex}]}]": (4, r"'filter_list\[0\].name' is missing", "name"),
    "filter_list: [{name: a, filter: [{function: upper}]}]": (4, "cannot be 'upper'", "regex or take_first"),
    "filter_list: [{name: a, filter: [{function: regex, regex_pattern: '('}]}]": (
        4,
        "not a regular expression",
        "docs",
    ),
    "metric_list: [{metric: acc}, {metric: f1}]": (4, "'metric_list' must have one entry", "docs"),
    "metric_list: []": (4, "'metric_list' is empty", "exact_match"),
    "metric_list: [{metric: wer, higher_is_better: false}]": (4, "a score of 1 is the best", "docs"),
    "scorer: bleu": (4, "'scorer: bleu' is not one of exact_match, contains", "docs"),
    "scorer: gone.py:judge": (None, "no file", "beside the definition"),
    "builder: gone.py:Task": (None, "no file", "beside the definition"),
    "builder: testbed.py:Exam": (2, "unknown key 'doc_to_text'", "remove it"),
    "builder: testbed.py:Nothing": (None, "no 'Nothing' in", "name"),
    "builder: testbed.py:segments": (4, "is not a task", "dataclass"),
    "cluster: '{{'": (4, "'cluster': not a template", "docs"),
    "task: other": (4, "'task' is written twice, first in line 1", "keep one"),
    "chance: [": (5, "is not YAML", "mend that line"),
}


@pytest.mark.parametrize("line", FAULTS)
def test_wrong_definitions_name_file_and_line(tmp_path: Path, line: str) -> None:
    number, what, fix = FAULTS[line]
    path = write(tmp_path, GOOD + line + "\n")
    with pytest.raises(KvcliError, match=what) as caught:
        find_tasks([str(path)])
    where = f"{path}:{number}" if number else str(path)
    assert caught.value.what.startswith(where) and fix in caught.value.fix and caught.value.code == 2


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("task: mine\ndoc_to_text: question\n", "'doc_to_target' is missing"),
        ("doc_to_text: question\ndoc_to_target: answer\n", "'task' is missing"),
        ("task: my task\ndoc_to_text: q\ndoc_to_target: a\n", "not a task name"),
        ("task: mine\ndoc_to_text: ''\ndoc_to_target: a\n", "'doc_to_text': it is empty"),
        ("task: mine\nbuilder: testbed.py:Exam\nfamily: poetry\n", "'family' cannot be 'poetry'"),
        ("task: mine\nbuilder: testbed.py:Exam\n", "'family' is missing"),
        ("task: mine\nbuilder: testbed.py:Exam\nfamily: code\nprompt_tokens: 2\n", "'prompt_tokens' must be at least"),
        ("- a\n", "is not a mapping"),
        ("", "is not a mapping"),
        ("task: gsm8k\ndoc_to_text: q\ndoc_to_target: a\n", "the name 'gsm8k' is taken"),
    ],
)
def test_definitions_that_lack_something(tmp_path: Path, text: str, what: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(KvcliError, match=what) as caught:
        find_tasks([str(path)])
    assert str(path) in caught.value.what and caught.value.fix


def test_a_builder_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    path = write(tmp_path, "task: mine\nbuilder: broken.py:Task\n")
    with pytest.raises(KvcliError, match=r"broken.py cannot be imported: ModuleNotFoundError"):
        find_tasks([str(path)])


def test_two_files_of_one_name(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(GOOD)
    with pytest.raises(KvcliError, match="the name 'mine' is taken by"):
        find_tasks([str(write(tmp_path, GOOD)), str(other)])


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("{llama3-8b: 79.45}", "'reference.llama3-8b.0' must be a score between 0 and 1, not 79.45"),
        ("{llama3-8b: high}", "'reference.llama3-8b.0' must be a score between 0 and 1, not 'high'"),
        ("{llama3-8b: {8: true}}", "'reference.llama3-8b.8' must be a score"),
        ("{llama3-8b: {few: 0.5}}", "'reference.llama3-8b': 'few' is not a number of shots"),
        ("{llama3-8b: {-1: 0.5}}", "-1 is not a number of shots"),
        ("0.5", "'reference' must be a mapping"),
    ],
)
def test_a_published_score_that_is_none_is_refused(tmp_path: Path, reference: str, said: str) -> None:
    with pytest.raises(KvcliError) as caught:
        find_tasks([str(write(tmp_path, f"{GOOD}reference: {reference}\n"))])
    line = len(GOOD.splitlines()) + 1
    assert said in caught.value.what and f".yaml:{line}: " in caught.value.what and caught.value.fix


def test_a_setting_of_shots_does_not_move_published_scores(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "num_fewshot: 3\nfewshot_split: train\nreference: {llama3-8b: 0.5}\n")
    (task,) = find_tasks([f"{path}:shots=1"])
    assert task.usual_shots == 1 and task.reference == {"llama3-8b": {3: 0.5}}
