"""Links lead somewhere, pictures are small, and figures on the pages are those of the files they speak of."""

from __future__ import annotations

import json
import math
import re
from importlib import import_module

import pytest

from kvcli.cli.app import COMMANDS
from kvcli.methods import catalog
from kvcli.models.source import TESTBED_FOLDER, fingerprint, parse_model
from kvcli.testbed import vocabulary as V
from tests.docs.pages import PAGES, ROOT, anchors, codes, rows, section, text

BY_NAME = {*catalog.names(), *(name.replace("-", "_") for name in COMMANDS)}
"""Modules that have a file each: methods and commands."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page) -> None:
    links = re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    )
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", text("README.md")))
    assert linked == {page.name for page in PAGES[1:]}


def test_the_readme_knows_how_large_the_demo_is() -> None:
    from kvcli.cli.options import layered
    from kvcli.evals.loader import find_tasks
    from kvcli.grammar import parse_ratios

    demo = layered({}, "demo", None)
    curves = len(catalog.expand(demo.methods)) * len(parse_ratios(demo.ratios)) + 1
    assert demo.limit and demo.seeds == (0,)
    assert f"({curves * len(find_tasks(demo.tasks)) * demo.limit:,} records" in text("README.md")


def test_pictures_are_small_and_used() -> None:
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size <= 200_000, picture
        assert any(f"images/{picture.name}" in page.read_text(encoding="utf-8") for page in PAGES), picture


def test_testbed_shape_and_recipe() -> None:
    page = text("docs/testbed.md")
    recipe = json.loads((TESTBED_FOLDER / "recipe.json").read_text())
    config = json.loads((TESTBED_FOLDER / "config.json").read_text())
    shape = dict(row[:2] for row in rows(section(page, "Shape")))
    for label, values in {
        "layers, hidden size, inner size": ("num_hidden_layers", "hidden_size", "intermediate_size"),
        "query heads, KV heads, head dimension": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    }.items():
        assert shape[label] == ", ".join(str(config[value]) for value in values)
    assert shape["vocabulary, embeddings"] == f"{len(V.WORDS)}, tied"
    assert (
        shape["RoPE base, context"] == f"{recipe['shape']['theta']:,.0f}, {config['max_position_embeddings']:,} tokens"
    )
    training = " ".join(section(page, "How it was trained").split())
    assert f"{recipe['steps']} steps of up to {recipe['tokens_per_step']} tokens" in training
    assert f"peak learning rate {recipe['lr']}, {recipe['warmup']} steps of warm-up" in training
    lengths = ", ".join(
        f"{length}{' tokens' if not share else ''}" if not share else f"from {share:.0%} {length}".replace("%", " %")
        for share, length in recipe["stages"]
    )
    assert lengths in training


def test_testbed_training_log() -> None:
    log = [json.loads(line) for line in (TESTBED_FOLDER / "training.jsonl").read_text().splitlines()]
    worst = {str(entry["step"]): min(entry["accuracy"].values()) for entry in log if entry["accuracy"]}
    table = rows(section(text("docs/testbed.md"), "How it was trained"))
    for step, shown in zip(table[0][1:], table[2][1:], strict=True):
        assert float(shown.removesuffix(" %")) == pytest.approx(100 * worst[step], abs=0.051)


def test_testbed_accuracy_is_of_the_weights_that_are_shipped_and_above_the_bar() -> None:
    part = section(text("docs/testbed.md"), "Accuracy with the full cache")
    assert f"`{fingerprint(parse_model('testbed'))['revision']}`" in part, "new weights: kvcli testbed accuracy"
    head, *table = rows(part)
    assert set(head[2:]) == set(V.FAMILIES)
    assert [row[0] for row in table] == ["160", "448", "768", "960"]
    for row in table:
        assert min(float(cell.removesuffix(" %")) for cell in row[2:]) >= (97 if int(row[0]) <= 768 else 90)
    lowest = 200 / (200 + 1.959964**2)  # Wilson's lower limit for 200 of 200
    assert f"200 of 200 means at least {math.floor(1000 * lowest) / 10} %" in part


def test_testbed_tasks_are_all_described() -> None:
    table = rows(section(text("docs/testbed.md"), "Language and families"))
    assert sorted(codes(row[0])[0] for row in table[1:]) == sorted(f"tb_{family}" for family in V.FAMILIES)


def test_every_module_stands_in_the_table_of_the_architecture() -> None:
    """One file per command and per method: those are found by their names."""
    table = [
        (codes(row[0])[0], " ".join(row))
        for row in rows(section(text("docs/architecture.md"), "Where things live"))[1:]
    ]
    missing = []
    for path in sorted((ROOT / "kvcli").rglob("*.py")):
        folder = path.relative_to(ROOT).parent.as_posix()
        if path.name.startswith("_") or folder == "kvcli/testbed" or path.stem in BY_NAME:
            continue
        row = " ".join(row for place, row in table if place == f"{folder}/") or table[0][1]
        missing += [path] if f"`{path.name}`" not in row and f"/{path.name}`" not in row else []
    assert missing == []


def test_bars_on_the_page_of_performance_are_those_of_the_scripts(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sweeps, more, captured, gpu = map(import_module, ("sweep_vs_kvpress", "marginal_cost", "capture", "gpu"))
    stated = [row[2] for row in rows(section(text("docs/performance.md"), "Figures"))[1:]]
    cpu, cuda = captured.BARS["cpu"], captured.BARS["cuda"]
    assert cuda[32768] == gpu.BARS["prefill_32768"] and cuda[131072] == gpu.BARS["prefill_131072"]
    bars = [
        *(f"at least {sweeps.BARS[name]:.0f} x" for name in "abc"), f"at most {more.BAR * 100:.0f} %", "none",
        *(f"at most {bar:g} x" for bar in (cpu["window"], cpu["sums"], captured.LINEAR, cuda["window"], cuda[32768],
                                           cuda[131072], gpu.BARS["memory_per_token"])),
        f"at least {gpu.BARS['decode_share_of_bound']}",
    ]  # fmt: skip
    assert stated == bars


def test_every_script_is_on_the_page_of_performance() -> None:
    page = text("docs/performance.md")
    assert [path.name for path in (ROOT / "benchmarks").glob("*.py") if path.name not in page] == []
