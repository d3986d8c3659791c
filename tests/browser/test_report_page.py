"""The page of `kvcli report --html` in a real browser: sort, filter, open a sample, keys, both themes, print, speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.analysis.reading.load import load_run
from kvcli.analysis.reports.contents import contents
from kvcli.analysis.reports.page import write_page
from tests.analysis.page_runs import EVIL, grid_run, with_texts

pytestmark = pytest.mark.browser
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = with_texts(tmp_path_factory.mktemp("run") / "run")
    return write_page(contents(load_run(folder)), folder / "report.html")


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = grid_run(tmp_path_factory.mktemp("grid") / "run")
    return write_page(contents(load_run(folder)), folder / "report.html")


def column(p: Any, title: str) -> list[str]:
    heads = p.locator("#cells thead button").all_inner_texts()
    at = next(i for i, head in enumerate(heads) if head.startswith(title)) + 1
    return [text.strip() for text in p.locator(f"#cells tbody tr.row td:nth-child({at})").all_inner_texts()]


def click_head(p: Any, title: str) -> None:
    p.locator("#cells thead button", has_text=title).first.click()


def numbers(values: list[str]) -> list[float]:
    return [float(value.split()[0]) for value in values if value]


def test_the_verdict_comes_first_and_figures_are_drawn(opened: Open, html: Path) -> None:
    p = opened(html).page
    assert p.locator("main section").first.get_attribute("id") == "verdict"
    assert "loses" in p.inner_text("#verdict")
    p.locator("#figures img").first.scroll_into_view_if_needed()
    p.locator("#figures img").first.evaluate("e => e.decode()")
    assert p.evaluate("document.querySelector('#figures img').naturalWidth") > 100


def test_a_click_on_a_head_sorts_and_another_turns_it_round(opened: Open, html: Path) -> None:
    p = opened(html).page
    before = column(p, "points")
    click_head(p, "points")
    rising = numbers(column(p, "points"))
    assert rising == sorted(rising) and len(rising) > 4
    assert p.locator("#cells th[aria-sort=ascending]").inner_text().startswith("points")
    click_head(p, "points")
    assert numbers(column(p, "points")) == sorted(rising, reverse=True)
    assert column(p, "points")[-1] == "", "full has none and stays below"
    click_head(p, "method")
    assert column(p, "method") == sorted(column(p, "method"), key=str.lower)
    p.click("#reset")
    assert column(p, "points") == before


def test_filters_narrow_the_rows_and_keep_full_beside(opened: Open, html: Path) -> None:
    p = opened(html).page
    assert p.inner_text("#count") == "10 of 10 rows"
    p.select_option("#task", label="tb_recall")
    assert set(column(p, "task")) == {"tb_recall"}
    assert "n = 40" in p.inner_text("#about")
    p.select_option("#method", "snapkv")
    assert column(p, "method") == ["full", "snapkv", "snapkv"]
    p.select_option("#size", "0.1")
    assert column(p, "asked") == ["", "0.1"]
    assert p.inner_text("#count") == "2 of 10 rows"
    p.click("#reset")
    p.select_option("#kind", "loss")
    assert set(column(p, "verdict")) == {"loss"}
    p.click("#reset")
    p.fill("#search", "streaming choice")
    assert p.inner_text("#count") == "0 of 10 rows"
    p.fill("#search", "streaming")
    assert set(column(p, "method")) == {"streaming_llm"}


def test_a_row_opens_to_its_changed_samples_and_their_texts_stay_text(opened: Open, html: Path) -> None:
    p = opened(html).page
    title = p.title()
    row = p.locator("tr.row", has_text="streaming_llm").first
    row.click()
    p.wait_for_selector(".flip summary")
    assert 0 < p.locator(".flip").count() <= 20
    assert "comparisons considered" in p.inner_text("tr.detail")
    assert "kvcli show " in p.inner_text("tr.detail")
    p.locator(".flip summary").first.click()
    assert EVIL in p.locator(".flip .output").first.inner_text()
    assert EVIL in p.locator(".flip .prompt").first.inner_text()
    assert "shot 0" in p.locator(".flip .prompt").first.inner_text()
    assert "kept by region: shot 0: 25 %, question: 100 %" in p.locator(".flip").first.inner_text()
    assert p.locator(".flip script, .flip img").count() == 0
    assert p.title() == title
    row.click()
    assert p.locator("tr.detail").count() == 0


def test_keys_alone_do_everything(opened: Open, html: Path) -> None:
    p = opened(html).page
    p.keyboard.press("/")
    assert p.evaluate("document.activeElement.id") == "search"
    p.keyboard.type("snapkv")
    p.locator("#cells tr.row").first.focus()
    first = p.evaluate("document.activeElement.dataset.row")
    p.keyboard.press("ArrowDown")
    assert p.evaluate("document.activeElement.dataset.row") != first
    p.keyboard.press("Enter")
    p.wait_for_selector(".flip summary")
    assert p.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    p.keyboard.press("Tab")
    p.keyboard.press("Enter")
    assert p.locator(".flip[open]").count() == 1
    p.keyboard.press("Escape")
    assert p.locator("tr.detail").count() == 0
    p.keyboard.press("ArrowUp")
    assert p.evaluate("document.activeElement.dataset.row") == first
    p.locator("#cells thead button").first.focus()
    p.keyboard.press("Enter")
    assert p.locator("#cells th[aria-sort=ascending]").count() == 1
    assert p.evaluate("document.activeElement.textContent") == "task", "sorting keeps the focus"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_are_readable(opened: Open, html: Path, scheme: str) -> None:
    p = opened(html, color_scheme=scheme).page

    def contrast(selector: str) -> float:
        read = """e => {
            const part = v => (v /= 255) <= 0.04045 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4);
            const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(part)
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const [a, b] = [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor].map(light);
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }"""
        return float(p.locator(selector).first.evaluate(read))

    def dark() -> bool:
        return bool(p.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)")

    assert dark() == (scheme == "dark")
    for selector in ("h1", "#tables .soft", "#cells .ends", "#cells .loss", "a"):
        assert contrast(selector) >= 4.5, selector
    p.keyboard.press("t")
    assert dark() != (scheme == "dark")
    assert contrast("#cells .loss") >= 4.5


def test_print_is_dark_on_white_without_controls(opened: Open, html: Path) -> None:
    p = opened(html, color_scheme="dark").page
    p.emulate_media(media="print")
    assert p.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not p.is_visible("#controls") and not p.is_visible("nav")
    assert p.is_visible("#cells")


def test_nothing_is_wider_than_a_phone_but_what_scrolls_by_itself(opened: Open, html: Path) -> None:
    p = opened(html).page
    p.set_viewport_size({"width": 390, "height": 800})
    assert p.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_a_large_report_opens_in_two_seconds(opened: Open, grid: Path) -> None:
    assert grid.stat().st_size < 5_000_000
    p = opened(grid).page
    assert p.inner_text("#count") == "637 of 637 rows"
    times = []
    for _ in range(3):
        p.reload()
        p.wait_for_selector("#cells tbody tr.row")
        times.append(p.evaluate("performance.getEntriesByType('navigation')[0].domComplete"))
    assert min(times) < 2000, times
    began = p.evaluate("performance.now()")
    click_head(p, "points")
    p.locator("tr.row").nth(3).click()
    p.wait_for_selector(".flip summary")
    assert p.evaluate("performance.now()") - began < 2000
