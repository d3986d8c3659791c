from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcli.analysis.marked import Grid, plain
from kvcli.analysis.ranking import rank, ranking_section
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
    task, asked, highest, behind, beside = found[0]
    assert (task, asked, highest) == ("t", "0.2", "best 0.95")
    assert behind.startswith("bad 65.0 [")
    assert beside == "near (other bytes or over budget, so not compared: wide)"


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
