"""From a run folder to verdicts, averages and pairs of methods."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from kvcli.analysis.reading.load import Run, load_run
from kvcli.analysis.reports import ranking
from kvcli.analysis.statistics import retention, stats
from kvcli.analysis.statistics.verdicts import Kind
from kvcli.analysis.tables import judged, matched, means, wording
from kvcli.analysis.tables.build import summarise
from kvcli.analysis.tables.scores import SampleScores
from kvcli.analysis.tables.table import CellSummary, TaskTable
from tests.analysis.synthetic import TASKS, FakeMethod, Spec, build, small
from tests.analysis.tables_of import cell as cell_of
from tests.analysis.tables_of import data_of, right, tasks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(small(tmp_path_factory.mktemp("judged") / "run"))


@pytest.fixture(scope="module")
def tables(run: Run) -> list[TaskTable]:
    return summarise(run)


def _cell(tables: list[TaskTable], task: str, method: str, ratio: str) -> tuple[TaskTable, CellSummary]:
    table = next(t for t in tables if t.task == task and t.first_token == "compressed")
    return table, next(c for c in table.cells() if (c.method, c.column) == (method, ratio))


def test_every_comparison_has_a_verdict_in_the_planned_family(run: Run, tables: list[TaskTable]) -> None:
    """3 tasks x 2 first-token modes x 4 methods x 3 ratios; the three seeds of `random` are one comparison."""
    found = judged.judge_tables(run, tables)
    assert found.family.size == 72
    assert found.family.planned
    assert len(found.verdicts) == 72
    table, lost = _cell(tables, "tb_recall", "streaming_llm", "0.1")
    verdict = found.of(lost)
    assert verdict is not None
    assert verdict.kind is Kind.LOSS
    assert lost.difference is not None
    assert lost.difference.p is not None
    assert verdict.p is not None
    assert verdict.p >= lost.difference.p
    assert verdict.alone == lost.difference.interval
    assert verdict.interval == lost.difference.at(1 - 0.05 / 72)
    assert table.full is not None
    assert found.of(table.full) is None


def test_cells_are_marked_as_their_verdicts_say(run: Run, tables: list[TaskTable]) -> None:
    found = judged.judge_tables(run, tables)
    for cell in (cell for table in tables for cell in table.cells()):
        verdict = found.of(cell)
        assert verdict is not None
        assert cell.in_family == {Kind.LOSS: "loss", Kind.GAIN: "gain"}.get(verdict.kind, "open")
        assert ("*" in wording.marks(cell, None)) == (verdict.kind in (Kind.LOSS, Kind.GAIN))
    _, alone = _cell(tables, "tb_recall", "snapkv", "0.1")
    assert (alone.verdict, alone.in_family) == ("loss", "open"), "by itself, and with all 72 comparisons"
    assert tables[0].full is not None and tables[0].full.in_family == "none"


def test_one_table_is_judged_in_the_whole_family(run: Run, tables: list[TaskTable]) -> None:
    whole, part = judged.judge_tables(run, tables), judged.judge_tables(run, tables[:1])
    assert part.family == whole.family
    for cell in tables[0].cells():
        one, other = part.of(cell), whole.of(cell)
        assert one is not None
        assert other is not None
        assert one.interval == other.interval


def test_a_wider_margin_makes_more_verdicts(run: Run, tables: list[TaskTable]) -> None:
    kinds = [[v.kind for v in judged.judge_tables(run, tables, m).verdicts.values()] for m in (0.02, 0.3)]
    assert Kind.UNCHANGED not in kinds[0], "59 samples are too few for 2 points"
    assert kinds[1].count(Kind.UNCHANGED) > 5


def test_sample_scores_are_those_of_the_tables(run: Run, tables: list[TaskTable]) -> None:
    scores = SampleScores(run)
    for table in tables:
        assert table.full is not None
        full, clusters = scores.of(table.full.cell_ids)
        for cell in table.cells():
            values, _ = scores.of(cell.cell_ids)
            both = ~np.isnan(values) & ~np.isnan(full)
            assert np.nanmean(values) == pytest.approx(cell.score)
            assert stats.paired_difference(values[both], full[both], clusters[both]) == cell.difference


def test_mean_over_methods(run: Run, tables: list[TaskTable]) -> None:
    found = means.over_methods(SampleScores(run), tables)
    first = next(f for f in found if f.table.task == "tb_recall" and f.column.text == "0.3")
    cells = [_cell(tables, "tb_recall", m, "0.3")[1] for m in ("random", "streaming_llm", "snapkv", "shotkv")]
    assert set(first.methods) == {c.label for c in cells}
    assert first.difference.value == pytest.approx(np.mean([c.difference.value for c in cells if c.difference]))
    assert first.score == pytest.approx(np.mean([c.score for c in cells]))
    assert first.difference.n == 59
    tight = next(f for f in found if f.table.task == "tb_recall" and f.column.text == "0.1")
    assert "shotkv" not in tight.methods, "over budget"
    one = means.over_methods(SampleScores(run), tables, ["snapkv", "random"])
    assert set(one[0].methods) == {"random", "snapkv"}


def test_mean_over_tasks(run: Run, tables: list[TaskTable]) -> None:
    found = means.over_tasks(SampleScores(run), tables)
    assert len(found) == 22, "2 first-token modes x 4 methods x 3 ratios, shotkv over budget at 0.1"
    mean = next(f for f in found if (f.first_token, f.method, f.column.text) == ("compressed", "snapkv", "0.3"))
    pairs = [_cell(tables, task, "snapkv", "0.3") for task in mean.tasks]
    assert len(pairs) == 3
    assert mean.difference.value == pytest.approx(np.mean([c.difference.value for _, c in pairs if c.difference]))
    assert mean.difference.interval is not None
    scores, kept = SampleScores(run), []
    for table, cell in pairs:
        assert table.full is not None
        (a, clusters), (b, _) = scores.of(cell.cell_ids), scores.of(table.full.cell_ids)
        both = ~np.isnan(a) & ~np.isnan(b)
        kept.append(retention.retention(a[both], b[both], table.chance or 0.0, clusters[both]).value)
    assert mean.retention is not None
    assert mean.retention.value == pytest.approx(np.mean(kept))


def test_a_mean_over_tasks_leaves_out_what_is_over_budget_and_names_it(tmp_path: Path) -> None:
    lines = []
    for task in ("one", "two", "three"):
        over = ["over_budget"] if task == "three" else []
        lines += cell_of(task, "full", "1", right(60, 60)) + cell_of(task, "a", "0.2", right(30, 60), flags=over)
    data = data_of(tmp_path, lines)
    (mean,) = means.over_tasks(data.scores, data.tables)
    assert set(mean.tasks) == {"one", "two"}
    assert mean.left_out == (("three", "over budget"),)
    assert mean.difference.tasks == 2


def test_a_mean_over_tasks_leaves_out_a_full_that_is_not_where_it_was_published(tmp_path: Path) -> None:
    lines = []
    for task in ("one", "two", "far"):
        lines += cell_of(task, "full", "1", right(60, 60)) + cell_of(task, "a", "0.2", right(30, 60))
    data = data_of(tmp_path, lines, tasks=tasks(one={}, two={}, far={"reference": {"testbed": 0.5}}))
    (mean,) = means.over_tasks(data.scores, data.tables)
    assert mean.tasks == ("one", "two")
    assert mean.left_out == (("far", "full is not where it was published"),)


def test_a_cell_over_budget_is_not_replaced_by_one_with_fewer_shots(tmp_path: Path) -> None:
    lines = []
    for task in ("one", "two", "both"):
        for shots in (4, 8) if task == "both" else (8,):
            over = ["over_budget"] if (task, shots) == ("both", 8) else []
            lines += cell_of(task, "full", "1", right(60, 60), shots=shots)
            lines += cell_of(task, "a", "0.2", right(30, 60), shots=shots, flags=over)
    data = data_of(tmp_path, lines)
    (mean,) = means.over_tasks(data.scores, data.tables)
    assert (mean.tasks, mean.left_out) == (("one", "two"), (("both", "over budget"),))


def test_pairs_of_methods(run: Run, tables: list[TaskTable]) -> None:
    found = matched.of_tables(run, SampleScores(run), tables)
    assert {pair.verdict.family for pair in found} == {108}, "6 pairs x 3 tasks x 2 modes x 3 ratios"
    for pair in found:
        assert pair.first.measured_ratio == pytest.approx(pair.second.measured_ratio, rel=0.011)
        assert pair.first.column == pair.second.column == pair.column
        both = pair.first.score - pair.second.score
        assert pair.difference.value == pytest.approx(both, abs=0.02)
    tight = [p for p in found if p.column == "0.1"]
    assert all("shotkv" not in (p.first.method, p.second.method) for p in tight), "it holds more there"
    assert any(p.verdict.kind is Kind.LOSS for p in found)


def test_methods_held_to_the_same_bytes_are_a_family_with_the_one_they_are_held_to(tmp_path: Path) -> None:
    lines, described = cell_of("t", "full", "1", right(60, 60)), {}
    for method, match in (("snapkv", None), ("streaming_llm", "snapkv"), ("kivi", "snapkv")):
        lines += [line | {"ratio": None} for line in cell_of("t", method, "0.2", right(30, 60), match=match)]
    for line in lines:
        match = {"method": "snapkv", "ratio": None, "budget": None, "code": "1a"} if line["match"] else None
        described[line["cell_id"]] = {"task": "t", "shots": 8, "first_token": "compressed", "method": line["method"],
                                      "ratio": line["ratio"], **({"match": match} if match else {})}  # fmt: skip
    data = data_of(tmp_path / "planned", lines, cells=described)
    assert {pair.verdict.family for pair in matched.of_tables(data.run, data.scores, data.tables)} == {3}
    assert ranking.rank(data.run, data.scores, data.tables).pairs[0].verdict.family == 3
    data = data_of(tmp_path / "unplanned", lines, cells={})
    assert matched.family_of(data.run, data.tables).size == 3, "never fewer than the tables show"


def test_large_runs_are_judged_in_seconds(tmp_path: Path) -> None:
    methods = [FakeMethod(f"m{i}", 0.2 * i) for i in range(6)]
    run = load_run(build(tmp_path / "run", Spec(TASKS[:5], methods, ("0.1", "0.3", "0.5", "0.7", "0.9"), n=120)))
    tables = summarise(run)
    begun = time.perf_counter()
    scores = SampleScores(run)
    assert judged.judge_tables(run, tables).family.size == 150
    assert len(means.over_tasks(scores, tables)) == 30
    assert len(means.over_methods(scores, tables)) == 25
    assert len(matched.of_tables(run, scores, tables)) == 375
    assert time.perf_counter() - begun < 10
