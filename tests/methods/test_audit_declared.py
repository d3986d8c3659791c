"""What methods declare, as a user reads it: the sources' defaults, scopes, phases, needs, and the least they keep."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kvcli.cache.budget import Budget
from kvcli.methods import catalog
from kvcli.methods.catalog import build
from tests.methods.test_audit_properties import whole_context
from tests.oracles.prompts import random_prompt

FACTS = {
    "name", "title", "paper", "kind", "tier", "phases", "needs", "budget_scope", "domain", "sharing", "protects",
    "seeded", "settings",
}  # fmt: skip

SAID: dict[str, dict[str, Any]] = {
    "streaming_llm": {"sinks": 4, "rerotate": False},
    "snapkv": {"window": 32, "kernel": 7, "pool": "max", "reduce": "mean"},
    "pyramidkv": {"window": 8, "kernel": 7, "pool": "max", "beta": 20.0},
    "pyramidinfer": {"recent": 0.2, "weight": 1.2},
    "chunkkv": {"chunk": 10, "reuse": 1},
    "shotkv": {"scope": "layer", "decode": "on", "queries": "all", "fit": "skip"},
    "adakv": {"base": "snapkv", "floor": 0.2, "rule": "floor"},
    "fastgen": {"recovery": 0.95, "local": 0.3, "frequent": 0.3},
    "duo_attention": {"sinks": 64, "recent": 256, "prefill": "dense"},
    "scissorhands": {"history": 400, "recent": 10},
    "knorm": {"skip_layers": "0,1"},
    "keydiff": {"block": 0},
    "lagkv": {"sinks": 16, "lag": 128},
    "expected_attention": {"future": 512, "sinks": 4, "covariance": True, "vnorm": True},
    "criticalkv": {"base": "snapkv", "first": 0.5, "eps": 1e-4},
    "quest": {"page": 16, "dense_layers": 2, "least": 3},
    "kivi": {"bits": 2, "group": 32, "residual": 32},
    "think": {"prune": 0.4, "window": 32},
    "minicache": {"start": 0.5, "t": 0.6, "gamma": 0.05},
    "merge": {"style": "d2o"},
}
"""Defaults that the sources give."""
SCOPES = {
    "random": "head", "random_shot": "layer", "streaming_llm": "head", "h2o": "head", "snapkv": "head",
    "pyramidkv": "model", "pyramidinfer": "model", "chunkkv": "layer", "shotkv": "layer", "adakv": "layer",
    "headkv": "model", "duo_attention": "model", "tova": "head", "knorm": "model", "kvzip": "model",
    "criticalkv": "head",
}  # fmt: skip
BEHIND_THE_PROMPT = (
    "random", "random_shot", "snapkv", "pyramidkv", "chunkkv", "adakv", "headkv", "knorm", "keydiff", "lagkv",
    "expected_attention", "criticalkv", "kvzip", "think", "lowrank", "minicache", "oracle",
)  # fmt: skip
AND_GENERATING = (
    "streaming_llm", "h2o", "pyramidinfer", "shotkv", "fastgen", "duo_attention", "tova", "scissorhands", "kivi",
    "quant", "merge", "scope", "rkv",
)  # fmt: skip
PHASES = {
    **dict.fromkeys(BEHIND_THE_PROMPT, frozenset({"prefill"})),
    **dict.fromkeys(AND_GENERATING, frozenset({"prefill", "decode"})),
    "quest": frozenset({"decode"}),
}
NO_RATIO = {"fastgen", "kivi", "quant", "quest", "think", "lowrank", "minicache"}


@pytest.fixture(scope="module")
def declared() -> dict[str, dict[str, Any]]:
    """The facts of each method as `list methods --json` prints them."""
    return {card["name"]: card for card in json.loads(json.dumps(catalog.cards()))}


def test_defaults_scopes_and_phases_are_the_sources(declared: dict[str, dict[str, Any]]) -> None:
    for name, wanted in SAID.items():
        found = {s["name"]: s["default"] for s in declared[name]["settings"]}
        assert {key: found[key] for key in wanted} == wanted, name
    assert {name: declared[name]["budget_scope"] for name in SCOPES} == SCOPES
    own = set(catalog.own_names()) - {"full"}
    assert own == set(PHASES)
    assert {name: frozenset(declared[name]["phases"]) for name in own} == PHASES
    assert {name for name in own if declared[name]["domain"]["kind"] == "none"} == NO_RATIO
    assert {name for name in own if declared[name]["sharing"] == 2} == {"kvzip", "oracle", "fastgen"}
    assert {name for name in own if declared[name]["sharing"] == 3} == {"pyramidinfer"}


def test_the_thirteen_points_that_the_paper_leaves_open_are_decided_and_can_be_switched() -> None:
    shotkv = catalog.find("shotkv")
    assert len(shotkv.open_points) == 13
    page = (Path(__file__).resolve().parents[2] / "docs" / "methods" / "shotkv.md").read_text(encoding="utf-8")
    for asked, decided in shotkv.open_points:
        assert f"| {asked} | {decided} |" in page
    for text in (
        "scope=all-layers",
        "queries=question",
        "queries=window,window=8",
        "fit=stop",
        "decode=off",
        "recent=4",
    ):
        assert build(f"shotkv:{text}").settings() != build("shotkv").settings()


def test_every_fact_that_a_method_declares_is_given(declared: dict[str, dict[str, Any]]) -> None:
    for name, card in declared.items():
        assert set(card) >= FACTS, f"{name} lacks {', '.join(sorted(FACTS - set(card)))}"
        assert card["protects"] and card["kind"] and card["title"]
    assert declared["snapkv"]["needs"] == declared["adakv"]["needs"] == ["window:32"]
    assert declared["criticalkv"]["needs"] == ["o_proj", "window:32"]
    assert declared["kvzip"]["needs"] == ["reconstruction"] and declared["streaming_llm"]["needs"] == []


@pytest.mark.parametrize("name", ["duo_attention", "lagkv", "pyramidinfer"])
def test_a_method_with_a_floor_declares_it(declared: dict[str, dict[str, Any]], name: str) -> None:
    """Its card would otherwise say that it reaches all ratios."""
    assert declared[name]["domain"]["floor"]


def test_all_others_reach_every_ratio(declared: dict[str, dict[str, Any]]) -> None:
    floors = {name for name, card in declared.items() if card["domain"]["floor"]}
    assert floors <= {"duo_attention", "lagkv", "pyramidinfer"}
    reach = [n for n in declared if declared[n]["kind"] == "evict" and declared[n]["domain"]["kind"] == "continuous"]
    for name in set(reach) - floors - {"lagkv"}:
        method, prompt = build(name), random_prompt(60, layers=4, dim=4)
        flags = method.select(whole_context(method, prompt), Budget.of_size(1, 60, 4, 2)).flags
        assert "unreachable" not in flags, name


@pytest.mark.parametrize("text", ["lagkv:sinks=2,lag=8", "duo_attention:sinks=2,recent=10"])
def test_an_unreachable_ratio_names_the_nearest_one_that_is_reached(text: str) -> None:
    for n in (30, 61, 90):
        method, prompt = build(text), random_prompt(n, layers=3, dim=4)
        ctx = whole_context(method, prompt)
        low = method.select(ctx, Budget.of_ratio(Decimal("0.05"), n, 3, 2))
        assert "unreachable" in low.flags
        near = Decimal(str(low.notes["nearest_ratio"]))
        assert "unreachable" not in method.select(ctx, Budget.of_ratio(near, n, 3, 2)).flags
        assert "unreachable" in method.select(ctx, Budget.of_ratio(near - Decimal(2) / n, n, 3, 2)).flags


@pytest.mark.parametrize("layers", [2, 4, 7, 32])
def test_an_unreachable_ratio_of_a_prefill_of_its_own_names_the_nearest_one(layers: int) -> None:
    """Its first layer holds the whole prompt and every other one token at least."""
    method: Any = build("pyramidinfer")
    for n in (30, 61, 900):
        low = method.prefill_start(Budget.of_size(1, n, layers, 2))
        assert "unreachable" in low.flags
        near = Decimal(str(low.notes["nearest_ratio"]))
        reached = method.prefill_start(Budget.of_ratio(near, n, layers, 2))
        assert "unreachable" not in reached.flags and "nearest_ratio" not in reached.notes
        assert sum(reached.sizes) - sum(low.sizes) <= layers, "no smaller size is reached"
