from __future__ import annotations

from pathlib import Path

import pytest

from kvcli.analysis.marked import Bullets, Grid, Paragraph, plain
from kvcli.analysis.reports.against import against_section, check
from kvcli.analysis.tables import published
from kvcli.errors import KvcliError
from tests.analysis.tables_of import cell, data_of, right

MODEL = "meta-llama/Llama-3.1-8B-Instruct"


def test_cells_of_the_papers_grid_stand_beside_it_with_their_notes(tmp_path: Path) -> None:
    lines = cell("mmlu", "full", "1", right(70, 100), shots=5) + cell("mmlu", "snapkv", "0.1", right(65, 100), shots=5)
    lines += cell("mmlu", "snapkv:window=8", "0.1", right(60, 100), shots=5)
    lines += cell("mmlu", "snapkv", "0.15", right(60, 100), shots=5)
    data = data_of(tmp_path, lines, model=MODEL)
    part = against_section(data.run, data.tables)
    rows = [[plain(field) for field in row] for b in part.blocks if isinstance(b, Grid) for row in b.rows]
    printed = published.find(MODEL, task="mmlu", shots=5, method="snapkv", ratio=0.1)[0]
    assert [row[:4] for row in rows] == [["mmlu", "full", "", "0.6882"], ["mmlu", "snapkv", "0.1", printed.printed]]
    assert rows[1][4] == f"{100 * (printed.score / 0.6882 - 1):+.1f} %"
    assert rows[1][6:8] == ["no answer 0 %, incoherent 0 %, cut 0 %", "-7.1 %"]
    notes = [text for b in part.blocks if isinstance(b, Bullets) for text, _ in b.items]
    assert any(text.startswith("p: Five methods with equal values") for text in notes)


def test_other_shots_exemplars_and_queries_are_not_the_papers(tmp_path: Path) -> None:
    for number, facts in enumerate(({"shots": 4}, {"shots": 5, "shot_seed": 1}, {"shots": 5, "query": "agnostic"})):
        lines = cell("mmlu", "full", "1", right(7, 10), **facts) + cell("mmlu", "snapkv", "0.1", right(6, 10), **facts)
        data = data_of(tmp_path / str(number), lines, model=MODEL)
        part = against_section(data.run, data.tables)
        assert not any(isinstance(b, Grid) for b in part.blocks)
        assert "No cell of this run is one of the paper's" in " ".join(
            plain(b.text) for b in part.blocks if isinstance(b, Paragraph)
        )


def test_a_model_the_paper_does_not_have_and_a_paper_that_is_not_there(tmp_path: Path) -> None:
    data = data_of(tmp_path, cell("mmlu", "full", "1", right(7, 10)))
    text = plain(against_section(data.run, data.tables).blocks[0].text)  # type: ignore[union-attr]
    assert text.startswith("The paper prints nothing of testbed. Its models: llama3.1-8b-instruct")
    with pytest.raises(KvcliError, match="no printed numbers of 'other'"):
        check("other")
