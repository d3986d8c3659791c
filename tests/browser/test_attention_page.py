"""The page of `kvcli attn-map --html` in a real browser: hover, keys, choices, both themes, texts like HTML."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcli.analysis.attention.data import Atlas
from kvcli.analysis.attention.page import page
from tests.analysis.attention_atlas import made

pytestmark = pytest.mark.browser
EVIL = (
    " <script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    " fish",
    "\u2028</script>",
)


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return made(words=EVIL)


@pytest.fixture(scope="module")
def html(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "attn-map.html"
    path.write_text(page(atlas), encoding="utf-8")
    return path


Open = Callable[..., Any]


def status(p: Any) -> str:
    return str(p.inner_text("#status"))


def test_hovering_a_token_says_what_it_receives_and_whether_it_is_kept(opened: Open, html: Path, atlas: Atlas) -> None:
    p = opened(html).page
    received = atlas.of(0, "received")[0, 1, 2]  # all queries, the preset head
    p.hover("#token-7")
    assert status(p).startswith("token 7 (shot 0)")
    assert f"receives {shown(received[7])} of the attention of all queries (layer 1, head 2)" in status(p)
    assert "kept" not in status(p)
    entry = next(atlas.entries(0))
    held = atlas.kept(0, entry)
    p.select_option("#method", "0")
    for token in (7, 8, 9, 39):
        p.hover("h1")
        p.hover(f"#token-{token}")
        word = "kept by" if held[1, 1, token] else "dropped by"  # query head 2 reads KV head 1
        assert f"{word} first:window=8, ratio 0.2" in status(p)
        gone = "gone" in p.get_attribute(f"#token-{token}", "class")
        assert gone == (not held[1, 1, token])
    p.select_option("#layer", "mean")
    p.select_option("#head", "mean")
    p.hover("h1")
    p.hover("#token-7")
    assert f"receives {shown(atlas.of(0, 'received')[0].mean((0, 1))[7])} of" in status(p)
    assert "(mean of all layers, mean of heads)" in status(p)


def shown(x: float) -> str:
    """As the page writes a share."""
    return f"{100 * x:.1f} %" if x >= 0.1 else f"{float(f'{100 * x:.2g}'):g} %"


def test_texts_are_texts(opened: Open, html: Path) -> None:
    p = opened(html).page
    assert p.title() == "Attention of made"
    assert p.inner_text("#token-0") == EVIL[0].strip() or EVIL[0] in p.text_content("#token-0")
    assert p.text_content("#token-1") == EVIL[1]
    assert p.locator("#tokens img, #tokens script").count() == 0
    p.hover("#token-1")
    assert json.dumps(EVIL[1]) in status(p)
    assert p.title() == "Attention of made"


def test_keys_choose_layer_head_method_prompt_and_queries(opened: Open, html: Path) -> None:
    p = opened(html).page

    def value(name: str) -> str:
        return str(p.input_value(f"#{name}"))

    assert [value(n) for n in ("prompt", "set", "layer", "head", "method")] == ["0", "0", "1", "2", "-1"]
    for key, name, expected in (
        ("l", "layer", "2"), ("l", "layer", "mean"), ("l", "layer", "0"), ("Shift+L", "layer", "mean"),
        ("h", "head", "3"), ("m", "method", "0"), ("m", "method", "1"), ("Shift+M", "method", "0"), ("q", "set", "1"),
        ("p", "prompt", "1"),
    ):  # fmt: skip
        p.keyboard.press(key)
        assert value(name) == expected, key
    assert p.inner_text("#whose") == "mean of all layers, head 3"
    assert "tb_safety" in p.inner_text("#mapnote")
    assert p.is_visible("#lost") and p.locator("#bars .bar").count() == 6
    p.focus("#layer")
    p.keyboard.press("m")
    assert value("method") == "0", "letters typed into a choice are the choice's"


def test_tokens_map_and_grid_are_walked_with_arrow_keys(opened: Open, html: Path, atlas: Atlas) -> None:
    p = opened(html).page
    p.focus("#tokens")
    for key, token in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowDown", 11), ("End", 39),
                       ("ArrowRight", 39), ("Home", 0)):  # fmt: skip
        p.keyboard.press(key)
        assert status(p).startswith(f"token {token} ("), key
        assert p.get_attribute("#tokens", "aria-activedescendant") == f"token-{token}"
    p.focus("#map")
    p.keyboard.press("ArrowRight")
    assert status(p) == "token 0 (special) cannot see token 1 (system)", (
        "the chosen head's own map is the finest there is"
    )
    for _ in range(5):
        p.keyboard.press("ArrowDown")
    fine = atlas.of(0, "map_mean")[5, 1]
    assert float(status(p).split()[-2]) == pytest.approx(100 * fine, rel=0.03)
    p.select_option("#layer", "0")
    p.focus("#map")
    for key in (*["ArrowUp"] * 5, "ArrowLeft", "ArrowRight"):
        p.keyboard.press(key)
    assert status(p) == "tokens 0 to 4 (special, system, shot 0) cannot see tokens 5 to 9 (shot 0)"
    p.keyboard.press("ArrowDown")
    value = atlas.of(0, "small")[0, 2, 1, 1]
    assert status(p).startswith(
        "queries tokens 5 to 9 (shot 0) give keys tokens 5 to 9 (shot 0) a mean probability of "
    )
    assert float(status(p).split()[-2]) == pytest.approx(100 * value, rel=0.03)
    p.focus("#grid")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
        p.keyboard.press(key)
    assert (p.input_value("#layer"), p.input_value("#head")) == ("2", "1")
    measured = atlas.mean("measures", 0, "all")[0][2, 1]
    assert f"share of keys with 90 % {measured:.3g} (all queries)" in status(p)


def test_a_click_in_the_grid_picks_the_head(opened: Open, html: Path) -> None:
    p = opened(html).page
    box = p.locator("#grid").bounding_box()
    p.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.1)
    assert (p.input_value("#layer"), p.input_value("#head")) == ("0", "3")
    p.select_option("#measure", label="mass of the context")
    p.mouse.move(box["x"] + 5, box["y"] + 5)
    assert "mass of the context none here" in status(p), "the first task has no context"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_can_be_read(opened: Open, html: Path, theme: str) -> None:
    p = opened(html, color_scheme=theme).page

    def luminance(selector: str, what: str) -> float:
        colour = p.eval_on_selector(selector, f"e => getComputedStyle(e).{what}")
        parts = [float(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    back = luminance("body", "backgroundColor")
    assert (back < 0.1) == (theme == "dark")
    for selector in ("body", ".soft", "#status", "#theme"):
        ink = luminance(selector, "color")
        assert (max(ink, back) + 0.05) / (min(ink, back) + 0.05) >= 4.5, f"{selector}: WCAG AA"
    p.keyboard.press("t")
    assert (luminance("body", "backgroundColor") < 0.1) == (theme == "light")


def test_hidden_prompts_say_why(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "hidden.html"
    path.write_text(page(made(hidden=True)), encoding="utf-8")
    p = opened(path).page
    assert set(p.inner_text("#tokens")) <= {"·", "\n", " "}
    assert "their text is not shown (harmful task" in p.inner_text("#tokennote")
    p.hover("#token-3")
    assert "text not shown" in status(p)


def test_the_map_is_drawn(opened: Open, html: Path) -> None:
    """Below the diagonal there is colour, above it the background."""
    p = opened(html, color_scheme="light").page
    size = p.eval_on_selector("#map", "e => e.width")
    step = size / 40
    places = [[int(x * step), int(y * step)] for x, y in ((36.5, 1.5), (0.5, 0.5))]
    above, below = p.eval_on_selector(
        "#map",
        """(e, places) => {
          const whole = e.getContext("2d").getImageData(0, 0, e.width, e.height).data;
          return places.map(([x, y]) => Array.from(whole.slice(4 * (y * e.width + x), 4 * (y * e.width + x) + 4)));
        }""",
        places,
    )
    assert above == [255, 255, 255, 255] and below != above


def test_a_narrow_window_needs_no_sideways_scrolling(opened: Open, html: Path) -> None:
    p = opened(html).page
    p.set_viewport_size({"width": 420, "height": 800})
    assert p.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_grids_of_all_tasks_share_their_colours(opened: Open, tmp_path: Path) -> None:
    """The same colour is the same value: the second task's attention is five times smaller, and so it looks."""
    atlas = made()
    measures = atlas.arrays["measures"].copy()
    measures[:2], measures[2] = 0.5, 0.1
    path = tmp_path / "page.html"
    path.write_text(page(Atlas(atlas.meta, {**atlas.arrays, "measures": measures})), encoding="utf-8")
    pixel = "e => Array.from(e.getContext('2d').getImageData(20, 10, 1, 1).data.slice(0, 3))"
    found = []
    for prompt in ("0", "1"):
        p = opened(path, color_scheme="light").page
        p.select_option("#prompt", prompt)
        found.append(sum(p.eval_on_selector("#grid", pixel)))
        assert p.inner_text("#gridhigh") == "0.500"
    assert found[0] < 200 < 500 < found[1]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_tokens_can_be_read_whatever_they_receive_and_whether_they_are_kept(
    opened: Open, html: Path, theme: str
) -> None:
    p = opened(html, color_scheme=theme).page
    p.select_option("#method", "0")
    worst, faded, gone = p.evaluate("""() => {
      const parts = c => {
        const v = c.match(/[\\d.]+/g).map(Number);
        return [v.slice(0, 3), v.length > 3 ? v[3] : 1];
      };
      const light = c => {
        const l = c.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
      const [panel] = parts(getComputedStyle(document.getElementById("tokens")).backgroundColor);
      const tokens = [...document.querySelectorAll(".token")];
      const contrast = tokens.map(e => {
        const s = getComputedStyle(e), [tint, a] = parts(s.backgroundColor), [ink] = parts(s.color);
        const x = light(ink), y = light(tint.map((c, i) => a * c + (1 - a) * panel[i]));
        return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
      });
      const lost = tokens.filter(e => e.classList.contains("gone"));
      return [Math.min(...contrast), lost.filter(e => getComputedStyle(e).opacity !== "1").length, lost.length];
    }""")
    assert worst >= 4.5, "WCAG AA"
    assert gone > 5 and faded == 0, "the tint of what was thrown away says what it receives"


def test_colours_of_thrown_attention_are_those_of_the_figures(opened: Open, html: Path) -> None:
    from kvcli.analysis.attention.sheet import THROWN

    p = opened(html, color_scheme="light").page
    p.select_option("#method", "0")

    def colours() -> list[str]:
        found = p.eval_on_selector_all(
            "#bars .bar", "es => es.slice(0, 2).map(e => getComputedStyle(e).backgroundColor)"
        )
        return ["#" + "".join(f"{int(x):02X}" for x in c[4:-1].split(",")) for c in found]

    expected = [THROWN["light"]["all"], THROWN["light"]["question"]]
    assert colours() == expected
    p.keyboard.press("q")
    assert colours() == expected, "a colour is a set of queries, whichever is chosen"
    assert "mean over heads" in p.inner_text("#lost")


def test_the_page_has_curves_axes_and_shots(opened: Open, html: Path, atlas: Atlas) -> None:
    from kvcli.analysis.attention.curves import curve_panels

    p = opened(html).page
    assert p.locator("#curves svg").count() == 3 and p.locator("#curves polyline").count() == 3 * (1 + 2)
    drawn = p.locator("#curves svg").nth(2).locator("polyline").nth(1).get_attribute("points").split()
    assert len(drawn) == 201
    last = (150 - float(drawn[-1].split(",")[1])) / 1.1
    assert last == pytest.approx(curve_panels(atlas, "all")[2].lines[0].y[-1], abs=0.1)
    assert p.locator("#gridrows span").all_inner_texts() == ["0", "1", "2"]
    assert p.locator("#gridcols span").all_inner_texts() == ["0", "1", "2", "3"]
    assert p.locator("#maprows span").all_inner_texts()[:3] == ["0", "5", "10"]
    p.select_option("#measure", label="mass of shot 1")
    p.focus("#grid")
    p.keyboard.press("ArrowRight")
    value = float(status(p).partition("mass of shot 1 ")[2].split(",")[0])
    assert value == pytest.approx(atlas.of(0, "shot_mass")[0, 1, 0, 1], rel=0.01)
    assert "times evenly spread attention" in status(p)
    p.select_option("#prompt", "1")
    assert p.input_value("#measure") == "0", "the second task has no shots"


def test_layers_by_shots_and_prompts_stand_side_by_side(opened: Open, tmp_path: Path) -> None:
    from kvcli.analysis.attention.shots import shot_panels

    atlas = made(context=False)
    path = tmp_path / "page.html"
    path.write_text(page(atlas), encoding="utf-8")
    p = opened(path).page
    assert p.locator("#shots canvas").count() == 2 and p.locator("#beside canvas").count() == 2
    p.focus("#shots-1")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        p.keyboard.press(key)
    assert status(p).startswith("tb_safety, layer 1, shot 2: ")
    value = float(status(p).partition("shot 2: ")[2].split()[0])
    assert value == pytest.approx(shot_panels(atlas, "all")[1].values[1, 2], rel=0.01)
    p.keyboard.press("q")
    p.keyboard.press("ArrowLeft")
    value = float(status(p).partition("shot 1: ")[2].split()[0])
    assert value == pytest.approx(shot_panels(atlas, "question")[1].values[1, 1], rel=0.01)
    p.click("#beside-1")
    assert p.input_value("#prompt") == "1" and p.get_attribute("#beside-1", "aria-pressed") == "true"


def test_one_token_is_selected(opened: Open, html: Path) -> None:
    p = opened(html).page
    p.focus("#tokens")
    p.keyboard.press("ArrowRight")
    assert p.locator('[aria-selected="true"]').count() == 1
    assert p.get_attribute("#token-1", "aria-selected") == "true"
    assert p.locator('[role="option"][aria-selected]').count() == 40


def test_unknown_words_are_named(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(made(unknown=(3,))), encoding="utf-8")
    p = opened(path).page
    p.hover("#token-1")
    assert "<unk>" not in status(p)
    p.focus("#tokens")
    for _ in range(3):
        p.keyboard.press("ArrowRight")
    assert "(the model sees <unk> instead)" in status(p)
