"""`--match bytes`: methods with a ratio beside methods with a size of their own, at the same bytes of every prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcli.analysis.reading.load import load_run
from kvcli.analysis.tables.build import summarise
from kvcli.engine.records import SAVED_DIGITS
from tests.cli.sweeping import call, comparable, one_error, records, typed

PLUGIN = '''
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcli.methods.base import Domain, Method, Selection, Transform, setting


class Part:
    def __init__(self, block, bits):
        self.keys, self.values, self.bits = block.keys.clone(), block.values.clone(), bits

    def append(self, keys, values):
        self.keys, self.values = torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1)

    def dense(self):
        return self.keys, self.values

    def payload(self):
        return (self.keys.numel() + self.values.numel()) * self.bits // 8

    def tensors(self):
        return [self.keys, self.values]


@dataclass(frozen=True)
class Packed(Transform):
    """Says that it needs so many bits per element."""

    bits: int = setting(8, help="bits", ge=1, le=16)

    def store(self, ctx, layers):
        with Path(__file__).with_suffix(".log").open("a") as log:
            log.write(f"{ctx.sample_id} {self.bits}\\n")
        return [[Part(block, self.bits) for block in blocks] for blocks in layers]


@dataclass(frozen=True)
class Fifth(Method):
    """Keeps the last fifth of the prompt in every second layer, all else whole: a method with a size of its own."""

    domain = Domain("none")

    def select(self, ctx, budget):
        kept = [torch.arange(ctx.n - max(1, ctx.n // 5), ctx.n), torch.arange(ctx.n)]
        return Selection([kept[layer % 2] for layer in range(ctx.layers)])
'''
GRID = "sweep --task tb_recall,tb_arithmetic --limit 6 --match bytes"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pair(record: dict[str, Any]) -> float:
    """Bytes of one pair in every KV head of every layer."""
    return float(record["kv_bytes"]["full"] / record["n_prompt"])


def test_every_prompt_gets_the_bytes_of_the_anchor(here: Path) -> None:
    methods = "./own.py:Packed,./own.py:Packed:bits=3,./own.py:Fifth,snapkv,h2o,pyramidkv,random,shotkv"
    done = call(*typed(GRID), "--method", methods, "--out", here / "run")
    assert done.code == 0, done.err
    lines = records(here / "run")
    anchors = {(r["method"], r["task"], r["sample_id"]): r for r in lines if r["match"] is None}
    matched = [r for r in lines if r["match"] is not None]
    assert {r["match"] for r in matched} == {"./own.py:Packed", "./own.py:Packed:bits=3", "./own.py:Fifth"}
    assert {m for m, _, _ in anchors} == {"full", *(r["match"] for r in matched)}
    assert len(matched) == 3 * 5 * 12
    reached: dict[str, list[bool]] = {}
    for r in matched:
        anchor = anchors[r["match"], r["task"], r["sample_id"]]
        wanted, got = anchor["kv_bytes"]["prefill"], r["kv_bytes"]["prefill"]
        assert r["ratio"] is None and r["budget"] is None
        assert r["kv_bytes"]["match"] == wanted
        assert r["measured_ratio"] == round(got / r["kv_bytes"]["full"], SAVED_DIGITS)
        near = abs(got - wanted) <= max(0.01 * wanted, pair(r) / 2)
        assert near == ("unreachable" not in r["flags"])
        reached.setdefault(r["method"], []).append(near)
    for method in ("snapkv", "h2o", "pyramidkv", "random"):
        assert all(reached[method]), method
    assert not all(reached["shotkv"]), "whole shots do not meet any number of bytes"


def test_what_cannot_be_reached_is_listed_and_columns_hold_the_anchor(here: Path) -> None:
    assert call(*typed(GRID), "--method", "./own.py:Packed,snapkv,shotkv", "--out", here / "run").code == 0
    tables = summarise(load_run(here / "run"))
    assert [t.task for t in tables] == ["tb_recall", "tb_arithmetic"]
    for table in tables:
        assert [c.text for c in table.columns] == ["= Packed"] and table.columns[0].kind == "match"
        cells = {row.label: row.cells["= Packed"] for row in table.rows}
        assert set(cells) == {"Packed", "snapkv", "shotkv"}
        assert cells["snapkv"].measured_ratio == pytest.approx(0.5, abs=0.005)
        off = cells["shotkv"].flags["unreachable"]
        assert f"not within 1 % of the bytes of Packed: shotkv ({off} of 6)" in table.notes
    shown = call("report", here / "run")
    assert shown.code == 0, shown.err
    report = (here / "run" / "report.md").read_text()
    assert "`= METHOD`" in report and "| `snapkv` | = Packed | 0.50 |" in report
    assert call("plot", here / "run", "--format", "png").code == 0
    sheet = json.loads((here / "run" / "figures" / "difference.json").read_text())
    points = {s["label"]: s["points"] for p in sheet["panels"] for s in p["series"]}
    assert points["snapkv"][0]["x"] == pytest.approx(points["Packed"][0]["x"], abs=0.005)


def test_the_anchor_is_stored_once_per_prompt_for_all_methods(here: Path) -> None:
    assert call(*typed(GRID), "--method", "./own.py:Packed,snapkv,h2o,random", "--seed", "0,1,2",
                "--no-fidelity", "--out", here / "run").code == 0  # fmt: skip
    stored = (here / "own.log").read_text().splitlines()
    own = 2 * 12  # its own rows: what is stored, and its bytes with the last token
    assert len(stored) == own + 12


def test_an_anchor_behind_an_evictor_takes_the_ratios(here: Path) -> None:
    done = call(*typed(GRID), "--method", "snapkv+./own.py:Packed,h2o", "--ratio", "0.2,0.5", "--out", here / "run")
    assert done.code == 0, done.err
    lines = records(here / "run")
    anchor = "snapkv+./own.py:Packed"
    assert {r["ratio"] for r in lines if r["method"] == anchor} == {0.2, 0.5}
    matched = [r for r in lines if r["method"] == "h2o"]
    assert {r["match"] for r in matched} == {f"{anchor}@0.2", f"{anchor}@0.5"}
    for r in matched:
        wanted = float(r["match"].partition("@")[2]) / 2
        assert r["measured_ratio"] == pytest.approx(wanted, abs=0.002)
    (table, _) = summarise(load_run(here / "run"))
    assert [c.text for c in table.columns] == ["= snapkv+Packed@0.2", "= snapkv+Packed@0.5"]
    assert [sorted(row.cells) for row in table.rows] == [[c.text for c in table.columns]] * 2


def test_a_grid_that_grows_by_matched_methods_gives_what_one_command_gives(here: Path) -> None:
    """The anchor reads a window that nothing else in the second command needs."""
    anchor = "snapkv+./own.py:Packed"
    assert call(*typed(GRID), "--method", f"{anchor},random", "--ratio", "0.3", "--out", here / "grown").code == 0
    first = {r["cell_id"] for r in records(here / "grown")}
    both = f"{anchor},random,streaming_llm"
    assert call(*typed(GRID), "--method", both, "--ratio", "0.3", "--out", here / "grown").code == 0
    assert first < {r["cell_id"] for r in records(here / "grown")}
    assert call(*typed(GRID), "--method", both, "--ratio", "0.3", "--out", here / "once").code == 0
    assert comparable(here / "grown", "batch_id", "alloc_bytes") == comparable(here / "once", "batch_id", "alloc_bytes")
    again = call(*typed(GRID), "--method", both, "--ratio", "0.3", "--out", here / "grown")
    assert "nothing left to do" in again.err


def test_other_bytes_are_other_cells_and_cells_without_a_match_keep_their_ids(here: Path) -> None:
    grid = "sweep --task tb_recall --limit 2 --method ./own.py:Packed,snapkv --ratio 0.5"
    assert call(*typed(grid), "--out", here / "plain").code == 0
    plain = {r["method"]: r["cell_id"] for r in records(here / "plain")}
    for bits in (8, 4):
        methods = f"./own.py:Packed:bits={bits},snapkv"
        assert call(*typed(GRID), "--method", methods, "--out", here / f"match{bits}").code == 0
    eight, four = ({(r["method"], r["task"]): r["cell_id"] for r in records(here / f"match{b}")} for b in (8, 4))
    assert eight["full", "tb_recall"] == plain["full"]
    assert eight["./own.py:Packed", "tb_recall"] == plain["./own.py:Packed"]
    assert len({eight["snapkv", "tb_recall"], four["snapkv", "tb_recall"], plain["snapkv"]}) == 3


@pytest.mark.parametrize(
    "options, words",
    [
        ("--method snapkv,h2o", ("nothing to match", "size of its own")),
        ("--method ./own.py:Packed", ("nothing can be matched",)),
        ("--method ./own.py:Packed,snapkv --ratio 0.5", ("--match bytes sets every size", "without --ratio")),
        ("--method ./own.py:Packed,snapkv --budget 64", ("--match bytes sets every size", "without --budget")),
        ("--method ./own.py:Packed,snapkv --match tokens", ("'tokens' is not known",)),
        ("--method ./own.py:Packed,h2o --decode-ratio same", ("--decode-ratio same needs --ratio",)),
    ],
)
def test_what_cannot_be_matched_is_one_error(here: Path, options: str, words: tuple[str, ...]) -> None:
    done = call(*typed(f"{GRID} {options}"), "--out", here / "run")
    one_error(done, *words)
    assert not (here / "run").exists()
