"""Figures and page of attention from made-up data: what they show, that nothing overlaps, that texts stay texts."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from kvcli.analysis.attention import page as attention_page
from kvcli.analysis.attention import plots as attention_plots
from kvcli.analysis.attention.curves import curve_panels
from kvcli.analysis.attention.data import Atlas, cell_label, load, write
from kvcli.analysis.attention.even import even_by_label, even_region, even_share, even_shots
from kvcli.analysis.attention.grids import measures, regions, regions_against_even
from kvcli.analysis.attention.page import page, page_data, script_json
from kvcli.analysis.attention.plots import SCREEN, draw, figures
from kvcli.analysis.attention.shots import shot_panels
from kvcli.analysis.attention.tokens import visible
from kvcli.analysis.figures.style import style
from kvcli.errors import KvcliError
from tests.analysis.attention_atlas import GOLDEN_FILE, behind_the_figures, made
from tests.analysis.test_plots import close


def test_data_behind_the_figures_match_golden() -> None:
    """Regenerate after a change that is meant: python -m tests.analysis.attention_atlas"""
    assert close(behind_the_figures(made()), json.loads(GOLDEN_FILE.read_text(encoding="utf-8")))


def test_files_come_back_as_they_were_written(tmp_path: Path) -> None:
    atlas = made()
    written = write(atlas, tmp_path / "a")
    assert [path.name for path in written] == ["attn-map.json", "attn-map.npz"]
    again = load(tmp_path / "a")
    assert again.meta == atlas.meta and again.arrays.keys() == dict(atlas.arrays).keys()
    for name, values in atlas.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], values)
    write(again, tmp_path / "b")
    for path in written:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("damage", ["none", "json", "npz", "schema"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    if damage != "none":
        write(made(), tmp_path)
    if damage == "schema":
        (tmp_path / "attn-map.json").write_text('{"schema": 99}')
    elif damage != "none":
        (tmp_path / f"attn-map.{damage}").write_bytes(b"{torn")
    with pytest.raises(KvcliError, match="schema 99" if damage == "schema" else "cannot read attn-map"):
        load(tmp_path)


@pytest.mark.slow
def test_every_figure_is_drawn_in_every_format(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    for name in ("a", "b"):
        atlas = made((("my task", 1),), n=20, layers=2, heads=2, block=2, methods=1)
        written = draw(atlas, tmp_path / name, ("png", "pdf", "svg"))
    stems = [
        "map",
        "map-max",
        "measures",
        "regions",
        "regions-even",
        "shots",
        "shots-heads",
        "curves",
        "kept-my-task-s0",
    ]
    assert [path.name for path in written] == [f"{stem}.{ending}" for stem in stems for ending in ("png", "pdf", "svg")]
    assert dict(mpl.rcParams) == before
    for path in written:
        assert path.stat().st_size > 3000
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes(), path.name
    with pytest.raises(KvcliError, match="unknown format 'jpg'"):
        draw(made(), tmp_path, ("jpg",))


def test_pyplot_is_not_used() -> None:
    code = "import kvcli.analysis.attention.plots as p, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "import pyplot" not in Path(attention_plots.__file__).read_text(encoding="utf-8")


def texts(figure: Any) -> list[tuple[str, Bbox]]:
    """Every text that is seen, and the pixels it covers."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    seen = [*figure.texts, *(t for legend in figure.legends for t in legend.get_texts())]
    for ax in figure.axes:
        seen += [ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for axis, span in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            low, high = sorted(span)
            seen += [tick.label1 for tick in axis.get_major_ticks() if low - 1e-9 <= tick.get_loc() <= high + 1e-9]
            seen += [tick.label2 for tick in axis.get_major_ticks() if low - 1e-9 <= tick.get_loc() <= high + 1e-9]
    renderer = canvas.get_renderer()
    found = [(t.get_text(), t.get_window_extent(renderer)) for t in seen if t.get_visible() and t.get_text().strip()]
    return [(text, box) for text, box in found if box.width > 0]


LAYOUTS: dict[str, dict[str, Any]] = {
    "a word at each place": {"groups": (("gsm8k", 1),), "n": 40},
    "one task": {"groups": (("gsm8k", 3),), "n": 90, "methods": 6},
    "two tasks": {},
    "four tasks with long names": {
        "groups": tuple((f"longbench_passage_retrieval_{i}", 1) for i in range(4)), "n": 60, "block": 3,
    },
    "seven tasks": {"groups": tuple((f"task_{i}", 2) for i in range(7)), "n": 60},
    "a large model": {"groups": (("gsm8k", 1), ("mmlu", 2)), "layers": 36, "heads": 64, "kv_heads": 8, "n": 60},
    "a model with a long name": {"groups": (("gsm8k", 1),), "model": "random:/somewhere/far/away/" + "x" * 70, "n": 60},
}  # fmt: skip


LARGE = {"four tasks with long names", "seven tasks", "a large model"}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in LAYOUTS]
)
def test_no_text_covers_another_or_leaves_the_figure(layout: str) -> None:
    atlas = made(**LAYOUTS[layout])
    for name, make in figures(atlas, "question"):
        with mpl.rc_context(SCREEN.rc()):
            figure = make()
            found = texts(figure)
            whole = figure.bbox
        for text, box in found:
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.width + 1 and box.y1 <= whole.height + 1
            assert inside, f"{name}: '{text}' leaves the figure"
        for (one, a), (other, b) in combinations(found, 2):
            wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert wide <= 1.5 or high <= 1.5, f"{name}: '{one}' and '{other}' overlap by {wide:.0f} x {high:.0f}"


def titles(atlas: Atlas, figure: str) -> str:
    with mpl.rc_context(SCREEN.rc()):
        drawn = dict(figures(atlas, "all"))[figure]()
    return " ".join(" ".join(t.get_text().split()) for t in drawn.texts)


@pytest.mark.parametrize(
    "figure", ["map", "measures", "regions", "regions-even", "shots", "curves", "kept-tb_arithmetic-s0"]
)
def test_titles_say_the_model_and_how_many_prompts(figure: str) -> None:
    found = titles(made(), figure)
    assert "made" in found
    assert re.search(r"n = ([12] prompts? per panel|1 to 2 prompts per task|40 tokens)", found), found


def test_tokens_are_written_where_they_are_few_and_may_be_shown() -> None:
    def written(atlas: Atlas) -> list[str]:
        with mpl.rc_context(SCREEN.rc()):
            ax = dict(figures(atlas, "all"))["map"]().axes[0]
        return [label.get_text() for label in ax.get_xticklabels()]

    one = (("gsm8k", 1),)
    assert written(made(one, n=12))[:10] == ["the", "fish", "↵", "␣", "<b>", r"\$x\$", "é", "∅", "go", "&amp;"]
    assert "the" not in written(made(one, n=41)) and "the" not in written(made(one, n=12, hidden=True))
    assert visible("\n\n") == "↵↵" and visible(" a b") == "a b"


def test_dollar_signs_are_not_formulas(tmp_path: Path) -> None:
    atlas = made((("$a_b^{", 1),), n=20, words=("$x_{", "\\frac"), model="$m_{")
    assert all(path.stat().st_size for path in draw(atlas, tmp_path, ("png",)))


def test_a_task_without_a_region_has_an_empty_panel() -> None:
    grids = {(grid.name, grid.group): grid for grid in regions(made(), "all")}
    assert grids["mass of the context", 0].values is None and grids["mass of all shots", 1].values is None
    both = [grids[name, 1].values for name in ("mass of the context", "mass of the question")]
    assert all(values is not None and values.min() > 0 for values in both)
    assert len(measures(made(), "all")) == 6 * 2


def test_bands_of_curves_hold_every_prompt() -> None:
    atlas = made()
    for number, panel in enumerate(curve_panels(atlas, "all")):
        several, one = panel.lines
        assert one.low is None and several.low is not None and several.high is not None
        each = 100 * atlas.arrays["curves"][:2, 0, number].mean(1)
        np.testing.assert_allclose(several.low, each.min(0), rtol=1e-5)
        np.testing.assert_allclose(several.y, each.mean(0), rtol=1e-5)
        np.testing.assert_allclose(one.y, 100 * atlas.arrays["curves"][2, 0, number].mean(0), rtol=1e-5)
        assert several.y[-1] == pytest.approx(100) or number == 2


def test_labels_of_cells() -> None:
    entry = {"method": "m:a=1", "ratio": "0.2", "budget": None, "seed": 1}
    assert cell_label(entry) == "m:a=1, ratio 0.2, seed 1"
    assert cell_label({**entry, "ratio": None, "budget": 64, "seed": None}) == "m:a=1, budget 64"
    assert cell_label({**entry, "ratio": "1", "seed": 0}) == "m:a=1"


def kept_at(atlas: Atlas, positions: list[int], n: int) -> Atlas:
    """The same with only these pairs kept by the first method."""
    (entry, *_) = atlas.entries(0)
    held = np.zeros((3, 1, n), bool)
    held[:, :, positions] = True
    return Atlas(atlas.meta, {**atlas.arrays, entry["array"]: np.packbits(held, axis=-1)})


@pytest.mark.parametrize("n", [700, 920, 1200, 1700])
def test_single_kept_tokens_are_seen(n: int) -> None:
    """Counted in the picture: one dark stretch for each of them, however many tokens share a pixel."""
    every = list(range(7, n, 60))
    atlas = kept_at(made((("gsm8k", 1),), n=n, methods=1), every, n)
    with mpl.rc_context(SCREEN.rc()):
        figure = dict(figures(atlas, "all"))["kept-gsm8k-s0"]()
        figure.set_dpi(SCREEN.dpi)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = figure.axes[0].get_window_extent()
        picture = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    row = picture[picture.shape[0] - int((box.y0 + box.y1) / 2), int(box.x0) + 3 : int(box.x1) - 3].mean(-1)
    dark = row < 230
    assert int((dark[1:] & ~dark[:-1]).sum() + dark[0]) == len(every)


def test_a_map_of_many_blocks_has_a_pixel_for_each() -> None:
    atlas = made(tuple((f"task{i}", 1) for i in range(5)), n=60)
    arrays = {k: np.tril(np.ones((700, 700))) if k.endswith("map_mean") else v for k, v in atlas.arrays.items()}
    with mpl.rc_context(SCREEN.rc()):
        figure = dict(figures(Atlas(atlas.meta, arrays), "all"))["map"]()
    assert figure.axes[0].get_position().width * figure.get_figwidth() * figure.dpi >= 700


@pytest.mark.parametrize("queries", ["all", "question"])
def test_evenly_spread_attention_is_once_the_even_share(queries: str) -> None:
    """Whatever the lengths and places of shots: only what is not spread evenly has a colour."""
    atlas = made()
    for n, count in ((40, 40), (40, 5), (1, 1)):
        share = even_share(n, count)
        rows = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
        np.testing.assert_allclose(share, rows[n - count :].mean(0), rtol=1e-12)
    which, arrays = atlas.meta["sets"].index(queries), dict(atlas.arrays)
    for i in atlas.members(0):
        even = even_shots(atlas, i, queries)
        arrays[f"p{i}.shot_layers"] = np.repeat(even[None, :, None], 3, 2).repeat(2, 0)
        assert even.sum() == pytest.approx(sum(even_by_label(atlas, i, queries)[f"shot {k}"] for k in range(3)))
    (panel,) = shot_panels(Atlas(atlas.meta, arrays), queries)
    assert panel.prompts == 2
    np.testing.assert_allclose(panel.values, 1)
    masses = {name: even_region(atlas, name, 0, queries) for name in ("special", "system", "shot", "question")}
    assert sum(masses.values()) == pytest.approx(1)
    for grid in regions_against_even(atlas, queries):
        assert grid.times and (grid.values is None or grid.highest >= min(64, grid.values.max()))
    for number, curves in enumerate(curve_panels(atlas, queries)):
        assert curves.even[0] == 0 and (number == 2 or curves.even[-1] == pytest.approx(100))
    assert which in (0, 1)


def test_one_shot_and_one_head_have_ticks_at_whole_numbers() -> None:
    atlas = made((("gsm8k", 1),), layers=1, heads=1, kv_heads=1)
    arrays = {**atlas.arrays, "p0.shot_layers": atlas.arrays["p0.shot_layers"][:, :1]}
    facts = {
        **atlas.prompts[0],
        "regions": [r for r in atlas.prompts[0]["regions"] if r[0] not in ("shot 1", "shot 2")],
    }
    single = Atlas({**atlas.meta, "prompts": [facts]}, arrays)
    for name in ("shots", "measures"):
        with mpl.rc_context(SCREEN.rc()):
            ax = dict(figures(single, "all"))[name]().axes[0]
        for axis, span in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, sorted(ax.get_ylim()))):
            assert [t for t in axis.get_majorticklocs() if span[0] <= t <= span[1]] == [0]


def test_sampled_queries_and_shots_are_said() -> None:
    atlas = made((("gsm8k", 1), ("gsm8k", 2)))
    assert atlas.counted() == "n = 1 to 2 prompts each" and made().counted() == "n = 1 to 2 prompts per task"
    assert atlas.measured("all") == "all queries"
    for facts in atlas.prompts:
        facts["queries"]["all"], facts["measured"]["all"] = 2884, 256
    assert atlas.measured("all") == "256 of 2,884 queries"


def test_few_tokens_are_written_larger_and_unknown_ones_marked() -> None:
    def labels(n: int) -> list[Any]:
        with mpl.rc_context(SCREEN.rc()):
            figure = dict(figures(made((("gsm8k", 1),), n=n, unknown=(1,)), "all"))["map"]()
        return list(figure.axes[0].get_xticklabels())

    assert labels(12)[0].get_fontsize() == 8 and labels(40)[0].get_fontsize() == 5.5
    assert [t.get_text() for t in labels(12)][:3] == ["the", "⟨unk⟩", "↵"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_paper_figures_are_as_wide_as_a_column_or_a_page(theme: str) -> None:
    look = style("paper", theme)
    for groups in ((("gsm8k", 2),), tuple((f"task{i}", 1) for i in range(7))):
        with mpl.rc_context(look.rc()):
            for name, make in figures(made(groups), "all", look):
                figure = make()
                assert figure.get_figwidth() in (3.25, 6.75), name
                assert mpl.colors.to_hex(figure.get_facecolor()).upper() == look.theme.page


# --- the page ---------------------------------------------------------------------------------------------------------

EVIL = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "\u2028", "&lt;", '"', "'", "<!--")


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1])


def test_a_page_holds_what_is_known_and_nothing_leaves_it() -> None:
    html = page(made(words=EVIL, model="<script>x</script>"))
    assert html.count("<script") == 2 and "alert(1)</script>" not in html and "<img" not in html
    assert "\u2028" not in html and "default-src 'none'" in html
    elements = html.partition('id="data"')[0]
    loaded = re.findall(r"""<[a-z]+[^>]*?(?:src|href)\s*=\s*["']?([^"'>\s]+)""", elements)
    assert [place for place in loaded if not place.startswith("data:")] == []
    assert not re.search(r"https?:|//[a-z]+\.", html)
    data = data_of(html)
    assert data["prompts"][0]["tokens"][: len(EVIL)] == list(EVIL)
    assert [p["name"] for p in data["prompts"]] == ["tb_arithmetic, sample s0", "tb_safety, sample s0"]


def test_json_in_a_script_element_comes_back() -> None:
    value = {"a": [*EVIL, "é𝄞", 1.5, None]}
    assert json.loads(script_json(value)) == value
    with pytest.raises(ValueError):
        script_json(float("nan"))


def test_numbers_of_a_page_are_those_of_the_arrays() -> None:
    atlas = made()
    data = page_data(atlas)["prompts"][0]
    raw = np.frombuffer(base64.b64decode(data["received"]["data"]), "<u2").astype(float)
    found = np.where(raw > 0, 10 ** (((raw - 1) / 65534 - 1) * 8), 0).reshape(data["received"]["shape"])
    np.testing.assert_allclose(found, atlas.of(0, "received"), rtol=3e-4, atol=2e-8)
    raw = np.frombuffer(base64.b64decode(data["map"]["data"]), "u1").astype(float).reshape(data["map"]["shape"])
    small = np.nan_to_num(atlas.of(0, "small"))
    np.testing.assert_allclose(np.where(raw > 0, 10 ** (((raw - 1) / 254 - 1) * 5), 0), small, rtol=0.03, atol=2e-5)
    for entry, shown in zip(atlas.entries(0), data["kept"], strict=True):
        share = np.frombuffer(base64.b64decode(shown["share"]["data"]), "u1").reshape(shown["share"]["shape"])
        np.testing.assert_array_equal(share == 255, atlas.kept(0, entry))
    assert page_data(atlas)["grids"][8]["values"][0][0] == [[None] * 4] * 3, "the first task has no context"


def test_a_page_does_not_show_the_text_of_hidden_prompts() -> None:
    html = page(made(hidden=True))
    assert all(p["tokens"] is None and p["hidden"] for p in data_of(html)["prompts"])
    assert " fish" not in html


def test_a_page_of_a_large_model_and_long_prompts_is_a_few_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are averaged, then tokens taken together, until everything fits."""
    monkeypatch.setattr(attention_page, "RECEIVED", 40_000)
    monkeypatch.setattr(attention_page, "KEPT", 10_000)
    atlas = made((("gsm8k", 1), ("mmlu", 1)), n=1200, layers=32, heads=32, kv_heads=8, methods=4)
    arrays = dict(atlas.arrays)
    for i in (0, 1):
        arrays[f"p{i}.small"] = arrays[f"p{i}.small"][..., :26, :26]
    html = page(Atlas(atlas.meta, arrays))
    size = len(html.encode())
    assert size < 3_000_000
    for prompt in data_of(html)["prompts"]:
        _, layers, heads, units = prompt["received"]["shape"]
        assert (layers, heads, prompt["unit"], units) == (32, 1, 4, 300)
        assert len(prompt["tokens"]) == units
        assert [entry["share"]["shape"] for entry in prompt["kept"]] == [[32, 1, units]] * 4


def test_a_page_of_one_prompt_of_a_large_model_follows_the_head_and_stays_under_5_mb() -> None:
    atlas = made((("gsm8k", 1),), n=600, layers=32, heads=32, kv_heads=8, methods=4)
    arrays = {**atlas.arrays, "p0.small": atlas.arrays["p0.small"][..., :31, :31]}
    html = page(Atlas(atlas.meta, arrays))
    (prompt,) = data_of(html)["prompts"]
    assert prompt["received"]["shape"] == [2, 32, 32, 300] and prompt["unit"] == 2
    assert len(html.encode()) < 5_000_000


def test_the_chosen_head_s_map_is_pooled_by_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two by two blocks: on the diagonal three pairs of four can be."""
    monkeypatch.setattr(attention_page, "LARGEST", 20)
    atlas = made((("gsm8k", 1),), n=40)
    prompt = page_data(atlas)["prompts"][0]
    assert prompt["large"]["shape"] == [20, 20] and prompt["largeBlock"] == 2
    raw = np.frombuffer(base64.b64decode(prompt["large"]["data"]), "u1").astype(float).reshape(20, 20)
    found, mean = np.where(raw > 0, 10 ** (((raw - 1) / 254 - 1) * 5), 0), atlas.of(0, "map_mean")
    assert found[9, 4] == pytest.approx(mean[18:20, 8:10].mean(), rel=0.03, abs=2e-5)
    assert found[9, 9] == pytest.approx(np.nansum(mean[18:20, 18:20]) / 3, rel=0.03, abs=2e-5)
    assert found[4, 9] == 0
