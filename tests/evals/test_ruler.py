"""ruler_*: RULER's forms and metrics; lengths for real tokenizers; its official output of multikey_3."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks, load_task
from kvcli.evals.spec import Sample, Task

SHARED = Path(__file__).parents[3] / "shared"
GENERATED = [
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe",
]  # fmt: skip
TOKENS_TO_GENERATE = {"vt": 30, "cwe": 120, "fwe": 50}
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def text_words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def some(name: str, limit: int | None = 4, settings: str = "", **options: Any) -> tuple[Task, list[Sample]]:
    (task,) = find_tasks([f"ruler_{name}" + (f":{settings}" if settings else "")])
    given = {"shots": task.shots, "shot_seed": 0, "data_dir": None, "tokens": text_words, **options}
    return task, task.samples(limit=limit, **given)


def counting(name: str) -> Callable[[str], int]:
    from transformers import AutoTokenizer

    if not (SHARED / "tokenizers" / name).is_dir():
        pytest.skip(f"no tokenizer in {SHARED / 'tokenizers' / name}")
    tokenizer = AutoTokenizer.from_pretrained(str(SHARED / "tokenizers" / name))
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@pytest.mark.shared
@pytest.mark.parametrize("tokenizer", ["gpt2", "TinyLlama-1.1B-Chat-v1.0", "Qwen2.5-0.5B-Instruct", "Qwen3-8B"])
@pytest.mark.parametrize("name", GENERATED)
def test_prompt_and_answer_fill_the_length(name: str, tokenizer: str) -> None:
    """Never longer; shorter by less than two units of context: lines, words, or words in all their places."""
    tokens = counting(tokenizer)
    data_dir = str(SHARED / "data") if (SHARED / "data" / "ruler").is_dir() else None
    task, samples = some(name, 2, "length=2000", tokens=tokens, data_dir=data_dir)
    room = 2000 - TOKENS_TO_GENERATE.get(name, 128)
    assert task.max_new_tokens == TOKENS_TO_GENERATE.get(name, 128)
    for sample in samples:
        used = tokens(sample.text)
        unit = used / sample.meta["units"]
        assert room - 2 * unit - 6 <= used <= room


@pytest.mark.shared
def test_the_form_is_that_of_an_official_output() -> None:
    """multikey_3 of RULER as KVCache-Factory stores it: with as many needles the text is equal but for the UUIDs, and
    as long in tokens within 3 % (as random digits are)."""
    path = SHARED / "data" / "ruler" / "4096" / "niah_multikey_3.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    tokens = counting("Qwen2.5-0.5B-Instruct")
    rows = [json.loads(line) for line in path.read_text().split("\n")[:20]]
    _, samples = some("niah_multikey_3", 20, "length=6000", tokens=tokens)
    for row, sample in zip(rows, samples, strict=True):
        lines = row["input"].count("\n") - 1
        here = sample.segments[1].text.split("\n")
        needle = next(line for line in here if sample.target[0] in line)
        shortened = [*[line for line in here if line != needle][: lines - 1], needle]
        text = sample.segments[0].text + "\n".join(shortened) + sample.segments[2].text
        assert re.sub(UUID, "U", text) == re.sub(UUID, "U", row["input"])
        assert tokens(text) == pytest.approx(tokens(row["input"]), rel=0.03)
        assert len(row["outputs"]) == len(sample.target) == 1
        assert load_task("ruler_niah_multikey_3").score(sample, row["outputs"][0]).value == 0


@pytest.mark.shared
@pytest.mark.parametrize(
    ("kind", "name"),
    [("variable_tracking", "vt"), ("common_words_extraction", "cwe"), ("freq_words_extraction", "fwe")],
)
def test_the_words_around_the_context_are_the_official_ones(kind: str, name: str) -> None:
    path = SHARED / "data" / "ruler" / "task_templates.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    official = json.loads(path.read_text())[kind]
    _, (sample, *_) = some(name)
    head, _, tail = (official["template"] + official["answer_prefix"]).partition("{context}")
    texts = {s.region: s.text for s in sample.segments}
    value = (re.findall(r"assigned the value (\d+)", texts["question"]) or [""])[0]
    assert texts["system"] == head
    assert texts["question"] == tail.replace("{query}", value).replace("{num_v}", "5")


@pytest.mark.parametrize("name", GENERATED)
def test_gold_answers_score_1_and_nothing_scores_0(name: str) -> None:
    task, samples = some(name, 12)
    assert len({s.id for s in samples}) == 12 == len({s.text for s in samples})
    for sample in samples:
        assert task.score(sample, " " + ", ".join(sample.target).upper() + ".").value == 1
        assert (task.score(sample, "").value, task.score(sample, "\n").extracted) == (0, None)
        half = sample.target[: len(sample.target) // 2]
        if half:
            assert task.score(sample, " ".join(half)).value == pytest.approx(len(half) / len(sample.target))


@pytest.mark.parametrize("name", GENERATED)
def test_regions(name: str) -> None:
    task, (sample, *_) = some(name)
    kinds = [s.region for s in sample.segments]
    assert kinds == ["shot"] * task.shots + ["system", "context", "question"]
    assert task.shots == (1 if name in ("vt", "cwe") else 0)


@pytest.mark.parametrize("name", GENERATED)
def test_right_answers_do_not_depend_on_the_tokenizer_or_the_examples(name: str) -> None:
    _, there = some(name, 6)
    _, here = some(name, 6, tokens=None, settings="length=3000")
    assert [s.target for s in there] == [s.target for s in here] or name in ("cwe", "fwe")
    _, same = some(name, 6, tokens=None)
    assert [(s.id, s.target) for s in there] == [(s.id, s.target) for s in same]


@pytest.mark.parametrize(
    ("name", "needles", "asked", "value"),
    [
        ("niah_single_1", 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, UUID),
        ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multivalue", 4, 4, r"\d{7}"),
        ("niah_multiquery", 4, 4, r"\d{7}"),
    ],
)
def test_needles_in_noise_and_essays(name: str, needles: int, asked: int, value: str) -> None:
    _, samples = some(name)
    for sample in samples:
        kind = "uuids" if value == UUID else "numbers"
        found = re.findall(rf"One of the special magic {kind} for ([^.:]+) is: ({value})\.", sample.segments[1].text)
        assert len(found) == needles and len(sample.target) == asked
        question = sample.segments[2].text
        answered = [v for k, v in found if k in question.split("mentioned")[0]]
        assert sorted(answered) == sorted(sample.target)
        one = "A special magic" in sample.segments[0].text
        assert one == (asked == 1) and question.endswith(" is" if one else " are")


def test_the_words_of_one_and_of_several_needles() -> None:
    _, (one, *_) = some("niah_single_1")
    key = re.search(r"magic number for ([^.:?]+) mentioned", one.text)
    assert key is not None
    assert one.segments[0].text == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
    )
    assert one.segments[2].text == (
        f"\nWhat is the special magic number for {key[1]} mentioned in the provided text? "
        f"The special magic number for {key[1]} mentioned in the provided text is"
    )
    assert set(one.segments[1].text.split("\n")) - {NOISE} == {
        f"One of the special magic numbers for {key[1]} is: {one.target[0]}."
    }
    _, (four, *_) = some("niah_multiquery")
    assert re.search(
        r"\nWhat are all the special magic numbers for [^,]+, [^,]+, [^,]+, and [^,]+ mentioned in the provided "
        r"text\? The special magic numbers for .* mentioned in the provided text are\Z",
        four.text,
    )


def test_variables_can_be_tracked() -> None:
    """Following the assignments of the text gives the right answer; the example's own answer is right too."""
    _, samples = some("vt", 6)
    for sample in samples:
        example, *_, context, question = (s.text for s in sample.segments)
        value = re.findall(r"assigned the value (\d+)", question)[0]
        assert track(context, value) == set(sample.target) and len(sample.target) == 5
        shown = re.findall(r"assigned the value (\d+)", example)[0]
        body, _, answer = example.rpartition("they are: ")
        assert track(body, shown) == set(answer.split()) and example.endswith("\n\n")
        assert {len(name) for name in answer.split()} == {3} and question.endswith("they are: ")


def track(text: str, value: str) -> set[str]:
    known: dict[str, str] = {}
    for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", text):
        known[name] = number or known[other]
    return {name for name, v in known.items() if v == value}


def test_common_words_stand_30_times_and_others_3_times() -> None:
    for settings, times in (("", (30, 3)), ("length=2000", (6, 1))):
        _, samples = some("cwe", 3, settings)
        for sample in samples:
            listed = re.findall(r"(\d+)\. (.+?)(?= \d+\. |\Z)", sample.segments[-2].text)
            assert [int(n) for n, _ in listed] == list(range(1, len(listed) + 1))
            counts = Counter(word for _, word in listed)
            assert {w for w, _ in counts.most_common(10)} == set(sample.target)
            assert set(counts.values()) == set(times)
            answer = sample.segments[0].text.rpartition("list are: ")[2]
            assert len(re.findall(r"\d+\. \S+", answer)) == 10 and sample.segments[0].region == "shot"


def test_frequent_words_lead_behind_the_dots() -> None:
    for settings in ("", "length=700", "length=20000"):
        _, samples = some("fwe", 3, settings)
        for sample in samples:
            counts = Counter(sample.segments[1].text.split()).most_common(5)
            assert counts[0][0] == "..." and [w for w, _ in counts[1:4]] == sample.target
            assert len({n for _, n in counts}) == 5


def test_a_word_list_that_is_too_short_goes_on_with_made_up_words(tmp_path: Path) -> None:
    folder = tmp_path / "ruler" / "words"
    folder.mkdir(parents=True)
    for name in ("nounlist", "adjectivelist", "verblist"):
        (folder / f"{name}.txt").write_text("\n".join(f"{name}{i}" for i in range(20)))
    _, (sample, *_) = some("cwe", 2, "length=9000", data_dir=str(tmp_path))
    counts = Counter(re.findall(r"\d+\. (\S+)", sample.segments[-2].text))
    assert len(counts) > 60 and set(counts.values()) == {30, 3} and not sample.id.endswith("own")


def test_more_examples_and_their_order() -> None:
    _, (three, *_) = some("vt", 2, shots=3)
    _, (other, *_) = some("vt", 2, shots=3, shot_order=2)
    texts = [[s.text for s in sample.segments if s.region == "shot"] for sample in (three, other)]
    assert len(set(texts[0])) == 3 and texts[0] != texts[1] and sorted(texts[0]) == sorted(texts[1])
    with pytest.raises(KvcliError, match="has no exemplars"):
        some("niah_single_1", 1, shots=1)


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(KvcliError, match="no prompt and answer have as few as 150 tokens") as caught:
        some("vt", 1, "length=150")
    assert "ruler_vt:length=" in caught.value.fix


def test_own_words_and_texts_show_in_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    own = {name: some(name, 1)[1][0].id.endswith("-own") for name in GENERATED}
    assert {name for name, value in own.items() if not value} == {"niah_multikey_3", "vt", "fwe"}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    (folder / name).mkdir()
    (folder / name / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def squad(i: int, answers: list[str]) -> dict[str, Any]:
    context = f"The color of box {i} is shade{i}. " + "It stands here. " * 5
    found = {"text": answers, "answer_start": [0] * len(answers)}
    return {"id": str(i), "title": f"Box{i % 3}", "context": context, "question": f"Color of {i}?", "answers": found}


def test_documents_of_squad(tmp_path: Path) -> None:
    """Unanswerable questions are left out, the right paragraph is there, numbered like the others."""
    rows = [squad(i, [f"shade{i}", f"the shade{i}"] if i % 4 else []) for i in range(40)]
    task, samples = some("qa_1", None, "length=600", data_dir=write(tmp_path, "squad", rows))
    assert len(samples) == 500
    for sample in samples[:20]:
        documents = re.findall(r"Document (\d+):\n", sample.segments[1].text)
        assert [int(n) for n in documents] == list(range(1, len(documents) + 1))
        number = re.findall(r"Question: Color of (\d+)\? Answer:", sample.text)[0]
        assert int(number) % 4 and f"box {number} is shade{number}." in sample.segments[1].text
        assert task.score(sample, f"It is SHADE{number}").value == 1
        assert task.score(sample, "shade").value == 0 == task.score(sample, "").value


def test_a_paragraph_that_is_missing_is_named(tmp_path: Path) -> None:
    data_dir = write(tmp_path, "squad", [{"title": "a", "question": "?", "answers": {"text": ["b"]}}])
    with pytest.raises(KvcliError, match=r"validation\.jsonl:1: the field 'context' is 'None', not text"):
        some("qa_1", 1, data_dir=data_dir)


@pytest.mark.parametrize(
    ("name", "path", "folder", "folders"),
    [
        ("qa_1", "rajpurkar/squad_v2", "squad", "squad, squad_v2"),
        ("qa_2", "hotpotqa/hotpot_qa", "hotpotqa", "hotpotqa, hotpot_qa, distractor"),
    ],
)
def test_missing_rows_name_the_task_the_data_set_and_their_place(
    tmp_path: Path, name: str, path: str, folder: str, folders: str
) -> None:
    task, place = f"ruler_{name}", tmp_path / "data"
    for there, what in (
        (False, f"no folder {place}"),
        (True, f"no sub-folder {folders}"),
        (True, f"no file {place / folder / 'validation'}.jsonl"),
    ):
        if there:
            place.mkdir() if not place.exists() else (place / folder).mkdir()
        with pytest.raises(KvcliError) as caught:
            some(name, 1, data_dir=str(place))
        assert caught.value.what == f"{task} has no rows of {path}: {what}"
        assert caught.value.given.startswith(f"--task {task} --data-dir {place}")
        assert caught.value.fix == (
            f"put them, one a line, into {place / folder / 'validation'}.jsonl, or leave --data-dir out"
        )
    (place / folder / "validation.jsonl").touch()
    with pytest.raises(KvcliError, match="split 'validation' is empty") as caught:
        some(name, 1, data_dir=str(place))
    assert caught.value.given == f"--task {task}"
    with pytest.raises(KvcliError) as caught:  # the tests set HF_HUB_OFFLINE
        some(name, 1)
    assert caught.value.what.startswith(f"{task}: the hub cannot be reached for data set {path}")
    assert caught.value.given.startswith(f"--task {task}: {path}")
    assert caught.value.fix == f"--data-dir DIR with {folder}/validation.jsonl in it"


def test_documents_of_hotpotqa(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"Who is {i}?", "answer": f"name{i}",
            "context": {"title": [f"T{i}", f"U{i}"], "sentences": [[f"name{i} is {i}.", " Yes."], ["Other words."]]},
        }
        for i in range(12)
    ]  # fmt: skip
    task, samples = some("qa_2", 6, "length=300", data_dir=write(tmp_path, "hotpotqa", rows))
    for sample in samples:
        assert f"{sample.target[0]} is" in sample.segments[1].text
        assert "Document 1:\n" in sample.segments[1].text and task.score(sample, sample.target[0]).value == 1
