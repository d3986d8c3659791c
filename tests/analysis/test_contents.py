"""What several sections of a report share: averages name what is not in them, every cell says what it could show."""

from __future__ import annotations

from pathlib import Path

from pyarrow import parquet

from kvcli.analysis.exports.shared import export
from kvcli.analysis.marked import Grid, code, plain, raised
from kvcli.analysis.reports.averages import means_section
from kvcli.analysis.reports.contents import Contents, contents
from kvcli.analysis.reports.latex import latex
from kvcli.analysis.reports.opening import head
from kvcli.analysis.reports.overview import overview_section, overviews
from kvcli.analysis.reports.page import page_data
from kvcli.analysis.reports.report import document
from kvcli.analysis.statistics import power
from kvcli.cli.report_json import numbers
from tests.analysis.tables_of import cell, data_of, right, tasks


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
    assert row[:3] == ["m", "first token compressed", "2 to 3"]
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


def test_a_mean_over_tasks_leaves_out_a_task_whose_full_gives_too_few_answers(tmp_path: Path) -> None:
    lines = []
    for task in ("a", "b", "c"):
        lines += cell(task, "full", "1", right(60, 60)) + cell(task, "m", "0.5", right(45, 60))
    for line in lines:
        if (line["task"], line["method"]) == ("c", "full") and int(line["sample_id"].removeprefix("c-")) < 15:
            line["extracted"] = None
    (row,) = means_of(contents(data_of(tmp_path, lines).run))
    assert row[2] == "2" and row[3].endswith("(without c: 25 % of full's outputs hold no answer)")


def silent(folder: Path) -> Contents:
    """Task t's full is at chance; a loses what full cannot have. Task u is as it should be."""
    lines = cell("t", "full", "1", right(500, 1000)) + cell("t", "a", "0.2", right(100, 1000))
    lines += cell("u", "full", "1", right(900, 1000)) + cell("u", "a", "0.2", right(100, 1000))
    return contents(data_of(folder, lines, tasks=tasks(t={"chance": 0.5}, u={"chance": 0.5})).run)


def test_where_nothing_can_be_said_no_output_says_anything_else(tmp_path: Path) -> None:
    """Page, Markdown, LaTeX, terminal, JSON and exports have one word for it."""
    made = silent(tmp_path)
    t, u = made.tables
    assert (t.cells()[0].in_family, u.cells()[0].in_family) == ("none", "loss")
    assert [made.judged.said(table.cells()[0]) for table in (t, u)] == ["nothing can be said", "loss"]
    assert made.judged.said(t.full) == "" if t.full else False
    text = document(made)
    assert "| nothing can be said |" in text and "**-40.0**" not in text and "**-80.0**" in text
    assert "nothing can be said: full is not clearly above chance" in text
    assert r"$\mathbf{-40.0}$" not in latex(made) and r"$\mathbf{-80.0}$" in latex(made)
    rows = {row[1]: row for row in page_data(made, [[], []], 0)["rows"] if row[0] == 0}
    assert rows["a"][19] == "nothing can be said" and rows["a"][27] is None
    kinds = [found["judged"]["kind"] for table in numbers(made)["tables"] for found in table["cells"]]
    assert kinds == ["nothing can be said", "loss"]
    exported = parquet.read_table(export(made.run, "parquet", tmp_path / "out")[1]).to_pylist()
    assert [row["verdict"] for row in exported] == [None, "nothing can be said", None, "loss"]


def test_of_other_weights_nothing_can_be_said_where_dense_full_says_nothing(tmp_path: Path) -> None:
    dense = {"chance": 0.5}
    lines = cell("t", "full", "1", right(50, 100)) + cell("t", "a", "0.2", right(20, 100))
    lines += cell("t", "full", "1", right(10, 100), weights="wanda:0.5")
    made = contents(data_of(tmp_path, lines, tasks=tasks(t=dense)).run)
    pruned = next(table for table in made.tables if table.weights != "dense")
    assert pruned.full is not None and made.judged.said(pruned.full) == "nothing can be said"


def test_a_report_of_older_records_says_how_it_knows_what_is_incoherent(tmp_path: Path) -> None:
    lines = cell("t", "full", "1", right(50, 50)) + cell("t", "a", "0.2", right(20, 50), incoherent=None)
    older, newer = head(contents(data_of(tmp_path / "old", lines).run)), head(silent(tmp_path / "new"))
    assert len(older) == 2 and "50 records do not say whether their output is text" in plain(older[1])
    assert plain(older[1]).endswith(f"kvcli rescore {tmp_path / 'old'} looks at them again.")
    assert not any("output is text" in text for text in newer)


def test_methods_that_know_no_first_token_modes_stand_with_the_others_and_full_once(tmp_path: Path) -> None:
    lines = []
    for task in ("a", "b"):
        lines += cell(task, "full", "1", right(60, 60)) + cell(task, "m", "0.5", right(45, 60))
        lines += cell(task, "p", "0.5", right(45, 60), first_token="n/a")
    found = overviews(contents(data_of(tmp_path, lines).run).tables)
    assert [(one.mode, [name for name, _ in one.rows]) for one in found] == [("", ["m", "p"])]


def test_a_mean_over_tasks_marks_what_fell_back_throughout(tmp_path: Path) -> None:
    lines = []
    for task in ("a", "b"):
        lines += cell(task, "full", "1", right(60, 60)) + cell(task, "m", "0.5", right(45, 60))
        lines += cell(task, "p", "0.5", right(45, 60), flags=["fallback"] * (task == "b"))
    made = contents(data_of(tmp_path, lines).run)
    assert {mean.method: mean.fallback for mean in made.means} == {"m": (), "p": ("b",)}
    part = means_section(made.means)
    assert part is not None
    (grid,) = (block for block in part.blocks if isinstance(block, Grid))
    assert [row[-1].endswith(raised("f")) for row in grid.rows] == [False, True]


def test_worst_case_intervals_are_marked(tmp_path: Path) -> None:
    graded = [0.5] * 3 + [1.0] * 57
    lines = []
    for task in ("a", "b"):
        lines += cell(task, "full", "1", right(60, 60)) + cell(task, "m", "0.5", graded)
        lines += cell(task, "p", "0.5", [0.5 + 0.01 * (i % 7) for i in range(60)])
    made = contents(data_of(tmp_path, lines).run)
    part = overview_section(made.tables, made.judged)
    assert part is not None
    (grid,) = (block for block in part.blocks if isinstance(block, Grid))
    marked = {row[0]: raised("b") in row[1] for row in grid.rows}
    assert marked == {code("full"): False, code("m"): True, code("p"): False}
