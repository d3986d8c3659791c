"""What is on the page: points at their measured ratio, intervals apart, marks that show, widths of print."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from kvcli.analysis.figures import bars, clashes
from kvcli.analysis.figures import sheets as marks_of
from kvcli.analysis.figures.files import sheets
from kvcli.analysis.figures.kinds import KINDS, chosen
from kvcli.analysis.figures.marks import APART, apart, mark
from kvcli.analysis.figures.paging import fitted
from kvcli.analysis.figures.style import MARKERS, Style, style
from kvcli.analysis.reading.load import load_run
from tests.analysis import figure_runs

KEPT = {"chunkkv": 0.0844, "h2o": 0.1011, "shotkv": 0.0856, "snapkv": 0.1011}


def crowded(path: Path) -> Path:
    """Four methods near one ratio, each twice."""
    cells = [figure_runs.cell("gsm8k", "full")]
    for more, ratio in ((0.0, "0.1"), (0.4, "0.5")):
        cells += [figure_runs.cell("gsm8k", m, ratio, kept=kept + more) for m, kept in KEPT.items()]
    return figure_runs.folder(path, cells)


def drawn(folder: Path, kind: str, look: Style) -> list[tuple[Any, Figure]]:
    found = []
    with mpl.rc_context(look.rc()):
        for _, sheet in sheets(load_run(folder), None, chosen([kind])):
            found.append((sheet, KINDS[sheet.figure].draw(sheet, look)))
    return found


def on_page(ax: Any, line: Any) -> list[float]:
    """Ratios at which a line is drawn, wherever its own transform moves it."""
    places = line.get_transform().transform(np.column_stack(line.get_data()))
    return [float(x) for x in ax.transData.inverted().transform(places)[:, 0]]


@pytest.mark.parametrize("look", ["screen", "paper"])
def test_points_and_lines_stand_at_the_measured_ratio(tmp_path: Path, look: str) -> None:
    ((sheet, figure),) = drawn(crowded(tmp_path / "run"), "difference", style(look))
    assert "intervals moved apart sideways" in " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    ax = figure.axes[0]
    for series in sheet.panels[0].series:
        x = [p.x for p in series.points]
        matching = [line for line in ax.lines if on_page(ax, line) == pytest.approx(x, abs=1e-6)]
        assert len(matching) >= 2, series.key  # the line and its points


def test_intervals_are_apart_and_in_the_order_of_the_measured_ratio(tmp_path: Path) -> None:
    ((sheet, figure),) = drawn(crowded(tmp_path / "run"), "difference", style())
    ax = figure.axes[0]
    broken = [line for line in ax.lines if len(line.get_xdata()) == 3 and np.isnan(line.get_xdata()[-1])]
    points = [p for series in sheet.panels[0].series for p in series.points if p.low is not None]
    assert len(broken) == len(points) == 8
    order = np.argsort([p.x for p in points], kind="stable")
    places = np.array([line.get_xdata()[0] for line in broken])[order]
    assert (np.diff(places) > 0.009).all()


def test_places_stay_where_there_is_room() -> None:
    assert apart([0.5, 0.1, 0.9], 1.0) == pytest.approx([0.5, 0.1, 0.9])
    assert apart([], 1.0) == []
    two = apart([0.3, 0.3], 1.0)
    assert (two[1] - two[0], sum(two)) == (pytest.approx(APART), pytest.approx(0.6))


def test_a_line_whose_points_share_one_ratio_has_bars_not_a_band_without_width(tmp_path: Path) -> None:
    cells = [
        figure_runs.cell("gsm8k", "full"),
        *(figure_runs.cell("gsm8k", "shotkv", ratio, kept=0.4) for ratio in ("0.1", "0.2")),
        *(figure_runs.cell("gsm8k", "h2o", ratio) for ratio in ("0.1", "0.2")),
    ]
    ((_, figure),) = drawn(figure_runs.folder(tmp_path / "run", cells), "difference", style())
    ax = figure.axes[0]
    assert len(ax.collections) == 1  # h2o's band
    assert np.ptp(ax.collections[0].get_paths()[0].vertices[:, 0]) > 0.05
    assert sum(len(line.get_xdata()) == 3 and np.isnan(line.get_xdata()[-1]) for line in ax.lines) == 2


@pytest.mark.parametrize("look", ["screen", "paper"])
@pytest.mark.parametrize("marker", MARKERS)
def test_the_page_shows_in_marked_points(look: str, marker: str) -> None:
    """Counted in pixels of the middle of the point: hollow ones differ from plain ones, half filled ones from both."""

    def page(marks: tuple[str, ...]) -> float:
        figure = Figure(figsize=(0.3, 0.3), dpi=style(look).dpi)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        ax.set(xlim=(-1, 1), ylim=(-1, 1))
        mark(ax, [0], [0], "#000000", marker, marks, style(look))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        grey = np.asarray(canvas.buffer_rgba())[..., 0]
        middle, half = len(grey) // 2, round(1.3 * style(look).dpi / 72)
        return float((grey[middle - half : middle + half, middle - half : middle + half] > 200).mean())

    plain, half, hollow = (page(marks) for marks in ((), (marks_of.FALLBACK,), (marks_of.OVER,)))
    assert hollow > 0.3
    assert half > plain + 0.1
    assert hollow > half


def test_type_in_print_is_six_points_at_least(tmp_path: Path) -> None:
    from matplotlib.text import Text

    for make, kinds in ((figure_runs.plain, "difference,score,kl,heatmap,pareto"), (figure_runs.shots, "shots,gain"),
                        (figure_runs.needles, "needle")):  # fmt: skip
        for kind in kinds.split(","):
            for _, figure in drawn(make(tmp_path / make.__name__), kind, style("paper")):
                figure.canvas.draw()
                sizes = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()}
                assert min(sizes) >= 6, (kind, sizes)


def test_numbers_of_shots_at_one_place_stand_beside_each_other(tmp_path: Path) -> None:
    cells = []
    for count in (0, 1, 2, 4, 8):
        cells += [figure_runs.cell("gsm8k", m, r, shots=count, harm=0.0)
                  for m, r in (("full", None), ("snapkv", "0.1"), ("snapkv", "0.5"))]  # fmt: skip
    run = figure_runs.folder(tmp_path / "run", cells)
    for look in (style(), style("paper")):
        for sheet, figure in drawn(run, "shots", look):
            ax, (panel,) = figure.axes[0], sheet.panels
            at = sorted(x for line in ax.lines if line.get_linestyle() == "None" for x in line.get_xdata())
            assert len(at) == sum(len(series.points) for series in panel.series)
            points = ax.transData.transform([(x, 0.0) for x in at])[:, 0] * 72 / figure.dpi
            assert np.diff(points).min() > look.mark
            assert "moved apart sideways" in figure.get_label()


def test_tasks_at_one_place_stand_around_it() -> None:
    figure = Figure(figsize=(2, 2))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-10, 10), ylim=(-10, 10))
    found = np.array(clashes.around(ax, [(0.0, 0.0)] * 8 + [(5.0, 5.0)], 5.0))
    assert found[8] == pytest.approx([5, 5])
    assert found[:8].mean(axis=0) == pytest.approx([0, 0], abs=1e-9)
    points = found[:8] * 2 * 72 / 20
    gaps = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)) + 99 * np.eye(8)
    assert gaps.min() == pytest.approx(5.0)


def grid(path: Path, methods: int, ratios: str) -> Path:
    names = [f"method_{i}" for i in range(methods)]
    tasks = [f"tb_{i}" for i in range(8)]
    cells = [figure_runs.cell(task, "full", n=2) for task in tasks]
    cells += [figure_runs.cell(task, m, r, n=2) for task in tasks for m in names for r in ratios.split()]
    return figure_runs.folder(path, cells)


NINE = "0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9"


@pytest.mark.parametrize(
    ("methods", "ratios", "kind"), [(9, NINE, "heatmap"), (70, "0.1", "heatmap"), (40, "0.1 0.3", "difference")]
)
def test_printed_pages_end_where_paper_does_and_together_show_everything(
    tmp_path: Path, methods: int, ratios: str, kind: str
) -> None:
    look, shown, scales = style("paper"), [], set()
    with mpl.rc_context(look.rc()):
        for _, sheet in sheets(load_run(grid(tmp_path / "run", methods, ratios)), None, chosen([kind])):
            pages = fitted(sheet, KINDS[kind].draw, look)
            assert max(figure.get_figheight() for _, figure in pages) <= look.tallest
            for page, _ in pages:
                scales.add(getattr(page, "widest", None))
                shown += [(g.asked, b.task, b.method) for g in getattr(page, "grids", ()) for b in g.boxes]
                shown += [(p.asked, panel.key, s.key) for panel in getattr(page, "panels", ()) for s in panel.series
                          for p in s.points]  # fmt: skip
            assert len(pages) > 1 or kind != "heatmap"
    assert len(shown) == len(set(shown)) == 8 * methods * len(ratios.split())
    assert len(scales) == 1


def test_many_bars_go_on_with_full_beside_them(tmp_path: Path) -> None:
    path = figure_runs.bench(tmp_path / "bench") / "bench.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if '"batch_asked":1,' in line]
    more = [{**line, "method": f"m{i}"} for i in range(30) for line in lines if line["method"] == "h2o"]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *more]))
    look = style("paper")
    (found,) = bars.load(path.parent)
    (sheet,) = KINDS["latency"].build(found)
    with mpl.rc_context(look.rc()):
        pages = fitted(sheet, KINDS["latency"].draw, look)
    assert len(pages) > 1
    assert all(panel.bars[0].method == "full" for page, _ in pages for panel in page.panels)
    whole = [(panel.name, bar.method, bar.asked) for panel in sheet.panels for bar in panel.bars[1:]]
    shown = [
        (panel.name, bar.method, bar.asked) for page, _ in pages for panel in page.panels for bar in panel.bars[1:]
    ]
    assert sorted(shown) == sorted(whole)


def test_one_method_has_a_front(tmp_path: Path) -> None:
    cells = [figure_runs.cell("gsm8k", "full"), figure_runs.cell("gsm8k", "snapkv", "0.2")]
    ((sheet, figure),) = drawn(figure_runs.folder(tmp_path / "run", cells), "pareto", style())
    (panel,) = sheet.panels
    steps = [line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post"]
    assert len(steps) == 1
    assert steps[0].get_xdata()[0] == pytest.approx(panel.spots[0].bytes / 1024)
    assert np.ptp(steps[0].get_xdata()) > 0


def test_one_shot_is_one(tmp_path: Path) -> None:
    cells = []
    for task in ("tb_code", "tb_recall"):
        for count in (0, 1):
            cells += [figure_runs.cell(task, m, r, shots=count) for m, r in (("full", None), ("snapkv", "0.1"))]
    ((_, figure),) = drawn(figure_runs.folder(tmp_path / "run", cells), "gain", style())
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["tb_code (0 to 1 shot)", "tb_recall (0 to 1 shot)"]


def test_printed_maps_have_the_width_of_one_or_two_columns(tmp_path: Path) -> None:
    look = style("paper")
    widths = {}
    for make, kind in ((figure_runs.plain, "heatmap"), (figure_runs.shots, "heatmap"), (figure_runs.needles, "needle")):
        for number, (sheet, figure) in enumerate(drawn(make(tmp_path / make.__name__), kind, look)):
            widths[make.__name__, sheet.figure, number] = figure.get_figwidth()
    assert set(widths.values()) == {3.25, 6.75}, widths


def test_pictures_of_the_readme_keep_the_colours_of_the_heat_map(tmp_path: Path) -> None:
    place = Path(__file__).parents[2] / "docs" / "figures.py"
    spec = importlib.util.spec_from_file_location("readme_figures", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(figure_runs.plain(tmp_path / "run"), tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {f"{name}{dark}.png" for name in ("testbed", "testbed-heatmap") for dark in ("", "-dark")}
    assert Image.open(tmp_path / "testbed-heatmap.png").mode == "RGB"
    assert Image.open(tmp_path / "testbed.png").mode == "P"
