"""What several sections of a report share: averages name what is not in them, every cell says what it could show."""

from __future__ import annotations

from pathlib import Path

from kvcli.analysis.marked import Grid, plain
from kvcli.analysis.reports.contents import Contents, contents, means_section
from kvcli.analysis.statistics import power
from tests.analysis.tables_of import cell, data_of, right


def means_of(made: Contents) -> list[list[str]]:
    part = means_section(made.means)
    assert part is not None
    return [[plain(field) for field in row] for b in part.blocks if isinstance(b, Grid) for row in b.rows]


def test_a_mean_over_tasks_names_what_is_not_in_it_in_one_row_per_method(tmp_path: Path) -> None:
    lines = []
    for task in ("a", "b", "c"):
        lines += cell(task, "full", "1", right(60, 60)) + cell(task, "m", "0.5", right(45, 60))
        lines += cell(task, "m", "0.1", right(30, 60), flags=["over_budget"] if task == "c" else [])
    (row,) = means_of(contents(data_of(tmp_path, lines).run))
    assert row[:3] == ["m", "compressed", "2 to 3"]
    assert row[3].startswith("50 % [") and row[3].endswith("(without c: over budget)")
    assert row[4].startswith("75 % [") and row[4].endswith("]")


def test_what_a_cell_can_show_is_at_the_level_of_the_family(tmp_path: Path) -> None:
    lines = cell("a", "full", "1", right(60, 60))
    lines += [line for i in range(1, 6) for line in cell("a", "m", f"0.{i}", right(50, 60))]
    made = contents(data_of(tmp_path, lines).run)
    change = made.tables[0].cells()[0].difference
    assert change is not None
    found, alone = made.detectable(change), power.detectable(change)
    assert found == power.detectable(change, made.judged.family.level)
    assert found is not None and alone is not None and found > alone
    assert made.detectable(None) is None
