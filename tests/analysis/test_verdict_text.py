from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcli.analysis.judged import judge_tables
from kvcli.analysis.marked import Bullets, Paragraph, plain
from kvcli.analysis.verdict_text import verdict_section
from tests.analysis.tables_of import cell, data_of, right, tasks


def said(path: Path, lines: list[dict[str, Any]], margin: float = 0.02, **meta: Any) -> tuple[list[str], list[str]]:
    """Leads with the points under them, and the paragraphs."""
    data = data_of(path, lines, **meta)
    part = verdict_section(data.tables, judge_tables(data.run, data.tables, margin))
    bullets = [b for b in part.blocks if isinstance(b, Bullets)]
    items = [plain(text) for b in bullets for lead, under in b.items for text in (lead, *under)]
    return items, [plain(b.text) for b in part.blocks if isinstance(b, Paragraph)]


def test_a_loss_is_said_without_a_sign_and_with_its_interval(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "a", "0.2", right(70, 100))
    items, _ = said(tmp_path, lines)
    assert items[0].startswith("t (t, n = 100): loses 30.0 points [")
    assert items[0].endswith("at 0.2 with a.")
    low, high = items[0].split("[")[1].split("]")[0].split(", ")
    assert 0 < float(low) < 30 < float(high)


def test_many_samples_without_a_change_are_unchanged_and_few_are_not_established(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(900, 1000)) + cell("t", "a", "0.2", right(900, 1000))
    items, _ = said(tmp_path / "many", lines)
    assert items == ["t (t, n = 1000): unchanged within 2 points, wherever it was measured."]
    items, _ = said(tmp_path / "few", [line for line in lines if int(line["sample_id"][2:]) < 50])
    assert "not established (n too small: need about" in items[0]


def test_the_margin_decides(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(300, 300)) + cell("t", "a", "0.2", right(299, 300))
    assert "no loss beyond 10 points" in said(tmp_path / "a", lines, 0.1)[0][0].replace(
        "unchanged within", "no loss beyond"
    )
    assert "not established" in said(tmp_path / "b", lines, 0.005)[0][0]


def test_a_full_that_is_not_where_it_was_published_leads_without_a_method(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "a", "0.2", right(20, 100))
    lines += cell("t", "b", "0.2", right(50, 100))
    far = said(tmp_path / "far", lines, tasks=tasks(t={"reference": {"testbed": 0.5}}))[0]
    assert "methods are not ranked, because full is not where it was published" in far[0]
    assert "with a" not in far[0]
    near = said(tmp_path / "near", lines, tasks=tasks(t={"reference": {"testbed": 0.99}}))[0]
    assert "with a." in near[0]


def test_a_hub_id_finds_the_reference_of_its_alias(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(100, 100)) + cell("t", "a", "0.2", right(20, 100))
    model = "meta-llama/Llama-3.1-8B-Instruct@abc"
    data = data_of(tmp_path, lines, model=model, tasks=tasks(t={"reference": {"llama3.1-8b-instruct": 0.5}}))
    assert data.tables[0].reference == 0.5
    assert "not ranked" in data.tables[0].warnings[0]


def test_the_family_is_the_plan(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(40, 40)) + cell("t", "a", "0.2", right(20, 40))
    planned = {f"c{i}": {"task": "t", "method": "a", "ratio": f"0.{i}"} for i in range(1, 10)}
    _, alone = said(tmp_path / "one", lines)
    assert "One comparison" in alone[0]
    data = data_of(tmp_path / "plan", lines)
    data.run.meta["cells"].update(planned)
    part = verdict_section(data.tables, judge_tables(data.run, data.tables))
    text = " ".join(plain(b.text) for b in part.blocks if isinstance(b, Paragraph))
    assert "all 10 comparisons hold together with 95 %" in text


def test_neighbouring_sizes_are_a_range(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(60, 60))
    for i, ratio in enumerate(("0.1", "0.2", "0.3", "0.5", "0.7")):
        lines += cell("t", "a", ratio, right(10 + i if ratio != "0.5" else 60, 60))
    items, _ = said(tmp_path, lines)
    assert any("(also at 0.2, 0.3, 0.7)" in item or "(also at 0.2 to 0.3, 0.7)" in item for item in items)
    lines += (
        cell("t", "b", "0.1", right(60, 60))
        + cell("t", "b", "0.2", right(60, 60))
        + cell("t", "b", "0.3", right(60, 60))
    )
    assert any("b at 0.1 to 0.3" in item for item in said(tmp_path / "b", lines)[0])
