from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcli.analysis.findings import Data
from kvcli.analysis.marked import Bullets, Grid, Paragraph, plain
from kvcli.analysis.reports.compare import compare_section
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
    return rows, " ".join(line for line in lines(first, second) if line.startswith("Not paired"))


def lines(first: Data, second: Data) -> list[str]:
    """What the terminal prints too."""
    part = compare_section(first, second)
    return [plain(text) for b in part.blocks if isinstance(b, Bullets) for text, _ in b.items]


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


def test_all_in_which_runs_differ_is_named_or_counted(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 90)
    _, refused = drawn(one, run(tmp_path / "two", 40, identity={"model": "other"}, version="2"))
    assert "model is m here and other there; the task's version is 1 here and 2 there: t" in refused
    unlike = {"model": "other", "revision": "2", "template": "none", "tokenizer": "new"}
    _, refused = drawn(one, run(tmp_path / "many", 40, identity=unlike, data="xyz"))
    assert "revision is 1 here and 2 there; tokenizer is own here and new there; and 2 more differences: t" in refused


def explained(first: Data, second: Data) -> str:
    part = compare_section(first, second)
    return " ".join(plain(b.text) for b in part.blocks if isinstance(b, Paragraph))


def test_the_family_of_paired_differences_is_counted_in_words(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 90)
    assert "the 2 paired differences are a family" in explained(one, run(tmp_path / "two", 40))
    assert "Nothing is paired" in explained(one, run(tmp_path / "three", 40, version="2"))
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "b", "0.2", right(40, 100))
    other = data_of(tmp_path / "four", lines, identity=SAME, tasks=tasks(t={"data": {"8": "abc"}}))
    assert "the one paired difference has a 95 % interval" in explained(one, other)


def test_shares_and_flags_stand_beside_every_score(tmp_path: Path) -> None:
    one = run(tmp_path / "one", 90)
    lines = cell("t", "full", "1", right(100, 100))
    lines += cell("t", "a", "0.2", right(40, 100), extracted=None, finish="length", flags=["fallback"])
    rows, _ = drawn(one, data_of(tmp_path / "two", lines, identity=SAME, tasks=tasks(t={"data": {"8": "abc"}})))
    assert "no answer 0 %" in rows[1][3] and "fallback" not in rows[1][3]
    assert "n = 100; no answer 100 %" in rows[1][4]
    assert "cut 100 %; fallback)" in rows[1][4]


def test_nothing_in_common_is_said(tmp_path: Path) -> None:
    other = data_of(tmp_path / "other", cell("u", "full", "1", right(3, 5)), identity=SAME)
    part = compare_section(run(tmp_path / "one", 90), other)
    assert "have no task" in plain(part.blocks[0].text)  # type: ignore[union-attr]


def test_verdicts_of_pairs_are_said_in_lines(tmp_path: Path) -> None:
    first = run(tmp_path / "one", 90)
    said = lines(first, run(tmp_path / "two", 40))
    assert said[0].startswith("one is ahead in 1 of 2 pairs: t a at 0.2 50.0 points [")
    assert said[1] == "Not established in 1 of 2 pairs."
    assert lines(run(tmp_path / "low", 40), run(tmp_path / "high", 90))[0].startswith("low is behind in 1 of 2 pairs")


def test_no_method_or_size_in_common_is_said_with_both_lists(tmp_path: Path) -> None:
    def with_method(name: str, ratio: str) -> Data:
        made = cell("t", "full", "1", right(100, 100)) + cell("t", name, ratio, right(40, 100))
        place = tmp_path / f"{name.replace(':', '-')}{ratio}"
        return data_of(place, made, identity=SAME, tasks=tasks(t={"data": {"8": "abc"}, "version": "1"}))

    first = run(tmp_path / "one", 90)
    assert "No method in common: a / snapkv:window=16." in lines(first, with_method("snapkv:window=16", "0.2"))
    assert "No size in common of a: 0.2 / 0.5." in lines(first, with_method("a", "0.5"))
    assert not any("in common" in line for line in lines(first, run(tmp_path / "two", 40)))
