"""Presets: every one is a grid that kvcli accepts, says what it cannot know, and names the numbers it repeats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcli.analysis.tables import published
from kvcli.cli import presets
from kvcli.config import SweepConfig
from kvcli.errors import KvcliError
from kvcli.evals.loader import find_tasks
from kvcli.grammar import parse_ratios
from kvcli.methods import catalog

SHARED = Path(__file__).parents[2].parent / "shared"
PAPER = [name for name in presets.names() if name.startswith("kvfundabench")]


def grid(name: str) -> SweepConfig:
    return SweepConfig.from_dict(presets.read(name)[0], name)


def test_the_paper_s_grids_are_there() -> None:
    assert {name.removeprefix("kvfundabench_") for name in PAPER} == {
        "table6", "table7", "table9", "table10", "lg_gsm8k", "many_shot",
    }  # fmt: skip


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_a_grid_that_kvcli_knows(name: str) -> None:
    config = grid(name)
    assert catalog.expand(config.methods) and parse_ratios(config.ratios) and find_tasks(config.tasks)
    assert presets.title(name)


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_measures_what_its_tables_print(name: str) -> None:
    """Every printed cell of the tables has a method, ratio, task and number of shots in the grid."""
    config = grid(name)
    methods = {m.parts[0].source for m in catalog.expand(config.methods)}
    ratios = {float(r) for r in parse_ratios(config.ratios)}
    tasks = find_tasks(config.tasks)
    shots = {(t.base, s) for t in tasks for s in config.shots or (t.usual_shots,)}
    printed = [
        row
        for row in published.scores()
        if set(row.tables) & set(published.tables_of(name)) and row.model == config.model and row.method != "mean"
    ]
    assert printed
    for row in printed:
        assert row.method in methods or row.method == "full", row
        assert row.ratio in ratios or row.method == "full", row
        assert (row.task, row.shots) in shots, row
    assert len({(r.task, r.shots) for r in printed}) == len(shots), "and nothing else"


@pytest.mark.parametrize("name", PAPER)
def test_its_note_says_that_the_prompts_were_not_published(name: str) -> None:
    _, note = presets.read(name)
    assert "prompts were not published" in note and "\n" not in note
    comment = presets.path(name).read_text(encoding="utf-8")
    assert comment.startswith("# KVFundaBench, Table") and "Not in the paper" in comment


def test_prefill_only_stands_beside_shotkv_where_the_paper_has_it() -> None:
    for name in ("kvfundabench_lg_gsm8k", "kvfundabench_many_shot"):
        assert {"shotkv", "shotkv:decode=off"} <= set(grid(name).methods)
    assert grid("kvfundabench_lg_gsm8k").decode_ratios == ("same",)


def test_an_unknown_preset() -> None:
    with pytest.raises(KvcliError, match="unknown preset 'kvfundabench_table_7'") as caught:
        presets.read("kvfundabench_table_7")
    assert caught.value.fix.startswith("kvfundabench_table7")


def test_a_preset_whose_note_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("# Mine.\nmodel: testbed\nnote: [a]\n")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    with pytest.raises(KvcliError, match="'note' must be a text"):
        presets.read("mine")


def test_the_note_is_said_before_the_sweep_and_is_no_setting(kvcli, tmp_path, monkeypatch) -> None:
    (tmp_path / "mine.yaml").write_text("# Mine.\nmodel: testbed\nlimit: 2\ntasks: [tb_recall]\nnote: Beware of it.\n")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    done = kvcli("sweep", "--preset", "mine", "--method", "random", "--ratio", "0.5", "--dry-run")
    assert done.code == 0, done.err
    assert done.err.index("Beware of it.") < done.err.index("results:")


@pytest.mark.shared
def test_a_preset_of_the_paper_becomes_a_plan_on_another_model(kvcli, tmp_path) -> None:
    """With a small random model and real rows in place of the hub: tasks with their own numbers of shots."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no shared/data")
    config = SHARED / "configs" / "Qwen2.5-0.5B-Instruct"
    model = f"random:{config}:layers=1,hidden=32,heads=2,kv_heads=1"
    done = kvcli(
        "sweep", "--preset", "kvfundabench_table7", "--model", model, "--limit", "1", "--data-dir", SHARED / "data",
        "--tokenizer", SHARED / "tokenizers" / "Qwen2.5-0.5B-Instruct", "--out", tmp_path, "--dry-run", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    shots = {group["task"]: group["shots"] for group in json.loads(done.out)["groups"]}
    assert shots == {"mmlu": 5, "gsm8k": 8, "commonsense_qa": 4, "jailbreakv": 8, "humaneval": 8}
