from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcli.analysis.compare import compare_section
from kvcli.analysis.findings import Data
from kvcli.analysis.marked import Bullets, Grid, plain
from tests.analysis.tables_of import cell, data_of, right, tasks

SAME = {"model": "m", "revision": "1", "tokenizer": "own", "template": "auto"}


def run(
    path: Path, count: int, *, identity: dict[str, Any] | None = None, data: str = "abc", version: str = "1"
) -> Data:
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "a", "0.2", right(count, 100))
    meta = tasks(t={"data": {"8": data}, "version": version})
    return data_of(path, lines, identity={**SAME, **(identity or {})}, tasks=meta)


def drawn(first: Data, second: Data) -> tuple[list[list[str]], str]:
    part = compare_section(first, second)
    rows = [[plain(field) for field in row] for b in part.blocks if isinstance(b, Grid) for row in b.rows]
    return rows, " ".join(plain(text) for b in part.blocks if isinstance(b, Bullets) for text, _ in b.items)


def test_the_same_prompts_are_paired(tmp_path: Path) -> None:
    rows, refused = drawn(run(tmp_path / "one", 90), run(tmp_path / "two", 40))
    assert refused == ""
    assert [row[:3] for row in rows] == [["t", "full", "full"], ["t", "a", "0.2"]]
    assert rows[0][-1] == "not established"
    assert rows[1][-2].startswith("+50.0 [")
    assert rows[1][-1] == "one is ahead"
    assert drawn(run(tmp_path / "low", 40), run(tmp_path / "high", 90))[0][1][-1] == "low is behind"


def test_samples_are_paired_by_name_not_by_place(tmp_path: Path) -> None:
    first = run(tmp_path / "one", 90)
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "a", "0.2", right(90, 100))
    meta = tasks(t={"data": {"8": "abc"}})
    fewer = data_of(tmp_path / "two", [x for x in lines if int(x["sample_id"][2:]) >= 50], identity=SAME, tasks=meta)
    rows, _ = drawn(first, fewer)
    assert rows[1][-2].startswith("+0.0 [")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"identity": {"model": "other"}}, "model is m here and other there"),
        ({"identity": {"template": "none"}}, "template is auto here and none there"),
        ({"data": "xyz"}, "the first prompt is another one"),
        ({"version": "2"}, "the task's version is 1 here and 2 there"),
    ],
)
def test_what_differs_is_not_paired_and_said(tmp_path: Path, facts: dict[str, Any], reason: str) -> None:
    rows, refused = drawn(run(tmp_path / "one", 90), run(tmp_path / "two", 40, **facts))
    assert reason in refused
    assert [row[-1] for row in rows] == ["side by side", "side by side"]
    assert [row[-2] for row in rows] == ["", ""]
    assert rows[1][5].startswith("-10.0 [") and rows[1][6].startswith("-60.0 [")


def test_nothing_in_common_is_said(tmp_path: Path) -> None:
    other = data_of(tmp_path / "other", cell("u", "full", "1", right(3, 5)), identity=SAME)
    part = compare_section(run(tmp_path / "one", 90), other)
    assert "have no task" in plain(part.blocks[0].text)  # type: ignore[union-attr]
