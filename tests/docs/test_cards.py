"""The cards of docs/methods are what docs/cards.py makes of the code and of the evidence today."""

from __future__ import annotations

import json

import pytest

from kvcli.methods import catalog
from kvcli.methods.base import Merge
from tests.docs.pages import script

cards = script("cards")
NAMES = catalog.own_names()


def test_cards_are_up_to_date() -> None:
    stale = [p.name for p, text in cards.pages().items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    assert stale == [], "make cards"
    assert {p.stem for p in cards.CARDS.glob("*.md")} == {*NAMES, "README"}


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_the_method_is_and_what_was_checked(name: str) -> None:
    definition, source, differs = cards.words(name)
    assert definition and definition.endswith((".", "`")), "a definition in whole sentences"
    facts = catalog.find(name).card()
    if facts["paper"]:
        assert facts["paper"].split("v")[0].removeprefix("arXiv:") in source, "the docstring names its source"
        assert differs, "deviations are said, or that there are none"
    mine = json.loads(cards.EVIDENCE.read_text())["methods"][name]
    assert sum(mine["tests"].values()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_measured_ratios_stay_within_what_was_asked_for(name: str) -> None:
    measured = json.loads(cards.EVIDENCE.read_text())["methods"][name]["measured"]
    alone = not issubclass(catalog.find(name), Merge) and name != "full"
    if catalog.find(name).domain.kind == "continuous" and alone:
        assert set(measured) == set(cards.RATIOS)
    for asked, row in measured.items():
        if asked != "its own" and not {"over_budget", "unreachable"} & set(row["flags"]):
            assert row["ratio"] <= float(asked) + 1 / 440, f"{name} at {asked}"
