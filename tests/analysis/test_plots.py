from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from kvcli.analysis import plots
from kvcli.analysis.load import load_run
from kvcli.analysis.plots import plot, sheets
from kvcli.analysis.tables import summarise
from kvcli.errors import KvcliError
from tests.analysis.synthetic import GOLDEN, METHODS, RATIOS, TASKS, FakeMethod, Spec, build, small


def close(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[k], v) for k, v in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == (pytest.approx(expected, abs=1e-6) if isinstance(expected, float) else expected)


def test_data_behind_the_figures_match_golden(tmp_path: Path) -> None:
    """Regenerate after a change that is meant: python -m tests.analysis.synthetic"""
    written = plot(load_run(small(tmp_path / "golden")), tmp_path / "figures", ("png",))
    names = [f"{figure}-{mode}" for figure in ("difference", "score") for mode in ("compressed", "prefill")]
    assert [p.name for p in written] == [f"{n}.png" for n in names] + [f"{n}.json" for n in names]
    assert all(p.stat().st_size > 10_000 for p in written if p.suffix == ".png")
    for name in names:
        found = json.loads((tmp_path / "figures" / f"{name}.json").read_text())
        assert close(found, json.loads((GOLDEN / f"{name}.json").read_text())), name


def test_same_data_same_bytes_and_nothing_global_changes(tmp_path: Path) -> None:
    run = load_run(build(tmp_path / "run", Spec(TASKS[:1], METHODS[1:2], n=5)))
    before = dict(mpl.rcParams)
    for name in ("a", "b"):
        plot(run, tmp_path / name, ("png", "pdf", "svg"))
    assert dict(mpl.rcParams) == before
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_pyplot_is_not_used() -> None:
    import subprocess

    code = "import kvcli.analysis.plots, matplotlib.figure, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "pyplot" not in Path(plots.__file__).read_text(encoding="utf-8").replace("no pyplot", "")


def test_names_titles_and_points(tmp_path: Path) -> None:
    spec = Spec(TASKS[1:3], (METHODS[7], FakeMethod("kivi:bits=2", 0.6, ratios=("own",))), ("0.1", "0.5"), n=30)
    run = load_run(build(tmp_path / "run", spec))
    found = dict(sheets(run, summarise(run)))
    assert list(found) == ["difference", "score"]
    sheet = found["difference"]
    assert sheet.title == "Difference to the full cache: testbed"
    assert "n = 30 per point" in sheet.subtitle
    assert sheet.x == "measured ratio (bytes kept / 16-bit full)"
    shot, own = sheet.panels[0].series
    assert [(p.asked, round(p.x, 2), p.hollow) for p in shot.points] == [("0.1", 0.18, True), ("0.5", 0.5, False)]
    assert [(p.asked, p.x) for p in own.points] == [("own", 0.25)]
    score = found["score"].panels[0]
    assert score.chance == 0.25
    assert score.full is not None


def test_file_methods_are_named_by_their_class(tmp_path: Path) -> None:
    method = FakeMethod("./value_norm.py:ValueNorm:recent=64", 0.5)
    run = load_run(build(tmp_path / "run", Spec(TASKS[1:2], [method], ("0.1",), n=20)))
    sheet = dict(sheets(run, summarise(run)))["difference"]
    assert sheet.panels[0].series[0].method == method.name
    assert plots._legend(sheet, [method.name])[1][0] == "ValueNorm:recent=64"


def test_hollow_points_for_short_prompts(tmp_path: Path) -> None:
    run = load_run(build(tmp_path / "run", Spec(TASKS[:1], METHODS[1:2], ("0.1",), n=40, noop=10)))
    (point,) = dict(sheets(run, summarise(run)))["difference"].panels[0].series[0].points
    assert point.hollow
    assert point.flags == {"noop": 10}


def test_without_full_only_scores_are_drawn(tmp_path: Path) -> None:
    run = load_run(build(tmp_path / "run", Spec(TASKS[:1], METHODS[:1], full=False)))
    assert [name for name, _ in sheets(run, summarise(run))] == ["score"]


def test_many_panels_go_to_further_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "PANELS_PER_PAGE", 2)
    run = load_run(build(tmp_path / "run", Spec(TASKS[:3], METHODS[1:2], ("0.1",), n=5)))
    found = dict(sheets(run, summarise(run)))
    assert list(found) == ["difference-1", "difference-2", "score-1", "score-2"]
    assert [len(s.panels) for s in found.values()] == [2, 1, 2, 1]


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    run = load_run(build(tmp_path / "run", Spec(n=3)))
    with pytest.raises(KvcliError, match="unknown format 'gif'"):
        plot(run, tmp_path / "figures", ("png", "gif"))
    assert not (tmp_path / "figures").exists()


def _boxes(figure: Any) -> dict[str, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    return {
        "axes": [ax.get_tightbbox(renderer) for ax in shown],
        "texts": [text.get_window_extent(renderer) for text in figure.texts if text.get_text()],
        "legend": [figure.legends[0].get_window_extent(renderer)],
        "figure": [figure.bbox],
    }


@pytest.mark.parametrize(
    "spec",
    [
        Spec(TASKS, METHODS, RATIOS, n=8),
        Spec(TASKS[:5], METHODS[:2], ("0.1", "0.5"), n=20, noop=10),
        Spec(
            TASKS[:1], METHODS[:3], ("0.1",), n=20, model="some-organisation/A-Rather-Long-Model-Name-8B-Instruct@main"
        ),
        Spec(
            TASKS[:2], [FakeMethod(f"./my $methods/mine_{i}$.py:M:w={i},k=7", 0.5) for i in range(14)], ("0.1",), n=10
        ),
    ],
    ids=["eight-by-nine", "five-tasks", "one-task-long-model", "long-names"],
)
def test_nothing_overlaps_or_leaves_the_page(tmp_path: Path, spec: Spec) -> None:
    run = load_run(build(tmp_path / "run", spec))
    methods = [m.name for m in spec.methods]
    for name, sheet in sheets(run, summarise(run)):
        with mpl.rc_context(plots._STYLE):
            boxes = _boxes(plots._figure(sheet, methods))
        page = boxes["figure"][0].padded(1)
        every = [(kind, box) for kind in ("axes", "texts", "legend") for box in boxes[kind]]
        for i, (kind, box) in enumerate(every):
            inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
            assert inside, (name, kind, box)
            for other, further in every[i + 1 :]:
                assert not box.padded(-1).overlaps(further.padded(-1)), (name, kind, other, box, further)
