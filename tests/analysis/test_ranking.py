from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcli.analysis.marked import Grid, plain
from kvcli.analysis.reports.ranking import rank, ranking_section
from tests.analysis.tables_of import cell, data_of, right, tasks


def rows(path: Path, lines: list[dict[str, Any]], **meta: Any) -> tuple[list[list[str]], str]:
    data = data_of(path, lines, **meta)
    part = ranking_section(rank(data.run, data.scores, data.tables), data.tables)
    if part is None:
        return [], ""
    grids = [b for b in part.blocks if isinstance(b, Grid)]
    texts = " ".join(
        plain(getattr(b, "text", "") or " ".join(t for t, _ in getattr(b, "items", ()))) for b in part.blocks
    )
    return [[plain(field) for field in row] for grid in grids for row in grid.rows], texts


FULL = cell("t", "full", "1", right(200, 200))


def test_behind_beside_and_other_bytes(tmp_path: Path) -> None:
    lines = FULL + cell("t", "best", "0.2", right(190, 200)) + cell("t", "near", "0.2", right(189, 200))
    lines += cell("t", "bad", "0.2", right(60, 200)) + cell("t", "wide", "0.2", right(200, 200), measured_ratio=0.3)
    found, _ = rows(tmp_path, lines)
    task, asked, highest, behind, seen, beside = found[0]
    assert (task, asked) == ("t", "0.2")
    assert highest.startswith("best 0.95 (no answer 0 %")
    assert behind.startswith("bad 65.0 [") and behind.endswith("] (adjusted p < 0.001)")
    assert seen == "none"
    assert beside == "near (not compared: wide, other bytes)"


def test_what_was_seen_behind_is_never_among_those_that_may_be_as_good(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(20, 20)) + cell("t", "best", "0.2", right(20, 20))
    for name, count in (("bad", 0), ("worse", 8), ("near", 20), ("some", 15)):
        lines += cell("t", name, "0.2", right(count, 20))
    (row,), texts = rows(tmp_path, lines)
    assert row[3].startswith("bad 100.0 [")
    assert row[4] == "some 25.0" or row[4] == "worse 60.0; some 25.0"
    assert row[5] == "near"
    assert "those seen behind it are not told apart from it by so few samples" in texts


def test_shares_and_flags_stand_beside_the_highest_score(tmp_path: Path) -> None:
    lines = FULL + cell("t", "a", "0.2", right(190, 200), finish="length", flags=["simulated"])
    lines += cell("t", "b", "0.2", right(60, 200), extracted=None, flags=["unreachable"])
    (row,), texts = rows(tmp_path, lines)
    assert row[2].startswith("a 0.95 (no answer 0 %") and row[2].endswith("cut 100 %; simulated)")
    assert row[3].startswith("b (unreachable) 65.0 [")
    assert "one pair" in texts and "all 1 pairs" not in texts
    assert row[3].endswith("] (p < 0.001)")


@pytest.mark.parametrize(("flag", "count", "compared"), [
    ("fallback", 200, False), ("noop", 101, False), ("fallback", 100, True), ("noop", 60, True),
])  # fmt: skip
def test_what_fell_back_or_did_nothing_in_most_samples_is_not_compared(
    tmp_path: Path, flag: str, count: int, compared: bool
) -> None:
    lines = FULL + cell("t", "a", "0.2", right(60, 200)) + cell("t", "b", "0.2", right(80, 200))
    lines += [line | {"flags": [flag] * (i < count)} for i, line in enumerate(cell("t", "c", "0.2", right(190, 200)))]
    (row,), _ = rows(tmp_path, lines)
    said = flag if count == 200 else f"{flag} in {count} of 200"
    if compared:
        assert row[2].startswith("c 0.95 (") and row[2].endswith(f"{said})")
    else:
        assert row[2].startswith("b 0.40")
        assert row[5].endswith(f"(not compared: c, {said})")


@pytest.mark.parametrize(("facts", "extracted"), [({"chance": 0.95}, "x"), ({}, None)])
def test_where_full_says_nothing_methods_are_not_ranked(
    tmp_path: Path, facts: dict[str, Any], extracted: str | None
) -> None:
    lines = cell("t", "full", "1", right(190, 200), extracted=extracted)
    lines += cell("t", "a", "0.2", right(60, 200)) + cell("t", "b", "0.2", right(170, 200))
    found, texts = rows(tmp_path, lines, tasks=tasks(t=facts))
    assert found == []
    assert "Not ranked: t: " in texts
    assert ("not clearly above chance" if facts else "100 % of full's outputs hold no answer") in texts


def test_cells_over_budget_are_not_ranked(tmp_path: Path) -> None:
    lines = FULL + cell("t", "a", "0.2", right(60, 200)) + cell("t", "b", "0.2", right(70, 200))
    lines += cell("t", "over", "0.2", right(200, 200), flags=["over_budget"])
    data = data_of(tmp_path / "b", lines)
    pairs = rank(data.run, data.scores, data.tables).pairs
    assert {(p.first.label, p.second.label) for p in pairs} == {("b", "a")}


def test_a_full_far_from_its_reference_refuses(tmp_path: Path) -> None:
    lines = FULL + cell("t", "a", "0.2", right(60, 200)) + cell("t", "b", "0.2", right(170, 200))
    assert rows(tmp_path / "with", lines, tasks=tasks(t={}))[0]
    found, texts = rows(tmp_path / "far", lines, tasks=tasks(t={"reference": {"testbed": 0.3}}))
    assert found == []
    assert "Not ranked: t: full scores 1.000" in texts
