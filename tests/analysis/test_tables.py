from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvcli.analysis.reading import names
from kvcli.analysis.reading.load import Run, load_run
from kvcli.analysis.statistics import stats
from kvcli.analysis.tables import wording
from kvcli.analysis.tables.build import summarise
from kvcli.analysis.tables.cells import told_by_circles
from kvcli.analysis.tables.doubts import unlike_reference
from kvcli.analysis.tables.table import CellSummary, TaskTable
from kvcli.analysis.tables.worst_flip import worst_flip
from kvcli.cli.tables import as_json
from tests.analysis.synthetic import (
    GOLDEN,
    METHODS,
    RATIOS,
    TASKS,
    FakeMethod,
    FakeTask,
    Spec,
    build,
    record,
    small,
    terminal,
    write,
)


def run_of(folder: Path, lines: list[dict], **meta: object) -> Run:
    folder.mkdir(exist_ok=True)
    write(folder / "samples.jsonl", lines)
    (folder / "run.json").write_text(json.dumps(meta))
    return load_run(folder)


def lines_of(method: str, scores: list[float | None], cell: str | None = None, **more: object) -> list[dict]:
    facts = {"task": "t", "ratio": "1" if method == "full" else "0.1", "first_token": "compressed", "shots": 8}
    facts |= {"extracted": "x", "measured_ratio": 0.1, "metric": "exact"}
    return [
        record(cell_id=cell or method, sample_id=str(i), method=method, score=score,
               status="error" if score is None else "ok", **{**facts, **more})
        for i, score in enumerate(scores)
    ]  # fmt: skip


def only(table: TaskTable, method: str, column: str = "0.1") -> CellSummary:
    return next(row.cells[column] for row in table.rows if row.method == method)


def test_a_cell_by_hand(tmp_path: Path) -> None:
    full = [1.0] * 8 + [0.0, 0.0]
    snap = [1.0] * 5 + [0.0] * 4 + [1.0]
    noop = lines_of("snapkv", snap)
    for line in noop[:3]:
        line.update(flags=["noop"], extracted=None, finish="length", measured_ratio=1.0)
    table = summarise(run_of(tmp_path, lines_of("full", full) + noop, tasks={"t": {"chance": 0.1, "version": 2}}))[0]
    cell = only(table, "snapkv")
    assert (cell.n, cell.records, cell.errors, cell.seeds, cell.score) == (10, 10, 0, 1, 0.6)
    assert cell.interval == stats.wilson(6, 10)
    assert cell.difference == stats.paired_difference(np.array(snap), np.array(full))
    assert (cell.difference.better, cell.difference.worse) == (1, 3)
    assert cell.relative == pytest.approx((0.6 - 0.8) / 0.8)
    assert cell.measured_ratio == pytest.approx(0.37)
    assert (cell.flags, cell.noop, cell.no_answer, cell.truncated) == ({"noop": 3}, 3, 0.3, 0.3)
    assert table.full is not None
    assert (table.full.score, table.full.difference, table.chance, table.version) == (0.8, None, 0.1, "2")


def test_further_figures_are_means_over_the_records_that_have_them(tmp_path: Path) -> None:
    full = lines_of("full", [1.0, 1.0, 0.0])
    for line, extra in zip(full, ({"found": 1.0}, {"found": 0.0}, {"found": 1, "rare": 0.5}), strict=True):
        line["extra"] = extra
    table = summarise(run_of(tmp_path, full + lines_of("snapkv", [1.0] * 3)))[0]
    assert table.full is not None
    assert table.full.extra == {"found": pytest.approx(2 / 3), "rare": 0.5}
    assert only(table, "snapkv").extra == {}
    assert wording.figures(table.full) == "found 0.67, rare 0.50"


def test_the_last_line_of_a_key_decides_its_figures_and_its_metric(tmp_path: Path) -> None:
    """As after `kvcli rescore`."""
    old, new = lines_of("full", [0.0, 0.0]), lines_of("full", [1.0, 1.0], metric="judged")
    for line in old:
        line["extra"] = {"old": 1.0}
    table = summarise(run_of(tmp_path, old + new, tasks={"t": {"metric": "exact"}}))[0]
    assert table.full is not None
    assert (table.metric, table.full.score, table.full.extra) == ("judged", 1.0, {})
    assert not any("side by side" in warning for warning in table.warnings)


def test_scores_of_two_metrics_in_one_table_are_a_warning(tmp_path: Path) -> None:
    lines = lines_of("full", [1.0, 0.0]) + lines_of("snapkv", [1.0, 0.0], metric="judged")
    warnings = summarise(run_of(tmp_path, lines))[0].warnings
    assert any("scores of exact and judged stand side by side" in warning for warning in warnings)


def test_shares_stand_beside_scores_where_they_are_unlike_full_s(tmp_path: Path) -> None:
    full, snap, other = (lines_of(m, [1.0] * 50) for m in ("full", "snapkv", "h2o"))
    for line in full[:5] + other[:5]:
        line["finish"] = "length"
    for line in snap[:6]:
        line["extracted"] = None
    table = summarise(run_of(tmp_path, full + snap + other))[0]
    assert wording.shares(table.full) == {"?": "?0", "~": "~0", ">": ">10"}
    assert wording.shares(only(table, "snapkv"), table.full) == {"?": "?12", ">": ">0"}
    assert wording.shares(only(table, "h2o"), table.full) == {}
    drawn = terminal([table], 100)
    assert "full 1.00 [0.93, 1.00] ?0 ~0 >10" in drawn and "1.00 +0.0 ?12 >0" in drawn
    assert [line.rstrip() for line in drawn.splitlines() if line.startswith("h2o")] == ["h2o      1.00 +0.0"]
    assert "? so many per cent of the outputs hold no answer" in drawn
    assert "is within 2 points of full's" in drawn


def test_shares_that_are_zero_everywhere_are_said_once_beside_full(tmp_path: Path) -> None:
    table = summarise(run_of(tmp_path, lines_of("full", [1.0] * 5) + lines_of("snapkv", [1.0] * 5)))[0]
    drawn = terminal([table], 100)
    assert "full 1.00 [0.57, 1.00] ?0 ~0 >0" in drawn and "is within 2 points of full's" in drawn
    assert [line.rstrip() for line in drawn.splitlines() if line.startswith("snapkv")] == ["snapkv   1.00 +0.0"]


def test_without_full_every_share_is_shown(tmp_path: Path) -> None:
    lines = lines_of("snapkv", [1.0] * 300)
    lines[0]["extracted"] = None
    table = summarise(run_of(tmp_path, lines))[0]
    assert wording.shares(only(table, "snapkv"), table.full) == {"?": "?1", "~": "~0", ">": ">0"}, (
        "above zero is not shown as zero"
    )


def test_outputs_that_are_no_text_have_a_share_of_their_own(tmp_path: Path) -> None:
    full, snap = (lines_of(m, [1.0] * 10) for m in ("full", "snapkv"))
    for line in full + snap:
        line.update(n_new=200, repetition=0.9, incoherent=False)
    snap[2]["incoherent"] = snap[7]["incoherent"] = True
    run = run_of(tmp_path, full + snap)
    table = summarise(run)[0]
    assert table.full is not None and table.full.incoherent == 0.0, "the record's word counts, not its repetition"
    assert only(table, "snapkv").incoherent == 0.2 and told_by_circles(run) == 0


def test_of_older_records_outputs_in_circles_are_incoherent_and_options_never(tmp_path: Path) -> None:
    full, snap = (lines_of(m, [1.0] * 10) for m in ("full", "snapkv"))
    for line in full:
        line.update(n_new=200, repetition=0.1, incoherent=None)
    for line in snap:
        del line["incoherent"]
        line.update(n_new=200, repetition=0.1)
    for line in snap[:3]:
        line.update(repetition=0.97)
    snap[4].update(repetition=0.9, n_new=8)
    run = run_of(tmp_path / "a", full + snap)
    table = summarise(run)[0]
    assert told_by_circles(run) == 20
    assert table.full is not None and table.full.incoherent == 0.0
    assert (only(table, "snapkv").incoherent, only(table, "snapkv").no_answer) == (0.3, 0.0), "eight tokens do not tell"
    assert wording.shares(only(table, "snapkv"), table.full) == {"~": "~30"}
    assert wording.outputs(only(table, "snapkv")) == "no answer 0 %, incoherent 30 %, cut 0 %"
    for line in full + snap:
        line.update(n_new=0, repetition=None)
    run = run_of(tmp_path / "b", full + snap)
    chosen = only(summarise(run)[0], "snapkv")
    assert told_by_circles(run) == 0, "of options nothing is to be told"
    assert chosen.incoherent is None and wording.outputs(chosen) == "no answer 0 %, cut 0 %"


def test_what_the_scorer_calls_incoherent_counts_as_such(tmp_path: Path) -> None:
    lines = lines_of("full", [1.0] * 4)
    for line, said in zip(lines, (1.0, 1.0, 0.0, 0.0), strict=True):
        line.update(extra={"incoherent": said}, repetition=0.9, n_new=50, incoherent=None)
    full = summarise(run_of(tmp_path, lines))[0].full
    assert full is not None and full.incoherent == 0.5


def test_one_cluster_says_what_cannot_be_judged_and_is_not_ranked(tmp_path: Path) -> None:
    lines = [{**line, "cluster": "one"} for m in ("full", "snapkv") for line in lines_of(m, [1.0] * 8)]
    (table,) = summarise(run_of(tmp_path / "a", lines, tasks={"t": {"chance": 0.25}}))
    assert table.warnings == ("one cluster: not to be judged whether full is above chance (0.25)",)
    assert unlike_reference(table) == ""
    facts = {"t": {"chance": 0.25, "reference": {"testbed": 0.9}}}
    (table,) = summarise(run_of(tmp_path / "b", lines, tasks=facts, config={"model": "testbed"}))
    (said,) = table.warnings
    assert said == unlike_reference(table)
    assert said.startswith("one cluster: not to be judged whether full is above chance or where it was published")
    assert "not ranked" in said


def test_a_published_score_is_held_against_the_dense_model_alone(tmp_path: Path) -> None:
    lines = lines_of("full", [1.0] * 50) + lines_of("full", [0.0] * 50, cell="pruned", weights="wanda:0.5")
    facts = {"t": {"reference": {"testbed": 0.98}}}
    dense, pruned = summarise(run_of(tmp_path, lines, tasks=facts, config={"model": "testbed"}))
    assert (dense.reference, pruned.reference) == (0.98, None)
    assert not unlike_reference(pruned)


def test_seeds_and_draws_are_counted_apart(tmp_path: Path) -> None:
    lines = lines_of("full", [1.0])
    for seed in range(3):
        for draw in range(2):
            lines += lines_of("random", [1.0], cell=f"r{seed}{draw}", seed=seed, draw=draw)
    cell = only(summarise(run_of(tmp_path / "a", lines))[0], "random")
    assert (cell.seeds, cell.repeats, wording.repeats(cell)) == (6, (3, 2), "3 seeds x 2 draws")
    one_seed = [line for line in lines if line["seed"] in (None, 0)]
    assert wording.repeats(only(summarise(run_of(tmp_path / "b", one_seed))[0], "random")) == "2 draws"
    torn = [line for line in lines if line["cell_id"] != "r21"]
    assert wording.repeats(only(summarise(run_of(tmp_path / "c", torn))[0], "random")) == "5 seeds and draws"


def test_only_samples_that_both_have_are_paired(tmp_path: Path) -> None:
    full = lines_of("full", [1.0, 1.0, 0.0, None, 1.0])
    snap = lines_of("snapkv", [0.0, 1.0, 1.0, 1.0, None])
    cell = only(summarise(run_of(tmp_path, full + snap))[0], "snapkv")
    assert (cell.n, cell.errors, cell.score) == (4, 1, 0.75)
    assert cell.difference is not None
    assert (cell.difference.n, cell.difference.value) == (3, 0.0)
    assert wording.marks(cell, None) == ""


def test_seeds_are_averaged_within_each_sample(tmp_path: Path) -> None:
    lines = lines_of("full", [1.0] * 4)
    for seed, scores in enumerate([[1, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 0]]):
        lines += lines_of("random", [float(s) for s in scores], cell=f"r{seed}", seed=seed)
    cell = only(summarise(run_of(tmp_path, lines))[0], "random")
    assert (cell.n, cell.records, cell.seeds) == (4, 12, 3)
    expected = stats.paired_difference(np.array([1, 1 / 3, 0, 2 / 3]), np.ones(4))
    assert cell.difference is not None
    assert cell.difference.value == pytest.approx(expected.value)
    assert cell.difference.interval is not None
    assert cell.difference.interval.method.startswith("t")


def test_two_cells_of_one_seed_are_not_mixed_in_silence(tmp_path: Path) -> None:
    old, new = lines_of("snapkv", [0.0] * 3, cell="old"), lines_of("snapkv", [1.0] * 3, cell="new")
    table = summarise(run_of(tmp_path, lines_of("full", [1.0] * 3) + old + new))[0]
    assert only(table, "snapkv").score == 1.0
    assert only(table, "snapkv").cell_ids == ("new",)
    assert any("1 older cell left out" in w for w in table.warnings)


def test_modes_and_shots_are_never_mixed(tmp_path: Path) -> None:
    lines: list[dict] = []
    for first_token in ("compressed", "prefill"):
        for query in ("aware", "agnostic"):
            for shots in (4, 8):
                more = {"first_token": first_token, "query": query, "shots": shots}
                name = f"{first_token}{query}{shots}"
                lines += lines_of("full", [1.0] * 3, cell="f" + name, **more)
                lines += lines_of("snapkv", [0.0] * 3, cell="s" + name, **more)
    found = summarise(run_of(tmp_path, lines))
    assert len({(t.first_token, t.query, t.shots) for t in found}) == 8
    assert all(len(t.cells()) == 1 and only(t, "snapkv").difference.n == 3 for t in found)
    assert [t.first_token for t in found[:2]] == ["compressed", "prefill"]


def test_weights_are_never_mixed_and_say_how_their_full_compares_with_the_dense_one(tmp_path: Path) -> None:
    lines = lines_of("full", [1.0] * 10) + lines_of("snapkv", [1.0] * 8 + [0.0] * 2)
    lines += lines_of("full", [1.0] * 6 + [0.0] * 4, cell="f2", weights="sparsegpt:2:4")
    lines += lines_of("snapkv", [1.0] * 5 + [0.0] * 5, cell="s2", weights="sparsegpt:2:4")
    lines += lines_of("snapkv", [1.0] * 5, cell="s3", weights="sparsegpt:sparsity=0.5")
    dense, pruned, lone = summarise(run_of(tmp_path, lines))
    assert (dense.weights, pruned.weights) == ("dense", "sparsegpt:2:4")
    assert only(dense, "snapkv").difference.value == pytest.approx(-0.2)
    assert only(pruned, "snapkv").difference.value == pytest.approx(-0.1), "against full of the same weights"
    assert pruned.against_dense is not None and pruned.against_dense.value == pytest.approx(-0.4)
    assert "-40.0 points" in pruned.notes[0] and "(n = 10)" in pruned.notes[0] and not dense.notes
    assert lone.full is None and only(lone, "snapkv").difference is None, "never against full of other weights"
    assert wording.mode(pruned).endswith("weights sparsegpt:2:4") and "weights" not in wording.mode(dense)


def test_matched_methods_stand_in_the_column_of_the_one_they_are_matched_to(tmp_path: Path) -> None:
    lines = lines_of("full", [1.0] * 4) + lines_of("kivi", [1.0] * 4, ratio=None, measured_ratio=0.2)
    lines += lines_of("snapkv", [1.0] * 4, cell="m", ratio=None, measured_ratio=0.2, match="kivi")
    lines += lines_of(
        "shotkv", [0.0] * 4, cell="n", ratio=None, measured_ratio=0.3, match="kivi", flags=["unreachable"]
    )
    lines += lines_of("snapkv", [1.0] * 4, cell="r")
    (table,) = summarise(run_of(tmp_path, lines))
    assert [c.text for c in table.columns] == ["= kivi", "0.1"]
    assert {row.method: set(row.cells) for row in table.rows} == {
        "kivi": {"= kivi"}, "snapkv": {"= kivi", "0.1"}, "shotkv": {"= kivi"},
    }  # fmt: skip
    assert table.notes == ("not within 1 % of the bytes of kivi: shotkv (4 of 4)",)
    assert wording.off_target(only(table, "snapkv", "= kivi"))


def test_full_of_the_other_first_token_mode_serves_where_it_was_not_run(tmp_path: Path) -> None:
    lines = lines_of("full", [1.0] * 3) + lines_of("pyramidinfer", [0.0] * 3, first_token="n/a")
    table = next(t for t in summarise(run_of(tmp_path, lines)) if t.first_token == "n/a")
    assert only(table, "pyramidinfer").difference is not None
    assert any("'compressed'" in note for note in table.notes)


def test_clusters_of_the_records_reach_the_interval(tmp_path: Path) -> None:
    full, snap = lines_of("full", [1.0] * 12), lines_of("snapkv", [1.0, 0.0, 0.0, 1.0] * 3)
    for lines in (full, snap):
        for i, line in enumerate(lines):
            line["cluster"] = f"g{i // 4}" if i < 8 else None
    table = summarise(run_of(tmp_path, full + snap))[0]
    found = only(table, "snapkv").difference
    assert table.clusters == 6
    assert found is not None
    assert (found.units, found.test) == (6, "t over clusters")


def test_columns_ratios_budgets_and_own(tmp_path: Path) -> None:
    lines = lines_of("full", [1.0] * 3)
    lines += lines_of("snapkv", [1.0] * 3, cell="a", ratio="0.5") + lines_of("snapkv", [1.0] * 3, cell="b", ratio=0.1)
    lines += lines_of("snapkv", [1.0] * 3, cell="c", ratio=None, budget=128)
    lines += lines_of("kivi", [1.0] * 3, cell="d", ratio=None)
    lines += lines_of("h2o", [1.0] * 3, cell="e", ratio="0.5", decode={"ratio": "same"})
    table = summarise(run_of(tmp_path, lines))[0]
    assert [c.text for c in table.columns] == ["128 KV", "0.1", "0.5", "own"]
    assert [row.method for row in table.rows] == ["snapkv", "kivi", "h2o [r_d same]"]


def test_order_is_that_of_run_json_whatever_the_order_of_records(tmp_path: Path) -> None:
    spec = Spec(TASKS[5:8], METHODS[:4], n=15)
    whole = build(tmp_path / "whole", spec)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "run.json").write_bytes((whole / "run.json").read_bytes())
    lines = (whole / "samples.jsonl").read_text().splitlines()
    (mixed / "samples.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    first, second = (json.dumps(as_json(summarise(load_run(f)))) for f in (whole, mixed))
    assert first == second


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (Spec([FakeTask("t", 0.25, 0.0, chance=0.25)]), "not clearly above chance (0.25)"),
        (Spec([FakeTask("t", 0.0, 0.0, chance=None)]), "not clearly above chance (0.00)"),
        (Spec([FakeTask("t", 0.9, 0.0, no_answer=0.6)]), "no answer could be extracted from"),
        (Spec(TASKS[:1], full=False), "full was not run"),
    ],
)
def test_sanity_gate(tmp_path: Path, spec: Spec, said: str) -> None:
    table = summarise(load_run(build(tmp_path / "run", spec)))[0]
    assert any(said in warning for warning in table.warnings)
    assert said.split("(")[0].strip() in terminal([table], 200)


def test_no_warning_where_all_is_well(tmp_path: Path) -> None:
    assert all(not t.warnings for t in summarise(load_run(build(tmp_path / "run", Spec(n=40)))))


def test_over_budget_is_marked_and_keeps_its_verdict(tmp_path: Path) -> None:
    table = summarise(load_run(build(tmp_path / "run", Spec(TASKS[2:3], METHODS[7:8], ("0.1", "0.5")))))[0]
    tight, loose = only(table, "shotkv", "0.1"), only(table, "shotkv", "0.5")
    assert (tight.over_budget, loose.over_budget, tight.verdict) == (True, False, "loss")
    assert "o" in wording.marks(tight, table.full)
    assert "@0.18" in terminal([table], 80)


def test_file_methods_are_shown_by_their_class(tmp_path: Path) -> None:
    lines = lines_of("full", [1.0] * 3)
    lines += lines_of("./value_norm.py:ValueNorm:recent=64", [1.0] * 3, cell="a")
    lines += lines_of("./value_norm.py:ValueNorm+kivi", [1.0] * 3, cell="b", decode={"ratio": "same"})
    (table,) = summarise(run_of(tmp_path, lines))
    assert [row.label for row in table.rows] == ["ValueNorm:recent=64", "ValueNorm+kivi [r_d same]"]
    shown = terminal([table], 120)
    assert "ValueNorm:recent=64" in shown
    assert "value_norm.py" not in shown
    assert as_json([table])[0]["cells"][0]["method"] == "./value_norm.py:ValueNorm:recent=64"


@pytest.mark.parametrize(
    ("methods", "shown"),
    [
        (["./a.py:V", "./a.py:V:w=1", "snapkv"], ["V", "V:w=1", "snapkv"]),
        (["./a.py:V:w=1", "./b.py:V:w=2"], ["./a.py:V:w=1", "./b.py:V:w=2"]),
        (["./a.py:V", "kvpress:V"], ["V", "kvpress:V"]),
        (["./a.py:V", "V"], ["./a.py:V", "V"]),
        (["./a.py:snapkv"], ["./a.py:snapkv"]),
        (["not a|method"], ["not a|method"]),
        (["./my dir/a.py:V:w='x y'+kivi:bits=2"], ["V:w='x y'+kivi:bits=2"]),
    ],
)
def test_short_names_stay_unambiguous(methods: list[str], shown: list[str]) -> None:
    assert list(names.shown(methods).values()) == shown


def test_terminal_matches_golden(tmp_path: Path) -> None:
    """Regenerate after a change that is meant: python -m tests.analysis.synthetic"""
    found = terminal(summarise(load_run(small(tmp_path / "golden"))), 80)
    assert found == (GOLDEN / "terminal.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_fits_its_width_and_loses_no_cell(tmp_path: Path, width: int) -> None:
    summary = summarise(load_run(build(tmp_path / "run", Spec(TASKS[1:3], METHODS, RATIOS, n=30))))
    shown = terminal(summary, width)
    assert max(map(len, shown.splitlines())) <= width
    cells = sum(len(t.cells()) for t in summary)
    scores = [
        word for word in shown.replace("@", " @").split() if len(word) == 4 and word[0] in "01" and word[1] == "."
    ]
    assert len(scores) >= cells


def test_losses_stand_out_with_and_without_colour(tmp_path: Path) -> None:
    from rich.console import Console

    from kvcli.cli.tables import SummaryView

    table = summarise(load_run(build(tmp_path / "run", Spec(TASKS[2:3], METHODS[1:2], ("0.1", "0.9")))))[0]
    console = Console(width=80, force_terminal=True, color_system="256", highlight=False)
    with console.capture() as captured:
        console.print(SummaryView([table]))
    lost = wording.points(only(table, "streaming_llm").difference.value) + "*"
    assert f"\x1b[1;38;5;208m{lost}" in captured.get(), "bold orange"
    assert lost in terminal([table], 80)


def test_json_is_plain_and_holds_every_number(tmp_path: Path) -> None:
    found = json.loads(json.dumps(as_json(summarise(load_run(small(tmp_path / "small"))))))
    cell = found[0]["cells"][0]
    assert {"score", "interval", "difference", "relative", "measured_ratio", "n", "flags", "verdict"} <= cell.keys()
    assert cell["difference"]["interval"].keys() == {"low", "high", "method", "note"}
    assert found[0]["columns"] == ["0.1", "0.3", "0.7"]


def test_worst_flip_names_a_sample_that_full_got_right(tmp_path: Path) -> None:
    run = load_run(build(tmp_path / "run", Spec(TASKS[:3], METHODS[1:3], ("0.1",))))
    found = worst_flip(run, summarise(run))
    assert found is not None
    task, sample = found
    scores = {
        run.cells[c].method: v
        for c, s, v in zip(run.cell, run.sample, run.score, strict=True)
        if run.cells[c].task == task and run.samples[s] == sample
    }
    assert (task, scores["full"], scores["streaming_llm"]) == ("tb_recall", 1.0, 0.0)


def test_worst_flip_is_none_without_a_loss(tmp_path: Path) -> None:
    run = load_run(build(tmp_path / "run", Spec(TASKS[:1], [FakeMethod("same", 0.0)], ("1",), n=5)))
    assert worst_flip(run, summarise(run)) is None


def test_equal_counts_share_one_score_interval() -> None:
    from kvcli.analysis.statistics.proportions import wilson

    assert wilson(3, 10) is wilson(3, 10)
    assert wilson(3, 10) != wilson(3, 10, 0.99)
