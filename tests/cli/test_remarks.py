"""What a sweep says of its grid: sizes that do not apply, floors, large budgets, methods without effect."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcli.analysis.reading.load import load_run
from kvcli.analysis.tables.build import summarise
from kvcli.cli import remarks
from kvcli.config import SweepConfig
from kvcli.methods import catalog
from tests.analysis.tables_of import cell, folder_of


def config(*methods: str, **settings: Any) -> SweepConfig:
    return SweepConfig(methods=methods, **settings)


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (("snapkv",), []),
        (("snapkv", "fastgen"), ["fastgen: a size of its own, --ratio does not apply"]),
        (("fastgen", "kivi"), ["fastgen, kivi: sizes of their own, --ratio does not apply"]),
    ],
)
def test_one_method_has_a_size_of_its_own_and_several_have_sizes(methods: tuple[str, ...], said: list[str]) -> None:
    assert remarks.without_ratio(config(*methods), {"ratios": ["0.3"]}) == said
    assert remarks.without_ratio(config(*methods), {}) == []


def test_every_method_that_declares_a_floor_is_named_and_no_other() -> None:
    floored = [card["name"] for card in catalog.cards() if card["domain"]["floor"]]
    assert len(floored) >= 3
    [said] = remarks.floors(config(*(c["name"] for c in catalog.cards() if c["kind"] != "merge"), ratios=("0.1",)))
    assert said.startswith(f"{', '.join(floored)}: cannot go below a floor that depends on the prompt; smaller ratios ")
    evictor = next(name for name in floored if catalog.find(name).kind == "evict")
    [one] = remarks.floors(config(f"{evictor}+kivi", budgets=(64,)))
    assert "smaller budgets keep the same, flagged u" in one and one.endswith(f"(kvcli list methods {evictor})")
    assert remarks.floors(config("snapkv", "kivi", ratios=("0.1",))) == []
    assert remarks.floors(config(floored[0], ratios=("1",))) == []


def test_budgets_that_no_prompt_exceeds_are_named() -> None:
    def prompts(*lengths: int) -> Any:
        return SimpleNamespace(parts=[SimpleNamespace(ids=range(n)) for n in lengths])

    sets = [prompts(10, 446), prompts(20)]
    [said] = remarks.larger_than_prompts(config("snapkv", budgets=(64, 446, 1000)), sets)
    assert said == "--budget 446,1000: no prompt is longer (446 tokens at most), so nothing is evicted"
    assert remarks.larger_than_prompts(config("snapkv", budgets=(445,)), sets) == []
    assert remarks.larger_than_prompts(config("snapkv", ratios=("0.1",)), sets) == []


def idle(folder: Path, *lines: dict[str, Any]) -> list[str]:
    folder_of(folder, lines)
    return remarks.idle(summarise(load_run(folder)))


def test_a_method_that_is_a_noop_everywhere_is_named_with_where_its_settings_are(tmp_path: Path) -> None:
    def cells(method: str, ratio: str, *flags: list[str]) -> list[dict[str, Any]]:
        lines = cell("tb_recall", method, ratio, [1.0] * len(flags))
        return [{**line, "flags": list(own)} for line, own in zip(lines, flags, strict=True)]

    never = cells("snapkv", "0.5", ["noop"], [])
    always = [*cells("h2o:reduce=max", "0.5", ["noop"], ["noop"]), *cells("h2o:reduce=max", "1", [], [])]
    once = [*cells("tova", "0.1", [], []), *cells("tova", "0.9", ["noop"], ["noop"])]
    [said] = idle(tmp_path / "a", *never, *always, *once)
    assert said.startswith("h2o:reduce=max: nothing was left out of any prompt (flag n everywhere)")
    assert said.endswith("kvcli list methods h2o")
    budgets = [{**line, "ratio": None, "budget": 9999} for line in cells("snapkv", "1", ["noop"], ["noop"])]
    assert idle(tmp_path / "b", *budgets) == [], "budgets are told beforehand"


def test_a_dry_run_says_all_of_it_beforehand(kvcli, tmp_path: Path) -> None:
    grid = ("--method", "lagkv,fastgen", "--budget", "9999", "--task", "tb_recall", "--limit", "1")
    done = kvcli("sweep", *grid, "--out", tmp_path / "run", "--dry-run", "--json")
    assert json.loads(done.out)["cells"] == 3
    assert "warning: fastgen: a size of its own, --budget does not apply\n" in done.err
    assert "warning: --budget 9999: no prompt is longer (" in done.err
    assert "\nlagkv: cannot go below a floor that depends on the prompt" in done.err


def test_a_reader_that_reads_everything_is_told_afterwards(kvcli, tmp_path: Path) -> None:
    done = kvcli("sweep", "--method", "quest", "--task", "tb_recall", "--limit", "1", "--out", tmp_path / "run")
    assert done.code == 0
    assert "quest: nothing was left out of any prompt (flag n everywhere)" in done.err
