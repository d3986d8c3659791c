"""Requests of harmful tasks reach neither the terminal nor a file, whatever the command, unless they are asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli import sweeping

SECRET = "zanzibar"
"""Stands in every request; the model does not know the word, so no output holds it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    attacks = [
        {
            "format": "Logic",
            "jailbreak_query": f"Act as a pirate, {SECRET} {i}.",
            "redteam_query": f"the plain {SECRET} {i}",
        }
        for i in range(12)
    ]
    contrasts = [
        {"prompt": f"How do I {SECRET} {i}?", "type": "x", "focus": f"{i}", "label": ("safe", "unsafe")[i % 2]}
        for i in range(4)
    ]
    behaviours = [{"Index": i, "Goal": f"Describe {SECRET} {i}"} for i in range(3)]
    files = {"jailbreakv/mini_JailBreakV_28K": attacks, "xstest/train": contrasts, "jbb/harmful": behaviours,
             "jbb/benign": behaviours}  # fmt: skip
    for name, rows in files.items():
        path = place / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def sweep(data: Path, out: Path, *more: object) -> sweeping.Done:
    return sweeping.call(
        "sweep", "--model", "testbed", "--task", "jailbreakv,xstest,jbb", "--data-dir", data, "--method", "snapkv",
        "--ratio", "0.5", "--limit", "3", "--max-new-tokens", "6", "--out", out, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def hidden(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sweeping.Done]:
    out = tmp_path_factory.mktemp("hidden") / "run"
    done = sweep(data, out)
    assert done.code == 0, done.err
    return out, done


@pytest.fixture
def run(hidden: tuple[Path, sweeping.Done], tmp_path: Path) -> Path:
    return Path(shutil.copytree(hidden[0], tmp_path / "run"))


def holding(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_a_sweep_shows_and_stores_no_request(hidden: tuple[Path, sweeping.Done]) -> None:
    out, done = hidden
    assert SECRET not in done.out + done.err
    assert holding(out) == []


def test_requests_are_stored_where_that_is_asked_for(data: Path, tmp_path: Path, kvcli: Callable[..., Any]) -> None:
    done = sweep(data, tmp_path / "run", "--store-prompts")
    assert SECRET not in done.out + done.err
    assert holding(tmp_path / "run") == ["prompts.jsonl"]
    sample = json.loads(kvcli("show", tmp_path / "run", "--task", "jbb", "--json").out)[0]["sample"]
    assert SECRET in kvcli("show", tmp_path / "run", "--task", "jbb", "--sample", sample, "--json").out


@pytest.mark.parametrize("task", ["jailbreakv", "xstest", "jbb"])
def test_show_shows_outputs_and_no_request(run: Path, kvcli: Callable[..., Any], task: str) -> None:
    sample = json.loads(kvcli("show", run, "--task", task, "--json").out)[0]["sample"]
    for options in ((), ("--long",), ("--json",)):
        done = kvcli("show", run, "--task", task, "--sample", sample, *options)
        assert done.code == 0 and SECRET not in done.out + done.err
        assert "snapkv" in done.out
    assert "the prompt's text is not stored" in kvcli("show", run, "--task", task, "--sample", sample).err


@pytest.mark.parametrize(
    "words",
    [("show", "RUN"), ("show", "RUN", "--task", "jailbreakv"), ("status", "RUN"), ("check", "RUN"), ("rescore", "RUN"),
     ("report", "RUN"), ("report", "RUN", "--json"), ("plot", "RUN"), ("list", "tasks")],
)  # fmt: skip
def test_no_command_shows_a_request(
    run: Path, kvcli: Callable[..., Any], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCLI_DEBUG", "1")
    done = kvcli(*(str(run) if word == "RUN" else word for word in words))
    assert done.code in (0, 2) and SECRET not in done.out + done.err
    assert holding(run) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--max-prompt-tokens", "5"), "sample"), (("--shots", "40"), "too few rows"), (("--dry-run",), "cells")],
)
def test_refusals_and_dry_runs_show_no_request(data: Path, tmp_path: Path, options: Any, said: str) -> None:
    done = sweep(data, tmp_path / "run", *options)
    assert said in done.out + done.err
    assert SECRET not in done.out + done.err


def test_a_cut_line_of_the_data_is_named_without_its_text(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    path = copy / "jailbreakv" / "mini_JailBreakV_28K.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    done = sweep(copy, tmp_path / "run")
    assert done.code == 2 and "mini_JailBreakV_28K.jsonl:12: the line is cut off" in done.err
    assert SECRET not in done.out + done.err


def test_a_failed_sample_shows_no_request(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its message is stored and counted on the terminal."""
    from kvcli.evals import refusal

    def broken(text: str) -> None:
        raise ValueError("the judge is out of order")

    monkeypatch.setattr(refusal, "why_incoherent", broken)
    done = sweep(data, tmp_path / "run")
    assert done.code == 3 and "the judge is out of order" in done.err
    assert SECRET not in done.out + done.err
    assert holding(tmp_path / "run") == []
