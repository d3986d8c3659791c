"""kvcli.analysis.figures.files: files, pages, what is never mixed, and that nothing on a page overlaps."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from kvcli.analysis.figures import files as plots
from kvcli.analysis.figures import sheets as sheets_of
from kvcli.analysis.figures.files import plot, sheets
from kvcli.analysis.figures.kinds import KINDS, chosen
from kvcli.analysis.figures.style import style
from kvcli.analysis.reading.load import load_run
from kvcli.errors import KvcliError
from tests.analysis import figure_runs
from tests.analysis.synthetic import GOLDEN, METHODS, RATIOS, TASKS, FakeMethod, Spec, build, small


def close(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[k], v) for k, v in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == (pytest.approx(expected, abs=1e-6) if isinstance(expected, float) else expected)


def of(folder: Path, kinds: str = "") -> dict[str, Any]:
    return dict(sheets(load_run(folder), None, chosen([kinds] if kinds else [])))


def test_data_behind_the_default_figures_match_golden(tmp_path: Path) -> None:
    """Regenerate after a change that is meant: python -m tests.analysis.synthetic"""
    written = plot(load_run(small(tmp_path / "golden")), tmp_path / "figures", ("png",))
    names = [f"{figure}-{mode}" for figure in ("difference", "score") for mode in ("compressed", "prefill")]
    assert [p.name for p in written] == [f"{n}.png" for n in names] + [f"{n}.json" for n in names]
    assert all(p.stat().st_size > 10_000 for p in written if p.suffix == ".png")
    for name in names:
        found = json.loads((tmp_path / "figures" / f"{name}.json").read_text())
        assert close(found, json.loads((GOLDEN / f"{name}.json").read_text())), name


def test_data_behind_all_other_figures_match_golden(tmp_path: Path) -> None:
    """Regenerate after a change that is meant: python -m tests.analysis.figure_runs"""
    found = figure_runs.data(tmp_path)
    assert set(found) == {path.stem for path in figure_runs.GOLDEN.glob("*.json")}
    drawn = {json.loads(text)["figure"] for text in found.values()}
    assert drawn | {"difference", "score"} == set(KINDS)
    for name, text in found.items():
        assert close(json.loads(text), json.loads((figure_runs.GOLDEN / f"{name}.json").read_text())), name


def test_same_data_same_bytes_and_nothing_global_changes(tmp_path: Path) -> None:
    run = load_run(build(tmp_path / "run", Spec(TASKS[:1], METHODS[1:2], n=5)))
    before = dict(mpl.rcParams)
    for name in ("a", "b"):
        plot(run, tmp_path / name, ("png", "pdf", "svg"))
    assert dict(mpl.rcParams) == before
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_pyplot_is_not_used() -> None:
    code = "import kvcli.analysis.figures.files, matplotlib.figure, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    files = sorted(Path(plots.__file__).parent.glob("*.py"))
    assert len(files) > 10
    for file in files:
        assert "pyplot" not in file.read_text(encoding="utf-8").replace("no pyplot", ""), file


def test_names_titles_and_points(tmp_path: Path) -> None:
    spec = Spec(TASKS[1:3], (METHODS[7], FakeMethod("kivi:bits=2", 0.6, ratios=("own",))), ("0.1", "0.5"), n=30)
    found = of(build(tmp_path / "run", spec))
    assert list(found) == ["difference", "score"]
    sheet = found["difference"]
    assert sheet.title == "Difference to the full cache: testbed"
    assert sheet.subtitle == "n = 30 per point, first token compressed, query aware, 95 % paired intervals"
    assert sheet.x == "measured ratio (bytes kept / 16-bit full)"
    shot, own = sheet.panels[0].series
    assert [(p.asked, round(p.x, 2), p.marks) for p in shot.points] == [
        ("0.1", 0.18, ("over budget",)),
        ("0.5", 0.5, ()),
    ]
    assert [(p.asked, p.x) for p in own.points] == [("own", 0.25)]
    score = found["score"].panels[0]
    assert score.chance == 0.25
    assert score.full is not None
    assert "not for comparing methods" in found["score"].subtitle


def test_file_methods_are_named_by_their_class(tmp_path: Path) -> None:
    method = FakeMethod("./value_norm.py:ValueNorm:recent=64", 0.5)
    sheet = of(build(tmp_path / "run", Spec(TASKS[1:2], [method], ("0.1", "0.5"), n=20)))["difference"]
    (series,) = sheet.panels[0].series
    assert (series.key, series.label) == (method.name, "ValueNorm:recent=64")


def test_flagged_cells_are_marked(tmp_path: Path) -> None:
    sheet = of(figure_runs.plain(tmp_path / "run"))["difference"]
    marks = {(s.key, p.asked): p.marks for s in sheet.panels[0].series for p in s.points}
    assert marks["shotkv", "0.1"] == ("over budget",)
    assert marks["shotkv", "0.3"] == ("fallback",)
    assert marks["quest", "own"] == ("simulated",)
    assert marks["snapkv", "0.1"] == ()


def test_short_prompts_are_marked_above_a_twentieth(tmp_path: Path) -> None:
    for short, expected in ((2, ()), (10, (sheets_of.NOOP,))):
        run = build(tmp_path / str(short), Spec(TASKS[:1], METHODS[1:2], ("0.1", "0.2"), n=40, noop=short))
        point = of(run)["difference"].panels[0].series[0].points[0]
        assert (point.marks, point.flags) == (expected, {"noop": short})


def test_without_full_only_what_needs_none_is_drawn(tmp_path: Path) -> None:
    run = build(tmp_path / "run", Spec(TASKS[:1], METHODS[:1], full=False))
    assert list(of(run)) == ["score"]
    assert list(of(run, "all")) == ["score"]


def test_one_sample_has_no_graded_interval(tmp_path: Path) -> None:
    run = build(tmp_path / "run", Spec(TASKS[-1:], METHODS[1:2], n=1))
    point = of(run)["difference"].panels[0].series[0].points[0]
    assert (point.n, point.low, point.high) == (1, None, None)
    plot(load_run(run), tmp_path / "figures", ("png",), kinds=chosen(["all"]))


def test_one_ratio_makes_rows(tmp_path: Path) -> None:
    sheet = of(build(tmp_path / "run", Spec(TASKS[:2], METHODS[1:5], ("0.1",), n=8)))["difference"]
    assert (sheet.layout, sheet.asked) == ("rows", ("0.1",))


def test_many_methods_make_rows_with_few_sizes_and_panels_with_many(tmp_path: Path) -> None:
    methods = [FakeMethod(f"method_{i}", 0.5) for i in range(13)]
    few = of(build(tmp_path / "few", Spec(TASKS[:2], methods, ("0.1", "0.5"), n=4)))
    assert (few["difference"].layout, few["difference"].asked) == ("rows", ("0.1", "0.5"))
    many = of(build(tmp_path / "many", Spec(TASKS[:2], methods, RATIOS, n=4)))
    assert list(many) == ["difference-1", "difference-2", "score-1", "score-2"]
    sheet = many["difference-1"]
    assert (sheet.layout, sheet.keys) == ("lines", "task")
    assert [panel.title for panel in sheet.panels] == [f"method_{i}" for i in range(7)]
    assert [series.label for series in sheet.panels[0].series] == ["tb_knowledge", "tb_choice"]
    pairs = {(s.key, p.asked, p.y) for panel in few["difference"].panels for s in panel.series for p in s.points}
    assert len(pairs) > 13


def test_many_panels_go_to_further_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheets_of, "PANELS_PER_PAGE", 2)
    found = of(build(tmp_path / "run", Spec(TASKS[:3], METHODS[1:2], ("0.1", "0.3"), n=5)))
    assert list(found) == ["difference-1", "difference-2", "score-1", "score-2"]
    assert [len(s.panels) for s in found.values()] == [2, 1, 2, 1]


AXES = {
    "query": ("agnostic", "difference-aware difference-agnostic"),
    "first_token": ("prefill", "difference-compressed difference-prefill"),
    "weights": ("sparsegpt:sparsity=0.5", "difference-dense difference-sparsegpt-sparsity-0.5"),
    "shot_seed": (3, "difference-shots0 difference-shots3"),
    "shot_order": (2, "difference-order0 difference-order2"),
}


@pytest.mark.parametrize("axis", AXES)
def test_modes_have_figures_of_their_own(tmp_path: Path, axis: str) -> None:
    other, expected = AXES[axis]
    cells = []
    for change in ({}, {axis: other}):
        cells.append(figure_runs.cell("gsm8k", "full", **change))
        cells += [figure_runs.cell("gsm8k", "snapkv", ratio, harm=0.9, **change) for ratio in ("0.1", "0.5")]
    found = of(figure_runs.folder(tmp_path / "run", cells), "difference")
    assert " ".join(found) == expected
    for sheet in found.values():
        assert [len(s.points) for panel in sheet.panels for s in panel.series] == [2]
    assert len({sheet.subtitle for sheet in found.values()}) == 2


def test_numbers_of_shots_have_panels_of_their_own(tmp_path: Path) -> None:
    sheet = of(figure_runs.shots(tmp_path / "run"), "difference")["difference"]
    assert [panel.title for panel in sheet.panels][:3] == ["gsm8k, 0 shots", "gsm8k, 2 shots", "gsm8k, 8 shots"]


def test_budgets_matched_bytes_and_decode_ratios_are_drawn_at_their_measured_ratio(tmp_path: Path) -> None:
    cells = [
        figure_runs.cell("gsm8k", "full"),
        figure_runs.cell("gsm8k", "snapkv", None, budget=64, kept=0.15),
        figure_runs.cell("gsm8k", "snapkv", None, budget=128, kept=0.3),
        figure_runs.cell("gsm8k", "kivi", None, bits=5, kept=1.0),
        figure_runs.cell("gsm8k", "h2o", None, match="kivi", kept=0.31),
        figure_runs.cell("gsm8k", "tova", "0.3", decode={"ratio": "0.3", "interval": 1}),
    ]
    run = figure_runs.folder(tmp_path / "run", cells)
    found = of(run, "all")
    lines = {s.label: [(p.asked, round(p.x, 2)) for p in s.points] for s in found["difference"].panels[0].series}
    assert lines == {
        "snapkv": [("64 KV", 0.15), ("128 KV", 0.3)], "kivi": [("= kivi", 0.31)], "h2o": [("= kivi", 0.31)],
        "tova [r_d 0.3]": [("0.3", 0.3)],
    }  # fmt: skip
    assert found["pareto"].x.startswith("cache of the prompt and answer")
    assert {grid.asked for grid in found["heatmap"].grids} == {"0.3", "64 KV", "128 KV", "= kivi"}


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    run = load_run(build(tmp_path / "run", Spec(n=3)))
    with pytest.raises(KvcliError, match="unknown format 'gif'"):
        plot(run, tmp_path / "figures", ("png", "gif"))
    assert not (tmp_path / "figures").exists()


# --- nothing overlaps -------------------------------------------------------------------------------------------------


def _boxes(figure: Any) -> tuple[Any, list[tuple[str, Any]]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    boxes = [(f"axes {i}", ax.get_tightbbox(renderer)) for i, ax in enumerate(shown)]
    boxes += [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts if text.get_text()]
    boxes += [("legend", legend.get_window_extent(renderer)) for legend in figure.legends]
    return figure.bbox, boxes


def check_page(sheet: Any, look: Any, name: str) -> None:
    """Everything lies on the page; no two parts overlap. Tilted names of a heat map reach over a corner of the next."""
    with mpl.rc_context(look.rc()):
        page, boxes = _boxes(KINDS[sheet.figure].draw(sheet, look))
    outer = page.padded(1)
    for i, (what, box) in enumerate(boxes):
        inside = outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1
        assert inside, (name, what, box, page)
        for other, further in boxes[i + 1 :]:
            if sheet.figure == "heatmap" and what.startswith("axes") and other.startswith("axes"):
                continue
            assert not box.padded(-1).overlaps(further.padded(-1)), (name, what, other, box, further)


LONG = "some-organisation/A-Rather-Long-Model-Name-8B-Instruct@main"
SPECS = {
    "eight-by-nine": Spec(TASKS, METHODS, RATIOS, n=8),
    "five-tasks": Spec(TASKS[:5], METHODS[:2], ("0.1", "0.5"), n=20, noop=10),
    "one-task-long-model": Spec(TASKS[:1], METHODS[:3], ("0.1",), n=20, model=LONG),
    "long-names": Spec(
        TASKS[:2], [FakeMethod(f"./my $methods/mine_{i}$.py:M:w={i},k=7", 0.5) for i in range(14)], ("0.1",), n=4
    ),
    "thirty-methods": Spec(TASKS[:3], [FakeMethod(f"method_{i}:window=16", 0.5) for i in range(30)], ("0.1", "0.3"),
                           n=4),
    "sixteen-methods-many-ratios": Spec(TASKS[:2], [FakeMethod(f"m{i}", 0.5) for i in range(16)], RATIOS, n=4),
    "one-method-one-task": Spec(TASKS[:1], METHODS[1:2], ("0.1", "0.5"), n=4),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_nothing_overlaps_or_leaves_the_page(tmp_path: Path, name: str) -> None:
    for figure, sheet in of(build(tmp_path / "run", SPECS[name]), "score,heatmap").items():
        check_page(sheet, style(), figure)


@pytest.mark.parametrize("name", ["eight-by-nine", "one-task-long-model", "thirty-methods"])
def test_nothing_overlaps_in_print(tmp_path: Path, name: str) -> None:
    for figure, sheet in of(build(tmp_path / "run", SPECS[name]), "difference,heatmap").items():
        check_page(sheet, style("paper"), figure)


@pytest.mark.parametrize("look", ["screen", "paper"])
def test_nothing_overlaps_in_all_other_kinds(tmp_path: Path, look: str) -> None:
    from kvcli.analysis.figures import bars

    for make, kinds in ((figure_runs.plain, "relative,kl,top1,pareto"), (figure_runs.shots, "shots,gain,heatmap"),
                        (figure_runs.needles, "needle,heatmap")):  # fmt: skip
        for name, sheet in of(make(tmp_path / make.__name__), kinds).items():
            check_page(sheet, style(look), name)
    for one in bars.load(figure_runs.bench(tmp_path / "bench")):
        for kind in ("latency", "throughput"):
            for sheet in KINDS[kind].build(one):
                check_page(sheet, style(look), kind)


def test_every_sheet_becomes_json(tmp_path: Path) -> None:
    for sheet in of(figure_runs.plain(tmp_path / "run"), "all").values():
        found = json.loads(plots.data_text(sheet))
        assert found.keys() == {field.name for field in dataclasses.fields(sheet)}
