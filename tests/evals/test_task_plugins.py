"""Tasks of other packages: installed beside kvcli, found by their entry point, used by name, never in kvcli's way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import KvcliError
from kvcli.evals import loader, packages
from kvcli.evals.spec import Sample, Score, Task

SAMPLE = Path(__file__).parents[1] / "task_plugin" / "sample"
YAML = "task: {0}\ndoc_to_text: question\ndoc_to_target: answer\nsuites: [theirs, testbed]\n"


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the sample package is installed, without the network."""
    place = tmp_path_factory.mktemp("tasks")
    shutil.copytree(SAMPLE, place / "source", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
         "--disable-pip-version-check", "--target", str(place / "site"), str(place / "source")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": str(place / "site"), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def kvcli(*args: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvcli", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def test_installed_tasks_are_listed_with_their_package(env: dict[str, str], tmp_path: Path) -> None:
    done = kvcli("list", "tasks", "--json", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert {"short_recall", "counting"} <= set(found)
    assert {found[name]["package"] for name in ("short_recall", "counting")} == {"kvcli-sample-tasks"}
    assert found["gsm8k"]["package"] is None
    shown = kvcli("list", "tasks", cwd=tmp_path, env=env)
    assert shown.returncode == 0 and "kvcli-sample-tasks" in shown.stdout


@pytest.mark.slow
def test_installed_tasks_are_swept_by_name_and_suite(env: dict[str, str], tmp_path: Path) -> None:
    args = ("--method", "random", "--ratio", "0.5", "--task", "short_recall,counting:step=2", "--limit", "2")
    done = kvcli("sweep", "--model", "testbed", *args, "--out", "run", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {r["task"] for r in records} == {"short_recall", "counting:step=2"}
    assert len(records) == 8 and all(r["status"] == "ok" for r in records)
    again = kvcli("sweep", "--model", "testbed", *args, "--out", "run", cwd=tmp_path, env=env)
    assert again.returncode == 0, "the same command resumes"
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 8


def test_without_the_package_its_names_are_unknown(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = kvcli("sweep", "--task", "short_recall", "--dry-run", cwd=tmp_path, env=env)
    assert done.returncode == 2 and "unknown task 'short_recall'" in done.stderr


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """installed({name: object}, ...): packages whose entry points give these objects."""

    def install(*offers: dict[str, Any]) -> None:
        points = [_point(name, value, f"package{i}") for i, offer in enumerate(offers) for name, value in offer.items()]
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == packages.GROUP else [])
        packages._read.cache_clear()

    yield install
    packages._read.cache_clear()


def _point(name: str, value: Any, package: str) -> Any:
    class Dist:
        def __init__(self) -> None:
            self.name, self.version = package, "1.0"

    class Point:
        dist = Dist()

        def __init__(self) -> None:
            self.name = name

        def load(self) -> Any:
            if isinstance(value, Exception):
                raise value
            return value

    return Point()


def folder(place: Path, *names: str) -> Path:
    place.mkdir(exist_ok=True)
    for name in names:
        (place / f"{name}.yaml").write_text(YAML.format(name))
    return place


def test_a_folder_a_path_and_a_function_offer_definitions(installed: Any, tmp_path: Path) -> None:
    one, two, three = (folder(tmp_path / n, f"mine_{n}") for n in ("a", "b", "c"))
    installed({"x": str(one), "y": two / "mine_b.yaml", "z": lambda: three})
    assert set(packages.offers()) == {"mine_a", "mine_b", "mine_c"} and packages.problems() == []
    (task,) = loader.find_tasks(["mine-a"])
    assert loader.text_of(task) == "mine_a" and loader.own_digest(task), "an edited package is another task"
    assert [t.name for t in loader.find_tasks(["mine_*", "theirs"])] == ["mine_a", "mine_b", "mine_c"]


def test_edited_code_of_a_package_makes_another_task(installed: Any, tmp_path: Path) -> None:
    place = folder(tmp_path / "a", "mine")
    digests = set()
    for text in (None, "", "X = 1\n"):
        if text is not None:
            (place / "__init__.py").write_text(text)
        installed({"x": place})
        digests.add(loader.load_task("mine").digest)
    assert len(digests) == 3


def test_kvcli_s_own_names_and_suites_stay_what_they_are(installed: Any, tmp_path: Path) -> None:
    before = loader.suites()["testbed"]
    installed({"x": folder(tmp_path / "a", "gsm8k", "mine")})
    (task,) = loader.find_tasks(["gsm8k"])
    assert Path(task.source).parent == loader.definitions_folder()
    assert loader.suites()["testbed"] == before and loader.suites()["theirs"] == ["mine"]


def test_of_two_packages_with_one_name_the_first_is_taken_and_the_other_named(installed: Any, tmp_path: Path) -> None:
    installed({"x": folder(tmp_path / "a", "mine")}, {"x": folder(tmp_path / "b", "mine", "other")})
    assert packages.offers()["mine"].package == "package0" and "other" in packages.offers()
    assert packages.problems() == ["task 'mine' of package package1 is left out: package0 has one of that name"]


@pytest.mark.parametrize(
    "value, what",
    [
        (ImportError("no module"), "ImportError: no module"),
        (int, "int is not a frozen dataclass"),
        (types, "TypeError: types is a module: name a package"),
        (42, "42 is neither a folder nor a class"),
        ("/nowhere", "no .yaml file in /nowhere"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_broken_package_is_named_and_leaves_the_others_usable(
    installed: Any, tmp_path: Path, value: Any, what: str
) -> None:
    installed({"x": value}, {"x": folder(tmp_path / "a", "mine")})
    assert loader.find_tasks(["mine"]) and loader.find_tasks(["gsm8k"])
    with pytest.raises(KvcliError, match="unknown task 'theirs_2'") as caught:
        loader.find_tasks(["theirs_2"])
    assert "package package0 cannot be read" in caught.value.fix and what in caught.value.fix


@dataclass(frozen=True)
class Bare(Task):
    """Its name has no default."""

    def samples(self, **_: Any) -> list[Sample]:
        return []

    def score(self, sample: Sample, output: str) -> Score:
        return Score(0.0, None)


@dataclass(frozen=True)
class Whole(Bare):
    name: str = "whole"
    version: str = "1"
    ability: str = "nothing"
    metric: str = "accuracy"
    shots: int = 0
    max_new_tokens: int = 1


def test_a_class_is_offered_under_its_own_name(installed: Any) -> None:
    installed({"whole": lambda: Whole, "other": Whole, "bare": Bare})
    (task,) = loader.find_tasks(["whole"])
    assert task.name == "whole" and Path(task.source) == Path(__file__) and loader.own_digest(task)
    with pytest.raises(KvcliError, match="the name of Whole is 'whole', its entry point's 'other'"):
        loader.find_tasks(["other"])
    with pytest.raises(KvcliError, match=r"package0: Bare cannot be made: .*missing") as caught:
        loader.find_tasks(["bare"])
    assert caught.value.fix == "every field of the class needs a default"


def test_a_definition_whose_name_is_not_its_file_s(installed: Any, tmp_path: Path) -> None:
    (folder(tmp_path / "a") / "mine.yaml").write_text(YAML.format("other"))
    installed({"x": tmp_path / "a"})
    with pytest.raises(KvcliError, match="'task: other' is not the file's name"):
        loader.find_tasks(["mine"])


def test_a_user_s_file_cannot_take_a_package_s_name(installed: Any, tmp_path: Path) -> None:
    installed({"x": folder(tmp_path / "a", "mine")})
    path = folder(tmp_path / "b", "mine") / "mine.yaml"
    with pytest.raises(KvcliError, match="the name 'mine' is taken by package package0"):
        loader.find_tasks([str(path)])
