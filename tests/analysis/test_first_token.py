"""Both ways of --first-token: what lies between them is one paired comparison, with a family of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvcli.analysis.marked import Grid, Paragraph, plain
from kvcli.analysis.reports.first_token import both_ways, first_token_section
from kvcli.analysis.statistics import stats
from kvcli.analysis.statistics.verdicts import Kind
from tests.analysis.tables_of import cell, data_of, right

N = 60


def both(first: int, second: int, ratio: str = "0.1") -> list[dict[str, object]]:
    """A method that has `first` samples right with compressed and `second` with prefill."""
    return cell("t", "a", ratio, right(first, N)) + cell("t", "a", ratio, right(second, N), first_token="prefill")


def test_the_two_ways_are_compared_with_each_other_not_by_their_verdicts(tmp_path: Path) -> None:
    """Compressed is established below full and prefill is not, but nothing lies between the two."""
    data = data_of(tmp_path, cell("t", "full", "1", right(N, N)) + both(53, 57))
    compressed, prefill = (t.cells()[0] for t in data.tables)
    assert (compressed.verdict, prefill.verdict) == ("loss", "open")
    (pair,) = both_ways(data.scores, data.tables)
    assert pair.verdict.kind is Kind.OPEN
    expected = stats.paired_difference(np.array(right(53, N)), np.array(right(57, N)))
    assert (pair.verdict.value, pair.verdict.interval) == (expected.value, expected.interval)
    part = first_token_section(data.scores, data.tables)
    assert part is not None
    said = " ".join(plain(b.text) for b in part.blocks if isinstance(b, Paragraph))
    assert said.startswith("Compressed is established behind prefill in 0 of 1 pair:")
    assert "Left out: 1 pair in which neither way is established behind the other." in said
    assert "answered by one token" in said
    assert not any(isinstance(b, Grid) for b in part.blocks)


def test_pairs_are_the_family_and_those_established_are_listed(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(N, N)) + both(10, 58) + both(55, 58, "0.5") + both(59, 58, "0.9")
    data = data_of(tmp_path, lines)
    pairs = both_ways(data.scores, data.tables)
    assert [p.verdict.family for p in pairs] == [3, 3, 3]
    assert [p.verdict.kind is Kind.LOSS for p in pairs] == [True, False, False]
    part = first_token_section(data.scores, data.tables)
    assert part is not None
    (grid,) = (b for b in part.blocks if isinstance(b, Grid))
    (row,) = grid.rows
    assert [plain(field) for field in row[:4]] == ["t", "a", "0.1", "60"]
    assert plain(row[4]).startswith("-80.0 [")
    assert plain(row[6]).startswith("-83.3 [") and plain(row[7]).startswith("-3.3 [")


def test_there_is_no_section_where_one_way_was_run(tmp_path: Path) -> None:
    data = data_of(tmp_path, cell("t", "full", "1", right(N, N)) + cell("t", "a", "0.1", right(5, N)))
    assert first_token_section(data.scores, data.tables) is None


def test_tasks_that_full_answers_by_one_token_are_named(tmp_path: Path) -> None:
    """Its two generated tokens are the answer and the end."""
    lines = [line | {"n_new": 2} for line in cell("t", "full", "1", right(N, N)) + both(53, 57)]
    long = cell("u", "full", "1", right(N, N)) + cell("u", "a", "0.1", right(9, N))
    long += cell("u", "a", "0.1", right(9, N), first_token="prefill")
    data = data_of(tmp_path, lines + [line | {"n_new": 30} for line in long])
    part = first_token_section(data.scores, data.tables)
    assert part is not None and isinstance(part.blocks[0], Paragraph)
    assert "Here full answers by one token, and what ends it, in t. " in plain(part.blocks[0].text)
