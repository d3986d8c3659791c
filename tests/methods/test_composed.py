"""Methods joined by '+': what may follow what, how it is spelled, and who sees what."""

from __future__ import annotations

import pytest
import torch

from kvcli.cache.budget import Budget
from kvcli.config import SweepConfig
from kvcli.engine.runner import Options
from kvcli.engine.selecting import positions_kept
from kvcli.errors import KvcliError
from kvcli.methods.catalog import build, canonical, expand, find, names
from kvcli.methods.composed import Composed, merge_of, transform_of
from tests.engine import asks, tiny
from tests.methods import storing
from tests.oracles.harness import context_for
from tests.oracles.prompts import random_prompt

EVICTORS = [
    n for n in ("snapkv", "pyramidkv", "h2o", "streaming_llm", "chunkkv", "shotkv", "random", "tova") if n in names()
]
TRANSFORMS = ["kivi", "think", "quant", "lowrank"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("merge+kivi", "nothing to merge"),
        ("kivi+snapkv", "cannot be combined in this order"),
        ("merge+snapkv", "nothing to merge"),
        ("snapkv+kivi+merge", "cannot be combined in this order"),
        ("snapkv+h2o", "two evictors cannot be combined"),
        ("kivi+think", "two forms to store in cannot be combined"),
        ("snapkv+kivi+quant", "two forms to store in cannot be combined"),
        ("snapkv+merge+merge:style=cam", "two merges cannot be combined"),
        ("pyramidinfer+kivi", "stands alone"),
        ("streaming_llm:rerotate=true+kivi", "moved to other positions"),
        ("streaming_llm:rerotate=true+merge", "moved to other positions"),
        ("full+kivi", "evicts nothing"),
    ],
)
def test_what_cannot_follow_is_refused_with_a_way_out(text: str, what: str) -> None:
    with pytest.raises(KvcliError, match=what) as found:
        build(text)
    assert found.value.fix
    assert text in found.value.given


@pytest.mark.parametrize("text", ["merge", "merge:style=cam", "merge:style=cam+kivi"])
def test_a_merge_without_an_evictor_is_refused_with_one_that_can_be_typed(text: str) -> None:
    with pytest.raises(KvcliError, match="evictor") as found:
        expand([text])
    (method,) = expand([found.value.fix])
    assert str(method) == f"snapkv+{text}"


@pytest.mark.parametrize(
    ("typed", "spelled"),
    [
        ("snapkv:window=32+kivi:bits=2", "snapkv+kivi"),
        ("snapkv + merge + kivi:bits=4", "snapkv+merge+kivi:bits=4"),
        (
            "snapkv:window=8,kernel=3+kivi:residual=64,bits=4,group=32",
            "snapkv:kernel=3,window=8+kivi:bits=4,residual=64",
        ),
        ("h2o+merge:weights=exp,style=cam+think:prune=0.40", "h2o+merge:style=cam+think"),
        ("kivi:bits=2", "kivi"),
        ("quant:dtype=int8,backend=own", "quant"),
    ],
)
def test_one_spelling(typed: str, spelled: str) -> None:
    (method,) = expand([typed])
    assert str(method) == spelled
    assert str(canonical(method)) == spelled


def test_parts_in_their_order() -> None:
    made = build("snapkv:window=8+merge:style=cam+think:window=16")
    assert isinstance(made, Composed)
    assert [p.name for p in made.parts] == ["snapkv", "merge", "think"]
    assert merge_of(made) is made.merge
    assert transform_of(made) is made.transform
    assert made.needs() == {"window:8", "window:1", "window:16"}
    assert made.settings()["snapkv.window"] == 8
    assert made.settings()["think.window"] == 16
    assert not made.decodes()
    assert transform_of(build("snapkv")) is None
    assert merge_of(build("snapkv")) is None
    assert transform_of(build("kivi")) is not None


@pytest.mark.parametrize("evictor", EVICTORS)
def test_the_budget_is_the_evictors(evictor: str) -> None:
    prompt = random_prompt(60, layers=3, dim=8)
    for text in (f"{evictor}+kivi", f"{evictor}+merge", f"{evictor}+merge+kivi"):
        made, alone = build(text), build(evictor)
        assert made.domain == alone.domain
        assert made.budget_scope == alone.budget_scope
        assert made.seeded == alone.seeded
        budget = Budget.of_size(20, 60, 3, 2)
        found, plain = (m.select(context_for(m, prompt), budget) for m in (made, alone))
        assert found.flags == plain.flags
        assert positions_kept(found.kept, 2) == positions_kept(plain.kept, 2)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_sees_what_is_left(transform: str) -> None:
    """Its store of an evicted prompt is the store of a prompt that never had the other pairs, their places apart."""
    ctx = storing.context(transform, 60)
    positions = storing.kept("head", ctx)
    layers = storing.stored(transform, ctx, positions)
    for i, form in enumerate(positions):
        assert isinstance(form, torch.Tensor)
        for x in (ctx.keys[i], ctx.values[i]):
            gone = torch.ones(2, 60, dtype=torch.bool).scatter(1, form, False)
            x[gone] = 1e6  # what was dropped must not matter
    assert storing.equal(storing.heads_of(storing.stored(transform, ctx, positions)), storing.heads_of(layers))


@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
def test_measured_bytes_in_a_sweep(first_token: str) -> None:
    """A merge costs what its evictor costs; a transform takes its share of the evictor's bytes; a transform alone has
    one cell whatever the ratios."""
    methods = (
        "snapkv:window=4",
        "snapkv:window=4+merge",
        "snapkv:window=4+quant",
        "snapkv:window=4+merge+quant",
        "quant",
    )
    config = SweepConfig(methods=methods, ratios=("0.3", "0.5"), first_token=(first_token,))
    model = tiny.tiny_llama()
    sink, outcome = asks.sweep(model, config, tiny.prompt_set([60, 45]), Options(64, fidelity=True))
    assert outcome.errors == 0
    by: dict[tuple[str, str], list[dict]] = {}  # type: ignore[type-arg]
    for r in sink.records:
        by.setdefault((r["method"], r["sample_id"]), []).append(r)
    share = 10 / 16  # 16 channels in one group: 8 bits and 32 bits for scale and smallest element
    for sample in ("s0", "s1"):
        assert [len(by[m, sample]) for m in methods] == [2, 2, 2, 2, 1]
        for i, plain in enumerate(by["snapkv:window=4", sample]):
            merged, quant, both = (by[m, sample][i] for m in methods[1:4])
            assert merged["kv_bytes"]["prefill"] == plain["kv_bytes"]["prefill"]
            assert merged["kept"] == quant["kept"] == both["kept"] == plain["kept"]
            assert quant["kv_bytes"]["prefill"] == both["kv_bytes"]["prefill"] == share * plain["kv_bytes"]["prefill"]
            token = plain["kv_bytes"]["full"] // plain["n_prompt"]
            for r in (quant, both):
                assert r["kv_bytes"]["end"] == r["kv_bytes"]["prefill"] + share * token * (r["n_new"] - 1)
                assert r["fidelity"]["kl"] > 0
        (alone,) = by["quant", sample]
        assert alone["measured_ratio"] == share
        assert alone["kept"] == alone["n_prompt"]
        assert alone["flags"] == []


def test_merged_rows_read_other_values_than_evicted_ones() -> None:
    config = SweepConfig(methods=("snapkv:window=4", "snapkv:window=4+merge"), ratios=("0.3",))
    sink, _ = asks.sweep(tiny.tiny_llama(), config, tiny.prompt_set([60]), Options(64, fidelity=True))
    kl = {r["method"]: r["fidelity"]["kl"] for r in sink.records}
    assert kl["snapkv:window=4"] != kl["snapkv:window=4+merge"]


@pytest.mark.parametrize(
    "text",
    ["snapkv+minicache", "h2o+merge+minicache:t=0.5", "random+minicache", "shotkv+minicache", "adakv+minicache",
     "random_shot+minicache", "chunkkv+minicache"],
)  # fmt: skip
def test_layers_that_keep_other_tokens_are_not_merged(text: str) -> None:
    """Before anything runs, with an evictor to take instead."""
    with pytest.raises(KvcliError, match="keep the same tokens; those of") as found:
        build(text)
    assert text in found.value.given
    build(found.value.fix)


ALIKE = ["streaming_llm", "streaming_llm:sinks=0", "shotkv:scope=all-layers", "random_shot:scope=all-layers"]


@pytest.mark.parametrize("evictor", ALIKE)
def test_layers_that_keep_the_same_tokens_are_merged(evictor: str) -> None:
    prompt = random_prompt(60, layers=4, dim=8)
    for text in (f"{evictor}+minicache", f"{evictor}+merge+minicache:start=0"):
        made = build(text)
        ctx = context_for(made, prompt)
        for size in (20, 35):
            first, *others = positions_kept(made.select(ctx, Budget.of_size(size, 60, 4, 2)).kept, 2)
            assert all(kept == first for kept in others)
        positions = made.select(ctx, Budget.of_size(20, 60, 4, 2)).kept
        assert len(storing.stored("minicache:start=0", ctx, positions)) == 4


@pytest.mark.parametrize("text", ["snapkv+minicache:start=1", "chunkkv:reuse=2+minicache", "snapkv+lowrank"])
def test_what_may_hold_the_same_tokens_is_not_refused(text: str) -> None:
    """No layer is merged; whether layers that share a choice are paired, the model's depth decides."""
    build(text)


def test_layers_that_cannot_be_stored_fail_that_sample_alone_and_say_why() -> None:
    """Of four layers chunkkv lets the first three share a choice, and minicache merges the last two."""
    config = SweepConfig(methods=("chunkkv:chunk=4,reuse=3,window=4+minicache", "snapkv:window=4"), ratios=("0.3",))
    sink, outcome = tiny.run(tiny.tiny_llama(layers=4), config, tiny.prompt_set([60]))
    found = {r["method"].partition(":")[0]: r for r in sink.records}
    assert found["snapkv"]["status"] == "ok"
    assert "layers 2 and 3 kept different ones" in found["chunkkv"]["error"]
    assert outcome.errors == 1


def test_every_transform_and_merge_is_named_in_the_cards() -> None:
    kinds = {name: find(name).card()["kind"] for name in ("kivi", "think", "quant", "lowrank", "minicache", "merge")}
    assert kinds.pop("merge") == "merge"
    assert set(kinds.values()) == {"transform"}
