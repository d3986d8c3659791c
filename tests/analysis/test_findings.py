"""Each finding on data in which it holds, does not hold, is not established, and cannot be tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcli.analysis import findings
from kvcli.analysis.findings import Outcome
from tests.analysis.tables_of import cell, data_of, right, tasks

N = 300


def two_tasks(first: int, second: int, n: int = N, ratio: str = "0.1") -> list[dict[str, Any]]:
    lines = []
    for task, count in (("a", first), ("b", second)):
        lines += cell(task, "full", "1", right(n, n)) + cell(task, "m", ratio, right(count, n))
    return lines


@pytest.mark.parametrize(
    ("lines", "outcome"),
    [
        (two_tasks(N, 100), Outcome.HOLDS),
        (two_tasks(N - 1, N - 2), Outcome.NOT),
        (two_tasks(9, 7, 10), Outcome.OPEN),
        (two_tasks(N, 100, ratio="0.5"), Outcome.UNTESTED),
        (two_tasks(N, 100)[: 2 * N], Outcome.UNTESTED),
    ],
)
def test_task_dependent(tmp_path: Path, lines: list[dict[str, Any]], outcome: Outcome) -> None:
    assert findings.task_dependent(data_of(tmp_path, lines)).outcome is outcome


def test_task_dependent_counts_from_chance(tmp_path: Path) -> None:
    """0.25 of four options is nothing kept: two tasks that lose all do not differ."""
    lines = two_tasks(N // 4, 0)
    meta = tasks(a={"chance": 0.25}, b={"chance": 0.0})
    found = findings.task_dependent(data_of(tmp_path, lines, tasks=meta))
    assert found.outcome is not Outcome.HOLDS


def test_a_task_whose_full_is_at_chance_does_not_count(tmp_path: Path) -> None:
    found = findings.task_dependent(data_of(tmp_path, two_tasks(N, 100), tasks=tasks(a={"chance": 0.999}, b={})))
    assert found.outcome is Outcome.UNTESTED


def test_model_type_takes_two_models(tmp_path: Path) -> None:
    one = data_of(tmp_path / "a", two_tasks(N, 250))
    assert findings.model_type([one]).outcome is Outcome.UNTESTED
    other = data_of(tmp_path / "b", two_tasks(N, 90), model="other")
    found = findings.model_type([one, other])
    assert found.outcome is Outcome.HOLDS
    assert "1 of 2 shown" in found.said
    same = data_of(tmp_path / "c", two_tasks(N, 250), model="third")
    assert findings.model_type([one, same]).outcome is not Outcome.HOLDS


def shots(few: int, many: int, n: int = N) -> list[dict[str, Any]]:
    lines = []
    for number, count in ((1, few), (8, many)):
        lines += cell("t", "full", "1", right(n, n), shots=number) + cell(
            "t", "m", "0.1", right(count, n), shots=number
        )
    return lines


@pytest.mark.parametrize(
    ("few", "many", "n", "outcome"),
    [
        (60, 280, N, Outcome.HOLDS), (280, 60, N, Outcome.NOT), (8, 9, 12, Outcome.OPEN),
        (N - 1, N, N, Outcome.NOT),
    ],
)  # fmt: skip
def test_short_prompts(tmp_path: Path, few: int, many: int, n: int, outcome: Outcome) -> None:
    assert findings.short_prompts(data_of(tmp_path, shots(few, many, n))).outcome is outcome


def test_short_prompts_take_two_numbers_of_shots(tmp_path: Path) -> None:
    found = findings.short_prompts(data_of(tmp_path, two_tasks(N, 10)))
    assert found.outcome is Outcome.UNTESTED
    assert "--shots 1,8" in found.needs


def kinds(whole: int, tokens: int, *, whole_name: str, number: int = 50, task: str = "t") -> list[dict[str, Any]]:
    lines = cell(task, "full", "1", right(N, N), shots=number)
    lines += cell(task, whole_name, "0.1", right(whole, N), shots=number)
    for name in ("snapkv", "h2o"):
        lines += cell(task, name, "0.1", right(tokens, N), shots=number)
    return lines


def test_chunks_on_many_shots(tmp_path: Path) -> None:
    def outcome(name: str, lines: list[dict[str, Any]]) -> Outcome:
        return findings.chunks_on_many_shots(data_of(tmp_path / name, lines)).outcome

    assert outcome("holds", kinds(280, 200, whole_name="chunkkv:chunk=10")) is Outcome.HOLDS
    assert outcome("not", kinds(200, 280, whole_name="chunkkv")) is Outcome.NOT
    assert outcome("open", kinds(201, 200, whole_name="chunkkv")) is Outcome.OPEN
    assert outcome("few shots", kinds(280, 200, whole_name="chunkkv", number=8)) is Outcome.UNTESTED
    assert outcome("other", kinds(280, 200, whole_name="streaming_llm")) is Outcome.UNTESTED
    lines = kinds(280, 200, whole_name="chunkkv")
    for line in lines:
        line["measured_ratio"] = 0.12 if line["method"] == "chunkkv" else line["measured_ratio"]
    assert outcome("other bytes", lines) is Outcome.UNTESTED


def test_gain_and_loss(tmp_path: Path) -> None:
    def run(count: int, loss: Any) -> list[dict[str, Any]]:
        lines = []
        for i in range(count):
            name = f"t{i}"
            lines += cell(name, "full", "1", right(N - 40 * i, N), shots=0) + cell(name, "full", "1", right(N, N))
            lines += cell(name, "m", "0.1", right(loss(i), N))
        return lines

    grows = findings.gain_and_loss(data_of(tmp_path / "holds", run(6, lambda i: N - 30 * i)))
    assert grows.outcome is Outcome.HOLDS
    assert "tau over 6 tasks is +1.00, two-sided p = 0.003" in grows.said
    falls = findings.gain_and_loss(data_of(tmp_path / "not", run(6, lambda i: N - 200 + 30 * i)))
    assert falls.outcome is Outcome.NOT
    mixed = findings.gain_and_loss(data_of(tmp_path / "open", run(5, lambda i: N - 30 * ((i * 2) % 5))))
    assert mixed.outcome is Outcome.OPEN
    few = findings.gain_and_loss(data_of(tmp_path / "few", run(2, lambda i: N - 30 * i)))
    assert few.outcome is Outcome.UNTESTED
    assert "Here there are 2" in few.said


def test_long_generation(tmp_path: Path) -> None:
    def found(name: str, whole: int, tokens: int) -> findings.Finding:
        lines = kinds(whole, tokens, whole_name="shotkv", number=8, task="lg_x")
        return findings.long_generation(data_of(tmp_path / name, lines))

    assert found("holds", 200, 100).outcome is Outcome.HOLDS
    assert found("second not", 60, 100).outcome is Outcome.NOT
    assert found("first not", 299, 295).outcome is Outcome.NOT
    assert found("open", 101, 100).outcome is Outcome.OPEN
    assert findings.long_generation(data_of(tmp_path / "none", two_tasks(N, 3))).outcome is Outcome.UNTESTED


def test_all_six_are_there(tmp_path: Path) -> None:
    every = findings.findings([data_of(tmp_path, two_tasks(N, 100))])
    assert [f.number for f in every] == [1, 2, 3, 4, 5, 6]
    assert all(f.needs for f in every if f.outcome is Outcome.UNTESTED)


def test_under_no_difference_a_finding_rarely_holds(tmp_path: Path) -> None:
    """Two tasks of one true loss: finding 1 must hold in well under 5 % of runs."""
    random, holds = np.random.default_rng(1), 0
    for i in range(60):
        lines = []
        for task in ("a", "b"):
            lines += cell(task, "full", "1", random.random(120) < 0.9)  # type: ignore[arg-type]
            lines += cell(task, "m", "0.1", random.random(120) < 0.6)  # type: ignore[arg-type]
        holds += findings.task_dependent(data_of(tmp_path / str(i), lines)).outcome is Outcome.HOLDS
    assert holds <= 2
