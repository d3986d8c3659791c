"""Looks are fixed, apart, and readable on their page; print sizes are what they say."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from kvcli.analysis.figures.files import plot
from kvcli.analysis.figures.kinds import chosen
from kvcli.analysis.figures.layout import shortened, text_width, wrapped
from kvcli.analysis.figures.style import COLOURS, DASHES, MARKERS, THEMES, Look, looks, pattern, style
from kvcli.analysis.reading.load import load_run
from kvcli.errors import KvcliError
from kvcli.evals.loader import suites
from kvcli.methods import catalog
from tests.analysis import figure_runs

METHODS = [name for name in catalog.names() if name != "full"]
TIER_1 = [name for name in METHODS if catalog.build(name).tier == 1]
NAMES = [*METHODS, "snapkv:window=32", "h2o [r_d 0.3]", "./mine.py:Mine", "snapkv+kivi:bits=2"]


def test_a_look_does_not_change_with_the_methods_shown() -> None:
    every = looks(NAMES)
    for name in NAMES:
        assert looks([name]) == {name: every[name]}
        assert looks(["aaa", name, "zzz:k=1"])[name] == every[name]


def test_looks_are_these() -> None:
    """Figures of two papers show a method alike: a change of these is a change of every figure."""
    assert looks(["snapkv", "h2o", "shotkv", "streaming_llm"]) == {
        "snapkv": Look(9, 6, 2), "h2o": Look(2, 0, 9), "shotkv": Look(4, 5, 0), "streaming_llm": Look(7, 4, 1),
    }  # fmt: skip


def test_methods_are_apart() -> None:
    found = looks(METHODS)
    assert len({found[name].colour for name in TIER_1}) == len(TIER_1)
    assert len({found[name].marker for name in TIER_1}) == len(TIER_1)
    assert len({found[name].dash for name in TIER_1}) == len(TIER_1)
    assert len({(look.colour, look.marker) for look in found.values()}) == len(METHODS)


def test_tasks_of_a_suite_are_apart() -> None:
    for suite, tasks in suites().items():
        found = looks(tasks)
        assert len(set(found.values())) == len(tasks), suite
        if len(tasks) <= 8:
            assert len({(look.colour, look.marker) for look in found.values()}) == len(tasks), suite


@pytest.mark.parametrize("suite", ["testbed", "testbed_deep", "kvfundabench"])
def test_lines_of_tasks_are_told_apart_without_colour(suite: str) -> None:
    found = looks(suites()[suite])
    assert len({look.dash for look in found.values()}) == len(found)


def test_dashes_differ_and_repeat_within_a_short_piece_of_a_line() -> None:
    assert len({str(pattern(dash)) for dash in range(len(DASHES))}) == len(DASHES) == 10
    assert all(sum(dashes) <= 14 for dashes in DASHES)
    assert max(len(dashes) for dashes in DASHES) <= 8


def test_two_names_of_one_look_are_told_apart_and_the_plainer_keeps_it() -> None:
    plain = "snapkv"
    other = next(name for i in itertools.count() if Look.of(name := f"snapkv:window={i}") == Look.of(plain))
    found = looks([other, plain])
    assert found[plain] == Look.of(plain)
    assert found[other] != found[plain]
    assert found[other].colour == found[plain].colour


def test_as_many_looks_as_there_are_are_all_different() -> None:
    most = len(COLOURS) * len(MARKERS) * len(DASHES)
    names = [f"m{i}" for i in range(120)]
    assert most == 1000
    assert len(set(looks(names).values())) == len(names)


def _linear(colour: str) -> list[float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def _luminance(colour: str) -> float:
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), _linear(colour), strict=True))


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_colours_stand_out_from_the_page(theme) -> None:
    """Contrast as WCAG 2 defines it: text 4.5, lines 2 at least."""

    def contrast(colour: str) -> float:
        light, dark = sorted((_luminance(colour), _luminance(theme.page)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert all(contrast(text) >= 4.5 for text in (theme.ink, theme.muted, theme.alarm))
    assert all(contrast(colour) >= 2 for colour in theme.series)


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_colours_are_apart_for_colour_blind_readers(theme) -> None:
    """Simulated by Machado, Oliveira, Fernandes 2009 (IEEE TVCG 15:1291), severity 1; distance in CIELAB (1976)."""
    matrices = {
        "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
        "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    }
    for matrix in matrices.values():
        seen = [_lab([sum(m * c for m, c in zip(row, _linear(colour), strict=True)) for row in matrix])
                for colour in theme.series]  # fmt: skip
        gaps = [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) ** 0.5
                for x, y in itertools.combinations(seen, 2)]  # fmt: skip
        assert min(gaps) > 15


def _lab(rgb: list[float]) -> tuple[float, float, float]:
    r, g, b = (min(max(c, 0.0), 1.0) for c in rgb)
    xyz = (0.4124 * r + 0.3576 * g + 0.1805 * b, 0.2126 * r + 0.7152 * g + 0.0722 * b,
           0.0193 * r + 0.1192 * g + 0.9505 * b)  # fmt: skip
    x, y, z = (v / w for v, w in zip(xyz, (0.95047, 1.0, 1.08883), strict=True))
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def test_paper_has_the_widths_of_one_and_two_columns_and_embeds_its_fonts(tmp_path: Path) -> None:
    run = load_run(figure_runs.plain(tmp_path / "run"))
    plot(run, tmp_path / "two", ("pdf",), kinds=chosen(["difference"]), look=style("paper"))
    one_task = figure_runs.folder(
        tmp_path / "small", [figure_runs.cell("gsm8k", "full"), *(figure_runs.cell("gsm8k", "snapkv", r) for r in
                                                                  ("0.1", "0.5"))]
    )  # fmt: skip
    plot(load_run(one_task), tmp_path / "one", ("pdf",), kinds=chosen(["difference"]), look=style("paper"))
    for name, inches in (("one", 3.25), ("two", 6.75)):
        pdf = (tmp_path / name / "difference.pdf").read_bytes()
        box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", pdf)
        assert box is not None
        assert float(box[1]) / 72 == pytest.approx(inches, abs=0.01)
        assert b"/FontFile2" in pdf
        assert b"/Type3" not in pdf


@pytest.mark.parametrize(("name", "theme"), [("poster", "light"), ("screen", "blue")])
def test_unknown_styles_and_themes_are_refused(name: str, theme: str) -> None:
    with pytest.raises(KvcliError, match="unknown"):
        style(name, theme)


def test_texts_are_measured() -> None:
    assert text_width("wide", 8) > text_width("il", 8) > 0
    assert text_width("wide", 16) == pytest.approx(2 * text_width("wide", 8), rel=0.05)
    lines = wrapped("some words that do not fit one line of an inch", 8, 1.0)
    assert len(lines) > 2
    assert all(text_width(line, 8) <= 1.0 for line in lines)
    cut = shortened("a_rather_long_name_of_a_method:window=16", 8, 1.0)
    assert text_width(cut, 8) <= 1.0
    assert cut.startswith("a_")
    assert cut.endswith("16")
