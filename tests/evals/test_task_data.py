"""Rows from --data-dir and from the hub: order, exemplars, and one clear line for each kind of bad data."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcli import hub
from kvcli.errors import KvcliError
from kvcli.evals import data
from kvcli.evals.data import DataSet, first_of, split_file
from kvcli.evals.loader import find_tasks, load_task
from kvcli.evals.spec import Sample, Task

YAML = 'task: mine\ndoc_to_text: "Q: {{question}}\\nA:"\ndoc_to_target: answer\n'
ROWS = [{"question": f"q{i}?", "answer": f"a{i}", "subject": f"s{i % 2}"} for i in range(12)]


class Place:
    """A folder with a definition and its data set."""

    def __init__(self, root: Path) -> None:
        self.root, self.data_dir = root, str(root / "data")
        self.split("test", ROWS)

    def split(self, name: str, rows: list[Any], folder: str = "mine") -> Path:
        return self.text(name, "".join(json.dumps(row) + "\n" for row in rows), folder)

    def text(self, name: str, text: str | bytes, folder: str = "mine") -> Path:
        path = self.root / "data" / folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def task(self, extra: str = "", yaml: str = YAML) -> Task:
        (self.root / "mine.yaml").write_text(yaml + extra)
        return find_tasks([str(self.root / "mine.yaml")])[0]

    def samples(self, extra: str = "", shots: int = 0, seed: int = 0, limit: int | None = None) -> list[Sample]:
        return self.task(extra).samples(shots=shots, shot_seed=seed, limit=limit, data_dir=self.data_dir)

    def shots(self, extra: str, shots: int, seed: int = 0) -> list[str]:
        return [s.text[3:].split("?")[0] for s in self.samples(extra, shots, seed, 1)[0].segments[:-1]]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def fails(place: Place, what: str, extra: str = "", shots: int = 0) -> KvcliError:
    with pytest.raises(KvcliError, match=what) as caught:
        place.samples(extra, shots)
    assert caught.value.code == 2 and caught.value.fix and "\n" not in caught.value.what
    return caught.value


def test_limits_are_nested_and_fixed_by_the_name(place: Place) -> None:
    whole = [s.id for s in place.samples()]
    assert sorted(map(int, whole)) == list(range(12)) and whole != sorted(whole, key=int)
    assert [[s.id for s in place.samples(limit=n)] for n in (1, 5, 99)] == [whole[:1], whole[:5], whole]
    assert first_of("gsm8k", 1319, 3) == [610, 53, 384], "the order is part of the records: it must never change"
    with pytest.raises(KvcliError, match="at least 1"):
        place.samples(limit=0)


def test_text_and_cluster(place: Place) -> None:
    sample = next(s for s in place.samples('description: "Answer.\\n"\ncluster: subject\n') if s.id == "3")
    assert sample.text == "Answer.\nQ: q3?\nA:" and [s.region for s in sample.segments] == ["system", "question"]
    assert (sample.target, sample.cluster) == ("a3", "s1")


def test_exemplars_of_a_split_are_drawn_by_seed_and_nested(place: Place) -> None:
    place.split("train", [{"question": f"t{i}?", "answer": "x"} for i in range(9)])
    extra = "fewshot_split: train\n"
    eight = place.shots(extra, 8)
    assert len(set(eight)) == 8 and place.shots(extra, 3) == eight[:3] and place.shots(extra, 8, seed=1) != eight
    assert place.shots(extra + "fewshot_config: {sampler: first_n}\n", 3) == ["t0", "t1", "t2"]
    assert place.shots(extra + "fewshot_config: {sampler: first_n}\n", 3, seed=1) != ["t0", "t1", "t2"]
    assert "has 9 exemplars" in fails(place, "mine has 9 exemplars", extra, shots=10).what


def test_a_row_is_never_its_own_exemplar(place: Place) -> None:
    for sample in place.samples("fewshot_split: test\n", shots=11):
        shots = [s.text for s in sample.segments[:-1]]
        assert len(set(shots)) == 11 and not any(t.startswith(sample.segments[-1].text) for t in shots)
    fails(place, "mine has 12 exemplars in test", "fewshot_split: test\n", shots=12)


def test_exemplars_of_a_file_keep_their_order(place: Place) -> None:
    place.split("pool", [{"question": f"p{i}?", "answer": "x"} for i in range(4)])
    place.split("train", [{"question": f"t{i}?", "answer": "x"} for i in range(9)])
    extra = "fewshot_split: train\nfewshot_config: {file: pool.jsonl}\n"
    assert place.shots(extra, 4) == ["p0", "p1", "p2", "p3"] and place.shots(extra, 2) == ["p0", "p1"]
    other = place.shots(extra, 4, seed=2)
    assert sorted(other) == ["p0", "p1", "p2", "p3"] and other != sorted(other)
    assert {s[0] for s in place.shots(extra, 5)} == {"t"}, "more than the file has: all from the split"


def test_exemplars_written_in_the_definition(place: Place) -> None:
    extra = "fewshot_config: {samples: [{question: 'w0?', answer: x}, {question: 'w1?', answer: y}]}\n"
    assert place.shots(extra, 2) == ["w0", "w1"]
    fails(place, "mine has 2 exemplars", extra, shots=3)


def test_shots_without_a_source(place: Place) -> None:
    assert "--shots 0" in fails(place, "mine has no exemplars", shots=1).fix
    fails(place, "shots cannot be negative", shots=-1)
    fails(place, r"no split 'train' of task 'mine': no file .*train\.jsonl", "fewshot_split: train\n", shots=1)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"question": "q", "answ', "the line is cut off"),
        (b'{"question": "q" "answer": 1}', "not a JSON object"),
        (b'["q", "a"]', "a row must be a JSON object, not list"),
        (b'{"question": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"question": "q"}', "no field 'answer'"),
        (b'{"answer": "a"}', "no field 'question'"),
        (b'{"question": null, "answer": "a"}', "is null, not text"),
        (b'{"question": ["q"], "answer": "a"}', "is a list, not text"),
        (b'{"question": "q", "answer": null}', "the right answer is None"),
        (b'{"question": "q", "answer": " "}', "the right answer is ' '"),
        (b'{"question": "q", "answer": {"a": 1}}', "the right answer is {'a': 1}"),
        (b'{"question": "q", "answer": []}', "there is no right answer"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(place: Place, line: bytes, what: str) -> None:
    path = place.text("test", b'{"question": "q", "answer": "a"}\n\n' + line)
    assert fails(place, what).what.startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    "yaml", ["{{question.text}}", "{{question[5:] | upper}}{{ 1 // 0 }}", "{{question | int - []}}"]
)
def test_a_row_the_template_cannot_use(place: Place, yaml: str) -> None:
    path = place.text("test", '{"question": "q", "answer": "a"}\n')
    task = place.task(yaml=f'task: mine\ndoc_to_text: "{yaml}"\ndoc_to_target: answer\n')
    with pytest.raises(KvcliError) as caught:
        task.samples(shots=0, shot_seed=0, limit=None, data_dir=place.data_dir)
    assert caught.value.what.startswith(f"{path}:1: ") and "mine.yaml" in caught.value.fix


def test_templates_are_sandboxed(place: Place) -> None:
    task = place.task(yaml="task: mine\ndoc_to_text: \"{{ ''.__class__.__mro__ }}\"\ndoc_to_target: answer\n")
    with pytest.raises(KvcliError):
        task.samples(shots=0, shot_seed=0, limit=None, data_dir=place.data_dir)


def test_empty_split_and_missing_places(place: Place, tmp_path: Path) -> None:
    path = place.text("test", "\n\n")
    assert fails(place, "split 'test' is empty").what.startswith(str(path))
    path.unlink()
    fails(place, r"no split 'test' of task 'mine': no file .*mine/test\.jsonl")
    place.data_dir = str(tmp_path)
    assert "mine" in fails(place, "no rows for task 'mine'").fix
    place.data_dir = str(tmp_path / "gone")
    fails(place, "no folder .*gone")


def test_names_of_folders_and_files(place: Place) -> None:
    for folder, split in (("arc_challenge", "test"), ("mgsm", "en_test"), ("longbench", "qasper/test")):
        place.split(split.rpartition("/")[2], ROWS, f"{folder}/{split}".rpartition("/")[0])
    wanted = {
        DataSet("a", "allenai/ai2_arc", "ARC-Challenge"): "arc_challenge/test.jsonl",
        DataSet("b", "org/MGSM", "en"): "mgsm/en_test.jsonl",
        DataSet("c", "THUDM/LongBench", "qasper"): "longbench/qasper/test.jsonl",
    }
    for source, path in wanted.items():
        assert split_file(source, "test", place.data_dir) == Path(place.data_dir) / path


def test_byte_order_mark_and_windows_line_ends(place: Place) -> None:
    place.text("test", b'\xef\xbb\xbf{"question": "q", "answer": 7}\r\n{"question": "r", "answer": "a"}\r\n')
    assert sorted((s.segments[0].text, s.target) for s in place.samples()) == [("Q: q\nA:", "7"), ("Q: r\nA:", "a")]


def test_no_data_set_on_the_hub_and_no_folder(place: Place) -> None:
    with pytest.raises(KvcliError, match="names no data set on the hub") as caught:
        place.task().samples(shots=0, shot_seed=0, limit=None, data_dir=None)
    assert "--data-dir" in caught.value.fix


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A machine that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(20)
        kept: list[Any] = []

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


ASK = """
import sys
from kvcli import hub
from kvcli.errors import KvcliError
from kvcli.evals.loader import load_task
hub.SECONDS = float(sys.argv[1])
try:
    load_task("gsm8k").samples(shots=8, shot_seed=0, limit=1, data_dir=None)
except KvcliError as e:
    print(*e.lines(), sep="\\n")
    sys.exit(int(e.code))
"""


def ask_hub(endpoint: str, home: Path, seconds: float) -> tuple[str, float]:
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    env.pop("HF_HUB_OFFLINE", None)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(seconds)], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    return done.stdout, time.monotonic() - start


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_an_unreachable_hub_is_one_message(kind: str, silent_server: str, tmp_path: Path) -> None:
    endpoint = silent_server if kind == "silent" else "http://127.0.0.1:9"
    text, seconds = ask_hub(endpoint, tmp_path, 1.0)
    assert "the hub cannot be reached for data set openai/gsm8k (main)" in text and seconds < 20
    assert "--data-dir DIR with gsm8k/test.jsonl in it" in text


@pytest.mark.slow
def test_a_silent_hub_costs_at_most_20_seconds(silent_server: str, tmp_path: Path) -> None:
    assert ask_hub(silent_server, tmp_path, hub.SECONDS)[1] < 20


def test_the_cache_is_used_when_the_hub_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    seen: list[bool] = []

    def cached(source: DataSet, split: str) -> list[dict[str, str]]:
        seen.append(datasets.config.HF_HUB_OFFLINE)
        return [{"question": "q", "answer": "#### 4"}] * (1 if split == "test" else 9)

    monkeypatch.setattr(hub, "unreachable", lambda *source: "away")
    monkeypatch.setattr(data, "_load_dataset", cached)
    monkeypatch.setattr("kvcli.evals.harness.package.samples_of", lambda name: ([], "it is not installed"))
    before = datasets.config.HF_HUB_OFFLINE
    (sample,) = load_task("gsm8k").samples(shots=8, shot_seed=0, limit=5, data_dir=None)
    assert seen == [True, True] and datasets.config.HF_HUB_OFFLINE is before
    assert sample.target == "4" and len(sample.segments) == 9 and sample.meta["where"] == "openai/gsm8k/test row 1"


def test_harmful_rows_are_not_quoted_in_messages(place: Place) -> None:
    place.split("test", [{"question": "do the bad thing", "answer": {"do": "the bad thing"}}])
    error = fails(place, "the templates do not fit this row, whose text is not shown", "harmful: true\n")
    assert "bad thing" not in " ".join(error.lines())


@pytest.mark.parametrize(
    ("task", "path", "name", "splits"),
    [
        ("gsm8k", "openai/gsm8k", "main", ["test", "train"]),
        ("mmlu", "cais/mmlu", "all", ["test", "dev"]),
        ("mmlu_mc", "cais/mmlu", "all", ["test", "dev"]),
        ("commonsense_qa", "tau/commonsense_qa", None, ["validation", "train"]),
        ("commonsense_qa_mc", "tau/commonsense_qa", None, ["validation", "train"]),
        ("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", ["test", "validation"]),
        ("mgsm_en", "juletxara/mgsm", "en", ["test", "train"]),
        ("mgsm_zh", "juletxara/mgsm", "zh", ["test", "train"]),
    ],
)
def test_what_is_asked_of_the_hub(
    task: str, path: str, name: str | None, splits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row that suits all of them, in the hub's columns; splits are asked for as the hub names them."""
    row = {
        "question": "q?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": "#### 3", "answer_number": 3,
        "answerKey": "A",
    }  # fmt: skip
    if task.startswith("mmlu"):
        row["answer"] = 3
    if task.startswith(("arc", "common")):
        row["choices"] = {"text": ["v", "w", "x", "y", "z"], "label": list("ABCDE")}
    asked: list[tuple[str | None, str | None, str]] = []

    def load(source: DataSet, split: str) -> list[dict[str, Any]]:
        asked.append((source.path, source.name, split))
        return (
            [{**row, "answer": "Step-by-Step Answer: so 3"}] * 9
            if (split, path) == ("train", "juletxara/mgsm")
            else [row] * 60
        )

    monkeypatch.setattr(hub, "unreachable", lambda *source: "away")
    monkeypatch.setattr(data, "_load_dataset", load)
    shots = {"gsm8k": 50}.get(task, load_task(task).shots)
    samples = load_task(task).samples(shots=shots, shot_seed=0, limit=3, data_dir=None)
    assert asked == [(path, name, split) for split in splits] and len(samples) == 3
    assert sum(s.region == "shot" for s in samples[0].segments) == shots
