"""The tables on a screen: all stacked or none, and names whole where there is room."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcli.analysis.reading.load import load_run
from kvcli.analysis.tables.build import summarise
from tests.analysis.synthetic import TASKS, FakeMethod, Spec, build, terminal

METHODS = (FakeMethod("streaming_llm:sinks=4,rerotate=true", 1.0), FakeMethod("pyramidinfer", 0.5, floor=0.4))
NAMES = [method.name for method in METHODS]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list:
    """The second task has a ratio off target in every cell, so its columns are wider."""
    folder = tmp_path_factory.mktemp("view")
    wide = build(folder / "wide", Spec(TASKS[:1], METHODS, ("0.1", "0.3", "0.5")))
    narrow = build(folder / "narrow", Spec(TASKS[1:2], METHODS[:1], ("0.1",)))
    return [*summarise(load_run(Path(wide))), *summarise(load_run(Path(narrow)))]


def whole(text: str) -> int:
    return sum(line.split()[:1] == [NAMES[0]] for line in text.splitlines())


def stacked(text: str) -> list[bool]:
    """Per table: whether the line of its first method has a score alone."""
    return [
        not any("+" in word or "-" in word for word in line.split()[1:])
        for line in text.splitlines()
        if line.startswith(NAMES[0][:10])
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 200])
def test_tables_of_one_screen_are_drawn_alike(tables: list, width: int) -> None:
    text = terminal(tables, width)
    assert len(set(stacked(text))) == 1, text
    assert max(map(len, text.splitlines())) <= width


def test_wide_screens_need_no_stacking(tables: list) -> None:
    assert stacked(terminal(tables, 60))[0]
    assert not any(stacked(terminal(tables, 200)))


@pytest.mark.parametrize("width", range(60, 201, 4))
def test_names_are_folded_only_where_columns_need_the_room(tables: list, width: int) -> None:
    """The narrow table always has the room for its one column and the whole name."""
    text = terminal(tables[-1:], width)
    assert whole(text) == 1, text


@pytest.mark.parametrize("width", range(60, 121))
def test_short_names_are_never_folded(tmp_path_factory: pytest.TempPathFactory, width: int) -> None:
    """Each column takes its text, two spaces and one that rich puts between columns."""
    ratios = tuple(f"0.{n}" for n in range(1, 10))
    folder = build(tmp_path_factory.mktemp("short") / "run", Spec(TASKS[:1], METHODS[1:], ratios))
    lines = [line for line in terminal(summarise(load_run(folder)), width).splitlines() if line.startswith("pyramid")]
    assert lines and all(line.startswith("pyramidinfer ") for line in lines), lines
