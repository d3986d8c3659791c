"""Every method on small random models of every family that kvcli reads: it runs, or it is refused by name."""

from __future__ import annotations

import pytest

from kvcli.config import SweepConfig
from kvcli.engine.needs import GIVEN, HANDLES, require
from kvcli.errors import KvcliError
from kvcli.methods import catalog
from kvcli.methods.base import Merge
from kvcli.models import profiles
from kvcli.models.wrapper import Model
from kvcli.testbed.model import build_tokenizer
from tests.engine import tiny
from tests.models.test_families import SUPPORTED, random_model

OWN = [name for name in catalog.own_names() if name != "full"]
METHODS = [f"snapkv+{name}" if issubclass(catalog.find(name), Merge) else name for name in OWN]
NO_ROTATION = ("gpt2", "opt")


def model_of(family: str) -> Model:
    return Model(random_model(family, SUPPORTED[family]), build_tokenizer(), name=family)


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of a model without a profile on disk: any numbers do."""

    def any_profile(source: object, need: str) -> profiles.HeadProfile:
        return profiles.HeadProfile(((0.4, 0.1, 0.3, 0.2),) * 2)

    monkeypatch.setattr(profiles, "profile_of", any_profile)
    monkeypatch.setattr("kvcli.engine.needs.parse_model", lambda name: None)


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_method_runs_on_the_family_or_is_refused_by_name(family: str, profile: None) -> None:
    model = model_of(family)
    runs, refused = [], []
    for method in METHODS:
        if "kvpress" in catalog.build(method).needs():
            continue
        try:
            require(model, {method: catalog.build(method).needs(), "h2o": frozenset()})
        except KvcliError as e:
            assert method in e.what and f"cannot run on {family}" in e.what and e.fix == "--method h2o"
            refused.append(method)
        else:
            runs.append(method)
    prompts = tiny.prompt_set([40, 57])
    config = SweepConfig(methods=tuple(runs), ratios=("0.5",), first_token=("compressed", "prefill"))
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0, outcome.messages
    assert {r["method"] for r in sink.records} == {"full", *runs}
    needy = {m for m in METHODS if {"q_moments", "rope"} & {n.partition(":")[0] for n in catalog.build(m).needs()}}
    assert set(refused) == (needy if family in NO_ROTATION else set()), "nothing else is refused"


def test_needs_from_outside_are_those_of_profiles_and_workers() -> None:
    assert {n for m in METHODS for n in catalog.build(m).needs() if GIVEN.fullmatch(n)} == {"head_profile"}
    assert set(HANDLES) == {"rope", "o_proj"}
