"""Methods of other packages: installed beside kvcli, found by their entry point, used by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parent / "sample"


def install(package: Path, where: Path) -> dict[str, str]:
    """Installs without the network; returns the environment in which it is found."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
         "--disable-pip-version-check", "--target", str(where), str(package)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": str(where), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def kvcli(*args: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvcli", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("plugin")
    copy = place / "source"  # building leaves files beside the source
    copy.mkdir()
    for file in SAMPLE.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            target = copy / file.relative_to(SAMPLE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return install(copy, place / "site")


def test_an_installed_method_is_listed_with_its_settings(env: dict[str, str], tmp_path: Path) -> None:
    done = kvcli("list", "methods", "--json", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    (card,) = (c for c in json.loads(done.stdout) if c["name"] == "every_other")
    assert card["title"] == "Every other" and [s["name"] for s in card["settings"]] == ["recent"]


@pytest.mark.slow
def test_an_installed_method_is_swept_by_its_name(env: dict[str, str], tmp_path: Path) -> None:
    args = ("--method", "every_other:recent=20,random", "--ratio", "0.2,1", "--task", "tb_recall", "--limit", "4")
    done = kvcli("sweep", *args, "--out", "run", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    mine = [r for r in records if r["method"] == "every_other:recent=20"]
    assert len(mine) == 8 and all(r["status"] == "ok" for r in mine)
    for record in mine:
        assert record["measured_ratio"] == pytest.approx(record["ratio"], abs=1 / record["n_prompt"])


def test_without_the_package_the_name_is_unknown(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = kvcli("sweep", "--method", "every_other", "--dry-run", cwd=tmp_path, env=env)
    assert done.returncode == 2 and "unknown method 'every_other'" in done.stderr


def test_a_wrong_setting_of_an_installed_method_is_refused(env: dict[str, str], tmp_path: Path) -> None:
    done = kvcli("sweep", "--method", "every_other:recent=0", "--dry-run", cwd=tmp_path, env=env)
    assert done.returncode == 2 and "recent=0" in done.stderr


@pytest.mark.slow
def test_what_new_method_writes_passes_its_own_test(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert kvcli("new-method", "my_method", cwd=tmp_path, env=env).returncode == 0
    again = kvcli("new-method", "my_method", cwd=tmp_path, env=env)
    assert again.returncode == 2 and "exists" in again.stderr
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_method.py"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert tested.returncode == 0 and "3 passed" in tested.stdout, tested.stdout


@pytest.mark.slow
def test_the_package_of_new_method_installs_and_is_found(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert kvcli("new-method", "my-method", "--package", cwd=tmp_path, env=env).returncode == 0
    found = install(tmp_path / "kvcli-my-method", tmp_path / "site")
    args = ("--method", "my_method", "--ratio", "0.3", "--task", "tb_recall", "--limit", "2", "--out", "run")
    done = kvcli("sweep", *args, cwd=tmp_path, env=found)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "words"), [
    ("Snap!", "no name for a method"), ("snapkv", "there is a method"), ("all", "there is a method"),
    ("class", "no name for a method"), ("tier1", "there is a method"),
])  # fmt: skip
def test_new_method_refuses_bad_names(name: str, words: str, tmp_path: Path) -> None:
    done = kvcli("new-method", name, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 2 and words in done.stderr and not list(tmp_path.iterdir())
