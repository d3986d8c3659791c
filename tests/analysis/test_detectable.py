"""What size of loss a table could have shown: cells that can show none count too."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from kvcli.analysis.statistics import power, stats
from kvcli.analysis.statistics.family import Family
from kvcli.analysis.tables import detectable
from kvcli.analysis.tables.judged import Judged
from tests.analysis.tables_of import cell, data_of, right


def _flat(n: int) -> stats.Difference:
    return stats.paired_difference(np.ones(n), np.ones(n))


def _sentence(path: Path, counts: list[int], size: int = 1) -> str:
    """counts: samples of each method, all of which stay right."""
    lines = cell("t", "full", "1", right(2000, 2000))
    for number, n in enumerate(counts):
        lines += cell("t", f"m{number}", "0.2", right(n, n))
    (table,) = data_of(path, lines).tables
    return detectable.sentence(table, Judged(Family(size), 0.02, {}))


def test_cells_that_can_show_nothing_are_infinite() -> None:
    shows = power.detectable(_flat(30))
    assert shows is not None
    assert detectable.smallest([_flat(30), _flat(3), _flat(300)], 0.95) == [
        power.detectable(_flat(300)), shows, math.inf
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "which"),
    [([3, 3, 3, 3, 30, 30], "at least half of its 6 cells"), ([3, 3, 30, 30], "at least half of its 4 cells"),
     ([3, 3, 3], "any of its 3 cells"), ([3], "its one cell")],
)  # fmt: skip
def test_a_table_most_of_whose_cells_can_show_nothing_says_so(tmp_path: Path, counts: list[int], which: str) -> None:
    """Not the middle of the few that can."""
    assert _sentence(tmp_path, counts, 216) == (
        f"No loss, however large, has an 80 % chance of being established in {which}: too few samples or clusters "
        "(216 comparisons considered)."
    )


def test_small_losses_have_a_decimal_and_are_never_zero(tmp_path: Path) -> None:
    small = power.detectable(_flat(2000))
    assert small is not None
    assert 0.001 < small < 0.005
    said = _sentence(tmp_path / "many", [2000, 2000, 2000])
    assert said.startswith(f"A loss of {100 * small:.1f} points has an 80 % chance of being established here (median ")
    assert "of its 3 cells, 1 comparison considered)" in said
    some = _sentence(tmp_path / "some", [3, 2000, 2000])
    assert some.startswith(f"A loss of {100 * small:.1f} points") and "median of its 3 cells" in some
    large = power.detectable(_flat(20))
    assert large is not None
    assert _sentence(tmp_path / "few", [20]).startswith(f"A loss of {100 * large:.0f} points has an 80 % chance")


def test_nothing_compared_says_nothing(tmp_path: Path) -> None:
    assert _sentence(tmp_path, []) == ""
