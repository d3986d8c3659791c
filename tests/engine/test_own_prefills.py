"""Rows that prefill for themselves: those of one context share passes, within bounds, and nothing else changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcli.attention.capture import Needs
from kvcli.cache.budget import Budget
from kvcli.config import SweepConfig
from kvcli.engine import own_prefills
from kvcli.engine.runner import Options
from kvcli.methods.pyramidinfer import Pyramid, PyramidInfer
from kvcli.models import pruned_prefill as passes
from kvcli.models.wrapper import PROBE, Model
from tests.engine import asks, test_agnostic, tiny

OPTIONS = Options(64, keep_maps=99, fidelity=True)
CONFIG = SweepConfig(
    methods=("snapkv:window=4", "pyramidinfer:context=4", "pyramidinfer:context=4,sinks=0"),
    ratios=("0.3", "0.5", "0.8"),
    first_token=("compressed", "prefill"),
)
LENGTHS = [50, 21, 64, 37]


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with asks.exact_model() as model:
        yield model


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prefills in each pass that was tried."""
    seen: list[int] = []
    run = passes._run

    def counted(model: Model, ids: Sequence[int], asked: Sequence[Any]) -> Any:
        seen.extend([len(asked)] if list(ids) != list(PROBE) else [])
        return run(model, ids, asked)

    monkeypatch.setattr(passes, "_run", counted)
    return seen


def records(model: Model, config: SweepConfig = CONFIG, options: Options = OPTIONS, **more: Any) -> tiny.Memory:
    sink, outcome = asks.sweep(model, config, tiny.prompt_set(LENGTHS), options, **more)
    assert outcome.errors == 0, outcome.messages
    return sink


def assert_equal(found: tiny.Memory, truth: tiny.Memory) -> None:
    assert found.maps == truth.maps
    assert set(found.by_key()) == set(truth.by_key())
    for key, record in found.by_key().items():
        a, b = tiny.same(record), tiny.same(truth.by_key()[key])
        assert a.pop("fidelity") == pytest.approx(b.pop("fidelity"), abs=2e-8), key
        assert a == b


@pytest.fixture(scope="module")
def alone(exact: Model) -> tiny.Memory:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_prefills, "MOST_BYTES", 0)
        return records(exact)


def test_one_pass_for_all_ratios_and_settings_of_a_sample(exact: Model, ran: list[int], alone: tiny.Memory) -> None:
    ran.clear()
    assert_equal(records(exact), alone)
    assert ran == [6] * 4


def test_a_chunk_of_tokens_bounds_a_pass(
    exact: Model, ran: list[int], alone: tiny.Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_prefills, "CHUNK", 130)
    ran.clear()
    assert_equal(records(exact), alone)
    assert sorted(ran) == sorted([2, 2, 2, 6, 2, 2, 2, 3, 3])  # of 50, 21, 64 and 37 tokens


def test_what_waits_is_bounded(
    exact: Model, ran: list[int], alone: tiny.Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values in float64: 3 layers, 2 KV heads of 16: 1,536 bytes per token, so two of the 64 tokens."""
    most = 2 * 64 * 1536
    monkeypatch.setattr(own_prefills, "MOST_BYTES", most)
    together, held = own_prefills.OwnPrefills._together, []

    def watched(self: own_prefills.OwnPrefills, *args: Any) -> None:
        together(self, *args)
        held.append(sum(x.nbytes for done in self._waiting.values() for x in (*done.keys, *done.values)))

    monkeypatch.setattr(own_prefills.OwnPrefills, "_together", watched)
    ran.clear()
    assert_equal(records(exact), alone)
    assert sum(ran) == 6 * 4
    assert 0 < max(held) <= most
    assert max(ran) < 6
    assert len(ran) > 4


def test_nothing_waits_behind_a_decode_batch(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    clear = own_prefills.OwnPrefills.clear

    def watched(self: own_prefills.OwnPrefills) -> None:
        left.append(len(self._waiting))
        clear(self)

    monkeypatch.setattr(own_prefills.OwnPrefills, "clear", watched)
    records(exact, prefill_rows=2)
    assert left == [0, 0]
    sink, config = tiny.Memory(), CONFIG
    asks.sweep(exact, config, tiny.prompt_set(LENGTHS), dataclasses.replace(OPTIONS, decode_rows=2), sink=sink)
    assert len(sink.records) == 4 * (2 * (1 + 3) + 6)
    assert left == [0, 0, 0]


def test_a_fault_at_one_ratio_is_that_rows_alone(
    exact: Model, alone: tiny.Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PyramidInfer.prefill_keep

    def fails(self: PyramidInfer, layer: int, received: Tensor, positions: Tensor, state: Pyramid) -> Tensor:
        if state.sizes[-1] < 0.25 * state.sizes[0]:
            raise ValueError("too small for me")
        return plain(self, layer, received, positions, state)

    monkeypatch.setattr(PyramidInfer, "prefill_keep", fails)
    sink, outcome = asks.sweep(exact, CONFIG, tiny.prompt_set(LENGTHS), OPTIONS)
    bad = [r for r in sink.records if r["status"] == "error"]
    assert outcome.errors == len(bad) > 0
    assert {r["error"] for r in bad} == {"ValueError: too small for me"}
    assert {r["method"].partition(":")[0] for r in bad} == {"pyramidinfer"}
    for key, record in sink.by_key().items():
        if record["status"] == "ok":
            a, b = tiny.same(record), tiny.same(alone.by_key()[key])
            assert a.pop("fidelity") == pytest.approx(b.pop("fidelity"), abs=2e-8)
            assert a == b
    assert any(r["status"] == "ok" and r["method"].startswith("pyramidinfer") for r in sink.records)


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("no")])
def test_without_memory_for_several_each_runs_alone(
    exact: Model, alone: tiny.Memory, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tried = passes._run, []

    def short(model: Model, ids: Sequence[int], asked: Sequence[Any]) -> Any:
        tried.append(len(asked))
        if len(asked) > 1 and list(ids) != list(PROBE):
            raise error
        return run(model, ids, asked)

    monkeypatch.setattr(passes, "_run", short)
    assert_equal(records(exact), alone)
    assert tried.count(6) == 4, "tried once for each sample"
    assert tried.count(1) == 6 * 4


def context(model: Model, n: int) -> Any:
    """What is read of a context here."""
    ids = tiny.prompt(n, n).ids
    done = model.prefill([ids], Needs(), [0]).dense(0)
    return SimpleNamespace(n=n, token_ids=ids, keys=done.keys, values=done.values)


def owns(n: int) -> list[own_prefills.Own]:
    budgets = [Budget.of_ratio(Decimal(ratio), n, 3, 2, False) for ratio in ("0.8", "0.5", "0.4")]
    return [own_prefills.Own((0, f"c{i}"), "text", PyramidInfer(context=4), b) for i, b in enumerate(budgets)]


def test_what_was_given_up_is_run_again_and_nothing_stands_for_another_prompt(exact: Model, ran: list[int]) -> None:
    own = own_prefills.OwnPrefills(exact)
    long, short, (first, *others) = context(exact, 60), context(exact, 30), owns(60)
    ran.clear()
    found = own.take(long, first, others)
    again = own.take(long, first, others)  # its row had no memory and is asked for once more
    assert ran == [3, 1]
    assert [p.tolist() for p in again.positions] == [p.tolist() for p in found.positions]
    own.clear()
    _, mine, _ = owns(30)
    done = own.take(short, mine)
    assert [p.tolist() for p in done.positions] == [
        p.tolist() for p in passes.pruned_prefill(exact, short.token_ids, mine.method, mine.budget).positions
    ]
    assert ran == [3, 1, 1, 1]


def test_draws_share_a_prefill(exact: Model, ran: list[int]) -> None:
    config = dataclasses.replace(CONFIG, methods=("pyramidinfer:context=4",), temperature=0.7, draws=3, seeds=(0, 5))
    ran.clear()
    sink = records(exact, config, dataclasses.replace(OPTIONS, temperature=0.7))
    own = [r for r in sink.records if r["method"].startswith("pyramidinfer")]
    assert len(own) == 4 * 3 * 3 * 2
    assert ran == [3] * 4


def test_questions_about_one_context_share_a_prefill(exact: Model, ran: list[int]) -> None:
    config = SweepConfig(methods=("pyramidinfer:context=4",), ratios=("0.4", "0.7"), query=("agnostic",))
    prompts = test_agnostic.same_context(4)
    ran.clear()
    found, outcome = test_agnostic.run(exact, config, prompts)
    assert outcome.errors == 0, outcome.messages
    assert ran == [2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_prefills, "MOST_BYTES", 0)
        ran.clear()
        truth, _ = test_agnostic.run(exact, config, prompts)
    assert ran == [1] * 8
    assert found.maps == truth.maps
    for key, record in found.by_key().items():
        a, b = tiny.same(record), tiny.same(truth.by_key()[key])
        assert a.pop("options") == pytest.approx(b.pop("options"), abs=1e-7)
        assert a == b


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_killed_run_goes_on_to_the_same_records(deterministic: bool) -> None:
    """float32: the passes of a batch that is repeated are formed as they were."""
    model, prompts = tiny.tiny_llama(), asks.of_length(tiny.prompt_set(LENGTHS), 12)
    options = dataclasses.replace(OPTIONS, decode_rows=3, deterministic=deterministic)
    plan = tiny.plan_of(CONFIG, prompts)
    whole, outcome = asks.sweep(model, CONFIG, prompts, options, plan=plan)
    assert outcome.errors == 0
    truth = {key: asks.timeless(record) for key, record in whole.by_key().items()}
    for had in (whole.records[: len(truth) // 3], whole.records[::2]):
        sink = tiny.Memory(done={(r["cell_id"], r["sample_id"]) for r in had})
        full = asks.answers_of_full(plan, had)
        rest, _ = asks.sweep(model, CONFIG, prompts, options, plan=plan, sink=sink, full_outputs=full)
        found = {key: asks.timeless(record) for key, record in rest.by_key().items()}
        assert found == {key: record for key, record in truth.items() if key not in sink.done}
