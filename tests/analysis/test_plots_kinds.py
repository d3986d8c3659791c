"""What each kind of figure shows, against the records by hand; filters; the command line."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from kvcli.analysis.figures import bars, heatmap
from kvcli.analysis.figures.files import sheets
from kvcli.analysis.figures.kinds import KINDS, chosen
from kvcli.analysis.figures.style import style
from kvcli.analysis.figures.values import mean_interval
from kvcli.analysis.figures.views import filtered, subset
from kvcli.analysis.reading.load import load_run
from kvcli.analysis.statistics import stats
from kvcli.analysis.tables.build import summarise
from kvcli.analysis.tables.judged import judge_tables
from kvcli.cli.app import main
from kvcli.errors import KvcliError
from kvcli.grammar import parse_ratios
from tests.analysis import figure_runs


def of(folder: Path, kind: str) -> list[Any]:
    return [sheet for _, sheet in sheets(load_run(folder), None, chosen([kind]))]


def records(folder: Path) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in (folder / "samples.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[record["task"], record["shots"], record["method"], record["ratio"]].append(record)
    return found


def mean(lines: list[dict[str, Any]], *path: str) -> float:
    values = []
    for line in lines:
        value: Any = line
        for name in path:
            value = value[name]
        values.append(value)
    return float(np.mean(values))


def test_relative_change_kl_and_top1_are_means_of_the_records(tmp_path: Path) -> None:
    run = figure_runs.plain(tmp_path / "run")
    lines = records(run)
    (relative,), (kl,), (top1,) = (of(run, kind) for kind in ("relative", "kl", "top1"))
    for sheet, expected in (
        (relative, lambda new, old: 100 * (mean(new, "score") / mean(old, "score") - 1)),
        (kl, lambda new, old: mean(new, "fidelity", "kl")),
        (top1, lambda new, old: mean(new, "fidelity", "top1")),
    ):
        for panel in sheet.panels:
            full = lines[panel.key, 8, "full", None]
            for series in panel.series:
                for p in series.points:
                    asked = None if p.asked == "own" else p.asked
                    assert p.y == pytest.approx(expected(lines[panel.key, 8, series.key, asked], full)), p
                    assert p.low is None or p.low <= p.y + 1e-9 <= p.high + 2e-9
    assert all(p.low >= -100 for panel in relative.panels for s in panel.series for p in s.points)


def test_intervals_of_kl_stay_above_zero_and_say_nothing_where_all_agree() -> None:
    none = np.full(30, -1, np.int32)
    spread = np.linspace(0, 2, 30)
    found = mean_interval(spread, none, np.inf)
    assert found is not None
    assert 0 < found.low < spread.mean() < found.high
    assert found.method == "BCa bootstrap"
    few = np.zeros(30)
    few[:2] = 0.5
    found = mean_interval(few, none, np.inf)
    assert found is not None
    assert (found.low, found.method) == (0.0, "t")
    assert mean_interval(np.zeros(30), none, np.inf) is None
    clustered = mean_interval(spread, np.repeat(np.arange(3), 10).astype(np.int32), np.inf)
    assert clustered is not None
    assert clustered.method == "t over 3 clusters"


def test_heat_map_has_each_cell_once_and_methods_of_their_own_size_apart(tmp_path: Path) -> None:
    run = figure_runs.plain(tmp_path / "run")
    lines = records(run)
    sized, own = of(run, "heatmap")
    assert [grid.asked for grid in sized.grids] == ["0.1", "0.3", "0.6"]
    assert (list(sized.methods), list(own.methods)) == (["snapkv", "h2o", "shotkv"], ["quest", "kivi:bits=4"])
    boxes = [(grid.asked, box) for grid in sized.grids for box in grid.boxes]
    assert len({(asked, box.task, box.method) for asked, box in boxes}) == len(boxes) == 18
    for asked, box in boxes:
        new, old = lines[box.task, 8, box.method, asked], lines[box.task, 8, "full", None]
        assert box.y == pytest.approx(100 * (mean(new, "score") - mean(old, "score")))
    assert {box.established for _, box in boxes} == {True, False}
    assert {box.marks for _, box in boxes if box.method == "shotkv"} == {("over budget",), ("fallback",)}


def test_stars_of_the_heat_map_are_the_verdicts_of_the_report_also_where_only_some_cells_are_drawn(
    tmp_path: Path,
) -> None:
    run = load_run(figure_runs.plain(tmp_path / "run"))
    tables = summarise(run)
    judged = judge_tables(run, tables)
    cells = {(cell.column, t.task, cell.method): cell for t in tables for cell in t.cells()}
    part = filtered(run, ["h2o"], ["gsm8k"], [])
    alone = 0
    for some in (run, part):
        for _, sheet in sheets(some, None, chosen(["heatmap"]), run):
            assert sheet.family == judged.family.size == len(cells)
            for grid in sheet.grids:
                for box in grid.boxes:
                    cell = cells[grid.asked, box.task, box.method]
                    assert box.established == (judged.of(cell).kind in ("loss", "gain"))
                    alone += cell.verdict != "open" and not box.established
    assert alone  # cells that only their own interval would call a loss


def test_the_command_line_judges_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = load_run(figure_runs.plain(Path("runs/demo")))
    assert main("plot demo --kind heatmap --task gsm8k -M h2o --out f --format png".split()) == 0
    found = json.loads(Path("f/heatmap.json").read_text())
    assert found["family"] == judge_tables(run, summarise(run)).family.size > len(found["grids"])


@pytest.mark.parametrize(
    ("points", "expected"),
    [(-2.5, "−3"), (2.5, "+3"), (-12.5, "−13"), (100 * -0.145, "−15"), (0.0, "0"), (-0.4, "−0.4"), (0.96, "+1"),
     (-1e-12, "0"), (-100.0, "−100"), (0.04, "0")],
)  # fmt: skip
def test_halves_are_rounded_away_from_zero_and_small_differences_are_not_none(points: float, expected: str) -> None:
    assert heatmap.rounded(points) == expected


def test_bytes_that_a_method_reads_stand_beside_the_full_bytes_it_holds(tmp_path: Path) -> None:
    (sheet,) = of(figure_runs.plain(tmp_path / "run"), "pareto")
    assert sheet.subtitle.endswith("quest: nothing is freed")
    for panel in sheet.panels:
        read = {spot.method: (spot.bytes, spot.read) for spot in panel.spots if spot.read is not None}
        assert read == {"quest": (figure_runs.FULL_BYTES, int(0.2 * figure_runs.FULL_BYTES))}
    look = style()
    with mpl.rc_context(look.rc()):
        figure = KINDS["pareto"].draw(sheet, look)
    said = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"faded: not on the front", "to what a new token reads"} <= said


def test_no_method_beats_one_on_the_front(tmp_path: Path) -> None:
    run = figure_runs.plain(tmp_path / "run")
    lines = records(run)
    (sheet,) = of(run, "pareto")
    for panel in sheet.panels:
        for spot in panel.spots:
            asked = None if spot.asked == "own" else spot.asked
            mine = lines[panel.task, 8, spot.method, asked]
            assert (spot.bytes, spot.score) == (mean(mine, "kv_bytes", "prefill"), mean(mine, "score"))
            better = [s for s in panel.spots if s.bytes <= spot.bytes and s.score >= spot.score
                      and (s.bytes, s.score) != (spot.bytes, spot.score)]  # fmt: skip
            assert spot.front == (not better)
        assert any(spot.front for spot in panel.spots)
        assert panel.full == (figure_runs.FULL_BYTES, mean(lines[panel.task, 8, "full", None], "score"))


def test_shots_are_lines_of_their_own_and_the_mean_leaves_out_who_is_over_budget(tmp_path: Path) -> None:
    run = figure_runs.shots(tmp_path / "run")
    lines = records(run)
    loss, score = (s for s in of(run, "shots") if "gsm8k" in s.part)
    assert [panel.title for panel in loss.panels] == ["mean of 2 methods", "snapkv", "h2o", "shotkv"]
    assert loss.panels[0].subtitle == "h2o, snapkv"
    assert [series.label for series in loss.panels[0].series] == ["0 shots", "2 shots", "8 shots"]
    for series in loss.panels[0].series:
        for p in series.points:
            key = int(series.key)
            each = [mean(lines["gsm8k", key, m, p.asked], "score") for m in ("snapkv", "h2o")]
            full = mean(lines["gsm8k", key, "full", None], "score")
            assert p.y == pytest.approx(100 * (np.mean(each) - full))
            assert p.low <= p.y <= p.high
    assert [p.asked for p in score.panels[0].series[0].points] == ["0.1", "0.4", "full"]


def test_gain_is_full_with_most_shots_less_full_with_least(tmp_path: Path) -> None:
    run = figure_runs.shots(tmp_path / "run")
    lines = records(run)
    (sheet,) = of(run, "gain")
    assert [(panel.asked, panel.methods) for panel in sheet.panels] == [
        ("0.1", ("h2o", "shotkv", "snapkv")), ("0.4", ("h2o", "shotkv", "snapkv")),
    ]  # fmt: skip
    assert "95 % paired intervals" in sheet.subtitle
    for panel in sheet.panels:
        for dot in panel.dots:
            most, least = (mean(lines[dot.task, count, "full", None], "score") for count in (8, 0))
            assert (dot.least, dot.most, dot.gain.paired) == (0, 8, True)
            assert dot.gain.value == pytest.approx(100 * (most - least))
            each = [mean(lines[dot.task, 8, m, panel.asked], "score") for m in panel.methods]
            assert dot.loss.value == pytest.approx(100 * (np.mean(each) - most))


def test_gain_of_other_prompts_has_newcombes_interval_of_two_independent_proportions(tmp_path: Path) -> None:
    cells = []
    for task in ("tb_code", "tb_recall"):
        for count, level in ((1, 0.4), (8, 0.95)):
            more: dict[str, Any] = {"shots": count, "level": level, "ids": f"{count}shots-"}
            cells += [figure_runs.cell(task, "full", **more), figure_runs.cell(task, "snapkv", "0.1", **more)]
    run = figure_runs.folder(tmp_path / "run", cells)
    (sheet,) = of(run, "gain")
    assert "gains of different prompts" in sheet.subtitle
    lines = records(run)
    for dot in sheet.panels[0].dots:
        few, many = (int(sum(r["score"] for r in lines[dot.task, c, "full", None])) for c in (1, 8))
        p1, p2, one, two = many / 20, few / 20, stats.wilson(many, 20), stats.wilson(few, 20)
        low = p1 - p2 - ((p1 - one.low) ** 2 + (two.high - p2) ** 2) ** 0.5
        high = p1 - p2 + ((one.high - p1) ** 2 + (p2 - two.low) ** 2) ** 0.5
        assert (dot.gain.low, dot.gain.high) == (pytest.approx(100 * low), pytest.approx(100 * high))


def test_needle_map_joins_lengths_and_keeps_other_settings_apart(tmp_path: Path) -> None:
    run = figure_runs.needles(tmp_path / "run")
    (sheet,) = of(run, "needle")
    assert (sheet.lengths, sheet.depths) == ((1024.0, 4096.0, 16384.0), (0.0, 0.25, 0.5, 0.75, 1.0))
    assert [(m.method, m.asked) for m in sheet.maps] == [
        ("full", "full"), ("snapkv", "0.1"), ("snapkv", "0.4"), ("streaming_llm", "0.1"), ("streaming_llm", "0.4"),
    ]  # fmt: skip
    lines = records(run)
    for one in sheet.maps:
        assert len(one.spots) == 15
        for spot in one.spots:
            ratio = None if one.method == "full" else one.asked
            mine = lines[f"niah:length={spot.length:g}", 0, one.method, ratio]
            here = [r["score"] for r in mine if r["extra"]["depth"] == spot.depth]
            assert (spot.score, spot.n) == (pytest.approx(np.mean(here)), len(here))
    more = [
        figure_runs.cell(f"niah:length={n},needle={kind}", method, ratio, needles=True, length=n)
        for n in (100, 200) for kind in ("city", "number") for method, ratio in (("full", None), ("h2o", "0.1"))
    ]  # fmt: skip
    found = sheets(load_run(figure_runs.folder(tmp_path / "two", more)), None, chosen(["needle"]))
    assert [name for name, _ in found] == ["needle-niah-needle-city", "needle-niah-needle-number"]
    assert all(sheet.lengths == (100.0, 200.0) for _, sheet in found)


def test_bench_shows_the_last_command_alone(tmp_path: Path) -> None:
    one, four = bars.load(figure_runs.bench(tmp_path / "bench", commands=3))
    assert (one.suffix, four.suffix) == (("batch-1",), ("batch-4",))
    (sheet,) = KINDS["latency"].build(one)
    assert [panel.name for panel in sheet.panels] == [label for _, label, _ in bars.PHASES]
    full = sheet.panels[0].bars[0]
    assert (full.method, full.value, full.low, full.high, full.repeats) == (
        "full", pytest.approx(600), pytest.approx(570), pytest.approx(660), 3,
    )  # fmt: skip
    assert [(b.method, b.asked) for b in sheet.panels[0].bars[1:]] == [
        ("snapkv", "0.2"), ("snapkv", "0.5"), ("h2o", "0.2"), ("h2o", "0.5"),
    ]  # fmt: skip
    assert "n = 3 repeats, batch 1, 512 prompt tokens, 32 new tokens" in sheet.subtitle


def test_decode_settings_have_labels_of_their_own_and_storage_is_said(tmp_path: Path) -> None:
    path = figure_runs.bench(tmp_path / "bench") / "bench.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in [line for line in lines if line["method"] == "h2o" and line["ratio"] == 0.2]:
        lines.append({**line, "decode": {"ratio": "0.5", "interval": 1}})
    for line in lines:
        line["storage"] = "read" if line["method"] == "snapkv" else "stored" if line["method"] == "h2o" else "pairs"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (sheet,) = KINDS["latency"].build(bars.load(path.parent)[0])
    names = [(b.method, b.asked) for b in sheet.panels[0].bars]
    assert ("h2o", "0.2 (r_d 0.5)") in names
    assert len(set(names)) == len(names) == 6
    assert "snapkv: simulated, nothing is freed, stored forms are read back without a fused kernel" in sheet.subtitle
    plain = KINDS["latency"].build(bars.load(figure_runs.bench(tmp_path / "plain"))[0])[0].subtitle
    assert "freed" not in plain
    assert "stored" not in plain


def test_one_repeat_is_one(tmp_path: Path) -> None:
    path = figure_runs.bench(tmp_path / "bench") / "bench.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for found in (line["tokens_per_second"], *line["seconds"].values()):
            found["all"] = found["all"][:1]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert KINDS["latency"].build(bars.load(path.parent)[0])[0].subtitle.startswith("n = 1 repeat, batch 1")


def test_a_busy_machine_is_marked(tmp_path: Path) -> None:
    path = figure_runs.bench(tmp_path / "bench") / "bench.jsonl"
    path.write_text(path.read_text().replace('"cpu_share":0.99', '"cpu_share":0.5', 1))
    (sheet,) = KINDS["throughput"].build(bars.load(path.parent)[0])
    assert [b.busy for b in sheet.panels[0].bars] == [True, False, False, False, False]
    assert "the machine was busy" in sheet.subtitle


def test_lines_that_are_no_measurements_are_named(tmp_path: Path) -> None:
    path = figure_runs.bench(tmp_path / "bench") / "bench.jsonl"
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(KvcliError, match=r"bench.jsonl:1 is not a measurement"):
        bars.load(path.parent)


# --- filters ----------------------------------------------------------------------------------------------------------


def test_filters_keep_full_and_what_they_name(tmp_path: Path) -> None:
    run = load_run(figure_runs.plain(tmp_path / "run"))

    def kept(methods: str = "", tasks: str = "", ratios: str = "") -> set[tuple[str, str, str | None]]:
        wanted = filtered(run, methods.split(), tasks.split(), parse_ratios(ratios.split()))
        assert set(np.unique(wanted.cell)) == set(range(len(wanted.cells)))
        return {(c.task, c.method, c.ratio) for c in wanted.cells}

    assert kept() == {(c.task, c.method, c.ratio) for c in run.cells}
    assert kept("kivi", "mmlu") == {("mmlu", "full", None), ("mmlu", "kivi:bits=4", None)}
    assert kept("kivi:bits=4 h2o", "gsm*", "0.1") == {("gsm8k", "full", None), ("gsm8k", "h2o", "0.1")}
    assert {r for _, _, r in kept(ratios="0.10,0.3")} == {None, "0.1", "0.3"}
    for wrong in ({"methods": "tova"}, {"tasks": "hotpotqa"}, {"ratios": "0.9"}, {"methods": "kivi", "ratios": "0.1"}):
        with pytest.raises(KvcliError, match="matches"):
            kept(**wrong)


def test_a_subset_has_the_same_numbers(tmp_path: Path) -> None:
    run = load_run(figure_runs.needles(tmp_path / "run"))
    some = subset(run, [code for code, cell in enumerate(run.cells) if cell.method != "snapkv"])
    assert {cell.method for cell in some.cells} == {"full", "streaming_llm"}
    every = {name: sheet for name, sheet in sheets(run) if name == "difference"}["difference"]
    fewer = {name: sheet for name, sheet in sheets(some) if name == "difference"}["difference"]
    assert [p.series[-1] for p in every.panels] == [p.series[-1] for p in fewer.panels]


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return figure_runs.plain(Path("runs/demo"))


def test_kinds_filters_style_and_theme_from_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "plot demo --kind heatmap,difference --task gsm8k -M h2o -M snapkv -r 0.1,0.3 --style paper --theme dark"
    assert main([*words.split(), "--out", "f"]) == 0
    written = capsys.readouterr().out.split()
    assert written == ["f/difference.pdf", "f/heatmap.pdf", "f/difference.json", "f/heatmap.json"]
    found = json.loads(Path("f/difference.json").read_text())
    assert [panel["title"] for panel in found["panels"]] == ["gsm8k"]
    assert [s["key"] for s in found["panels"][0]["series"]] == ["snapkv", "h2o"]


def test_all_says_what_is_missing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "demo", "--kind", "all", "--format", "svg"]) == 0
    said = capsys.readouterr()
    assert "runs/demo/figures/pareto.svg" in said.out
    assert "no shots: it needs one task with several numbers of shots" in said.err
    assert "latency" not in said.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--kind violin", "unknown kind of figure 'violin'"),
        ("--kind needle", "nothing to draw in runs/demo"),
        ("--style poster", "unknown style 'poster'"),
        ("--theme blue", "unknown theme 'blue'"),
        ("--method tova", "matches 'tova'"),
        ("--ratio 2", "out of range"),
        ("--format gif", "unknown format 'gif'"),
    ],
)
def test_wrong_words_are_one_message(run: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    assert main(["plot", "demo", *words.split()]) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert "try:" in said.err
    assert not (run / "figures").exists()


def test_a_folder_of_bench_has_its_own_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure_runs.bench(Path("runs/bench-testbed"))
    assert main(["plot", "runs/bench-testbed", "--format", "png"]) == 0
    names = [Path(path).name for path in capsys.readouterr().out.split() if path.endswith("png")]
    assert names == [f"{kind}-batch-{n}.png" for kind in ("latency", "throughput") for n in (1, 4)]
    assert main(["plot", "bench-testbed", "--kind", "throughput", "--format", "png", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["figures"]) == 2
    assert main(["plot", "runs/bench-testbed", "--method", "h2o"]) == 2
    assert "filters are for results of a sweep" in capsys.readouterr().err
