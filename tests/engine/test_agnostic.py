"""--query agnostic: what stands before the question is compressed without having seen it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from decimal import Decimal

import pytest
import torch

from kvcli.cache.budget import Budget
from kvcli.config import SweepConfig
from kvcli.engine.cells import make_cells
from kvcli.engine.plan import Generation, make_plan
from kvcli.engine.prefixes import question_start
from kvcli.engine.prompts import PromptSet
from kvcli.engine.runner import Options, Outcome, Runner
from kvcli.engine.selecting import positions_kept, select
from kvcli.errors import KvcliError
from kvcli.methods import catalog
from kvcli.methods.base import Method
from kvcli.models.wrapper import Model
from tests.engine import asks, tiny
from tests.engine.test_choosing import OPTIONS, choosing
from tests.engine.test_equalities import OWN_SIZE, SIZED, masked_logits, prefilled

BLIND = [m for m in (*SIZED, *OWN_SIZE) if "answer" not in catalog.build(m).needs()]
"""Evicting methods that need no question."""
KEY = tiny.KEY._replace(query="agnostic")


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with asks.exact_model() as model:
        yield model


def run(
    model: Model, config: SweepConfig, prompts: PromptSet, prefill_rows: int = 4, decode_rows: int = 64
) -> tuple[tiny.Memory, Outcome]:
    config = dataclasses.replace(config, query=("aware", "agnostic") if "aware" in config.query else config.query)
    cells = make_cells(config, [tiny.TASK], {"model": "tiny"})
    sets = {tiny.KEY: prompts, KEY: prompts.agnostic()}
    size = dict.fromkeys(sets, len(prompts.samples))
    plan = make_plan(cells, [Generation(tuple(c.id for c in cells), None)], size, prefill_rows)
    sink = tiny.Memory()
    return sink, Runner(model, plan, sets, sink, Options(decode_rows, keep_maps=99)).run()


AGNOSTIC = SweepConfig(methods=tuple(BLIND), ratios=("0.3",), query=("agnostic",))


def contexts(prompts: PromptSet) -> list[int]:
    return [question_start(p.regions) for p in prompts.prompts]


def same_context(count: int, n: int = 80) -> PromptSet:
    """Prompts that differ in their question alone."""
    prompts = choosing([n] * count)
    first = prompts.prompts[0]
    c = question_start(first.regions)
    found = [dataclasses.replace(p, ids=first.ids[:c] + p.ids[c:], regions=first.regions) for p in prompts.prompts]
    return dataclasses.replace(prompts, prompts=found)


def masks(kept: list[list[list[int]]], c: int) -> list[list[torch.Tensor]]:
    """Kept context positions per layer and KV head."""
    heads = [[torch.tensor([p for p in head if p < c]) for head in layer] for layer in kept]
    return [layer * 2 if len(layer) == 1 else layer for layer in heads]


def test_the_question_reads_the_compressed_context_and_is_kept_whole(exact: Model) -> None:
    """Equality 2, float64: log-likelihoods behind the question = the full cache with the evicted context masked for all
    tokens from the question on."""
    prompts = choosing([70, 48])
    sink, outcome = run(exact, AGNOSTIC, prompts)
    assert outcome.errors == 0, outcome.messages
    assert len(sink.records) == 2 * (1 + len(BLIND))
    for record in sink.records:
        index = int(record["sample_id"][1:])
        ids, c = prompts.prompts[index].ids, contexts(prompts)[index]
        kept = sink.maps[record["cell_id"], record["sample_id"]]
        assert all(head[-(len(ids) - c) :] == list(range(c, len(ids))) for layer in kept for head in layer)
        for option, found in zip(OPTIONS, record["options"], strict=True):
            logits = masked_logits(exact, ids + option, c, masks(kept, c), c)[len(ids) - 1 :]
            right = sum(float(logits[i].log_softmax(-1)[t]) for i, t in enumerate(option))
            assert found == pytest.approx(right, abs=2e-8), record["method"]


def test_generated_answers_go_on_behind_the_question(exact: Model) -> None:
    prompts = tiny.prompt_set([70, 48, 61])
    sink, outcome = run(exact, AGNOSTIC, prompts)
    assert outcome.errors == 0
    for record in sink.records:
        index = int(record["sample_id"][1:])
        ids, c = prompts.prompts[index].ids, contexts(prompts)[index]
        out = record["output_ids"]
        kept = masks(sink.maps[record["cell_id"], record["sample_id"]], c)
        logits = masked_logits(exact, ids + out[:-1], c, kept, c)[len(ids) - 1 :]
        assert logits.argmax(-1).tolist() == out, record["method"]


@pytest.mark.parametrize("method", BLIND)
def test_what_is_kept_is_the_methods_choice_from_the_context_alone(exact: Model, method: str) -> None:
    prompts = choosing([70])
    (c,) = contexts(prompts)
    part = prompts.agnostic().parts[0]
    assert part.ids == prompts.prompts[0].ids[:c]
    assert [r.end for r in part.regions][-1] == c
    sink, _ = run(exact, dataclasses.replace(AGNOSTIC, methods=(method,)), prompts)
    ((key, kept),) = ((k, v) for k, v in sink.maps.items() if sink.by_key()[k]["method"] != "full")
    built = catalog.build(method)
    _, ctx = prefilled_part(exact, part, built)
    size = (ctx.layers, ctx.kv_heads)
    ratio = sink.by_key()[key]["ratio"]
    budget = Budget.of_size(c, c, *size) if ratio is None else Budget.of_ratio(Decimal("0.3"), c, *size)
    expected = positions_kept(select(built, ctx, budget).kept, ctx.kv_heads)
    assert [[[p for p in head if p < c] for head in layer] for layer in kept] == expected


def prefilled_part(model: Model, part, built: Method):  # type: ignore[no-untyped-def]
    """A context as if it were a whole prompt."""
    from tests.engine import test_equalities as equalities

    patch = pytest.MonkeyPatch()
    patch.setattr(equalities.tiny, "prompt", lambda n, seed: part)
    try:
        done, ctx = prefilled(model, len(part.ids), set(built.needs()))
    finally:
        patch.undo()
    return done, dataclasses.replace(ctx, sample_id=part.sha, token_text=part.token_text)


def test_one_context_is_selected_from_once_for_all_its_questions(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = same_context(4)
    method = catalog.find("snapkv")
    calls = []
    own = method.select
    monkeypatch.setattr(method, "select", lambda self, ctx, budget: calls.append(ctx.n) or own(self, ctx, budget))
    sink, _ = run(exact, dataclasses.replace(AGNOSTIC, methods=("snapkv",)), prompts)
    assert calls == contexts(prompts)[:1]
    rows = [r for r in sink.records if r["method"] == "snapkv"]
    assert len({r["cluster"] for r in rows}) == 1
    maps = [sink.maps[r["cell_id"], r["sample_id"]] for r in rows]
    assert all(m == maps[0] for m in maps)
    assert len({tuple(r["options"]) for r in rows}) == 4


def test_ratios_and_bytes_count_the_context_and_the_whole(exact: Model) -> None:
    prompts = choosing([80])
    (c,) = contexts(prompts)
    sink, _ = run(exact, dataclasses.replace(AGNOSTIC, methods=("h2o",), ratios=("0.5",)), prompts)
    (record,) = (r for r in sink.records if r["method"] == "h2o")
    kept = round(0.5 * c + 1e-9)
    assert record["context"] == {"tokens": c, "measured_ratio": pytest.approx(kept / c, abs=1e-6)}
    assert record["measured_ratio"] == pytest.approx((kept + 80 - c) / 80, abs=1e-6)
    assert record["kept"] == kept + 80 - c
    assert record["kept_by_region"]["question"] == 1.0
    assert (record["n_prompt"], record["first_token"], record["query"]) == (80, "compressed", "agnostic")


def test_full_and_ratio_one_give_the_tokens_of_generate() -> None:
    """Equality 1, float32, and both query modes beside each other in one run."""
    model = tiny.tiny_llama()
    prompts = tiny.prompt_set([50, 33, 61])
    config = SweepConfig(methods=tuple(m for m in SIZED if m in BLIND), ratios=("1",))
    sink, outcome = run(model, config, prompts)
    assert outcome.errors == 0
    model.hf.set_attn_implementation("sdpa")
    modes = set()
    for record in sink.records:
        ids = prompts.prompts[int(record["sample_id"][1:])].ids
        plain = model.hf.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert record["output_ids"] == plain[0, len(ids) :].tolist(), (record["method"], record["query"])
        modes.add(record["query"])
        assert record["fidelity"]["identical"] is True
    assert modes == {"aware", "agnostic"}


def test_records_do_not_depend_on_batches(exact: Model) -> None:
    prompts = tiny.prompt_set([50, 41, 64, 37])
    config = dataclasses.replace(AGNOSTIC, methods=tuple(BLIND[:6]), ratios=("0.2", "0.5"))
    one, _ = run(exact, config, prompts)
    other, _ = run(exact, config, prompts, prefill_rows=1, decode_rows=3)
    assert {k: tiny.same(r) for k, r in one.by_key().items()} == {k: tiny.same(r) for k, r in other.by_key().items()}


@pytest.mark.parametrize("method", ["kivi:group=8,residual=8", "quest", "snapkv+quant", "pyramidinfer", "merge"])
def test_other_kinds_of_methods_run_behind_a_blind_context(exact: Model, method: str) -> None:
    prompts = choosing([64, 40])
    name = "snapkv+merge" if method == "merge" else method
    sink, outcome = run(exact, SweepConfig(methods=(name,), ratios=("0.5",), query=("agnostic",)), prompts)
    assert outcome.errors == 0, outcome.messages
    others = [r for r in sink.records if r["method"] != "full"]
    assert len(others) == 2
    assert all(len(r["options"]) == len(OPTIONS) and r["first_token"] == "compressed" for r in others)


def regionless(prompts: PromptSet) -> PromptSet:
    """Prompts that are nothing but a question."""
    found = [
        dataclasses.replace(p, regions=[dataclasses.replace(p.regions[-1], kind="question", start=0, index=-1)])
        for p in prompts.prompts
    ]
    return dataclasses.replace(prompts, prompts=found)


def test_a_prompt_without_anything_before_its_question_is_refused() -> None:
    with pytest.raises(KvcliError, match="nothing stands before the question"):
        regionless(tiny.prompt_set([30])).agnostic()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--method", "h2o", "--decode-ratio", "same"), "exclude each other"),
        (("--method", "oracle"), "answer"),
        (("--method", "shotkv:queries=question"), "column_sum:question"),
    ],
)
def test_what_needs_the_question_is_refused_by_name(kvcli, more: Sequence[str], named: str) -> None:  # type: ignore[no-untyped-def]
    done = kvcli("sweep", "--task", "tb_recall", "--ratio", "0.5", "--query", "agnostic", "--dry-run", *more)
    assert done.code == 2
    assert named in done.err
    assert "--query aware" in done.err


def _kl(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_fidelity_compares_with_full_behind_the_whole_context(exact: Model) -> None:
    """Every row of several methods, against masked attention: full's own row must not be another method's."""
    prompts = tiny.prompt_set([90])
    (c,), ids = contexts(prompts), prompts.prompts[0].ids
    config = dataclasses.replace(AGNOSTIC, methods=("h2o", "knorm", "streaming_llm"), ratios=("0.3", "0.6"))
    cells = make_cells(config, [tiny.TASK], {"model": "tiny"})
    plan = make_plan(cells, [Generation(tuple(x.id for x in cells), None)], {KEY: 1}, 4)
    sink = tiny.Memory()
    options = Options(64, keep_maps=99, fidelity=True)
    Runner(exact, plan, {KEY: prompts.agnostic()}, sink, options).run()
    (full,) = (r for r in sink.records if r["method"] == "full")
    text = ids + full["output_ids"][:-1]
    whole = masked_logits(exact, text, c, [[torch.arange(c)] * 2] * 3, c)[len(ids) - 1 :]
    found = {}
    for record in (r for r in sink.records if r["method"] != "full"):
        kept = masks(sink.maps[record["cell_id"], record["sample_id"]], c)
        mine = masked_logits(exact, text, c, kept, c)[len(ids) - 1 :]
        found[record["method"], record["ratio"]] = record["fidelity"]["kl"]
        assert record["fidelity"]["kl"] == pytest.approx(_kl(whole, mine), abs=1e-6), record["method"]
        assert record["fidelity"]["tokens"] == len(full["output_ids"])
    assert len(found) == 6
    assert min(found.values()) > 1e-3


def test_a_prefill_of_its_own_adds_no_token_to_the_comparison(exact: Model) -> None:
    prompts = tiny.prompt_set([90])
    config = SweepConfig(methods=("pyramidinfer",), ratios=("0.5",), query=("agnostic",))
    cells = make_cells(config, [tiny.TASK], {"model": "tiny"})
    plan = make_plan(cells, [Generation(tuple(x.id for x in cells), None)], {KEY: 1}, 4)
    sink = tiny.Memory()
    Runner(exact, plan, {KEY: prompts.agnostic()}, sink, Options(64, fidelity=True)).run()
    full, mine = sorted(sink.records, key=lambda r: r["method"] != "full")
    assert mine["fidelity"]["tokens"] == full["n_new"]


@pytest.mark.parametrize("method", ["quant", "kivi:group=8,residual=8", "snapkv+quant"])
@pytest.mark.parametrize("chosen", [False, True])
def test_bytes_of_stored_forms_are_those_with_the_question_in_them(exact: Model, method: str, chosen: bool) -> None:
    """What the cache holds when the answer begins, question included; it only grows from there while nothing is
    folded, and never is above the pairs kept whole."""
    prompts = choosing([120], [[9], [17]]) if chosen else tiny.prompt_set([120])
    sink, _ = run(exact, SweepConfig(methods=(method,), ratios=("0.5",), query=("agnostic",)), prompts)
    (record,) = (r for r in sink.records if r["method"] != "full")
    (c,), pair = contexts(prompts), record["kv_bytes"]["full"] // 120
    in_context = record["context"]["measured_ratio"] * c * pair
    assert in_context < record["kv_bytes"]["prefill"] <= round(in_context) + (120 - c) * pair
    assert record["measured_ratio"] == pytest.approx(
        record["kv_bytes"]["prefill"] / record["kv_bytes"]["full"], abs=1e-6
    )


def test_samples_that_share_a_context_or_what_their_task_says_are_one_cluster() -> None:
    prompts = same_context(4)
    names = ["a", "b", "b", ""]
    samples = [dataclasses.replace(s, cluster=n) for s, n in zip(prompts.samples, names, strict=True)]
    other = dataclasses.replace(
        prompts, samples=samples, prompts=[*prompts.prompts[:1], *choosing([80, 70, 60]).prompts]
    )
    found = list(other.agnostic().clusters.values())
    assert found[0] == found[1] == found[2]  # the first two share their context, the middle two their name
    assert len(set(found)) == 2
    assert len(set(prompts.agnostic().clusters.values())) == 1
    assert list(other.clusters.values()) == names


def test_a_context_is_read_once_even_where_its_questions_stand_in_several_batches(
    exact: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = same_context(6)
    calls = []
    method = catalog.find("snapkv")
    own = method.select
    monkeypatch.setattr(method, "select", lambda self, ctx, budget: calls.append(ctx.n) or own(self, ctx, budget))
    config = dataclasses.replace(AGNOSTIC, methods=("snapkv",))
    one, _ = run(exact, config, prompts, prefill_rows=2)
    assert len(calls) == 1
    other, _ = run(exact, config, prompts, prefill_rows=6)
    assert {k: tiny.same(r) for k, r in one.by_key().items()} == {k: tiny.same(r) for k, r in other.by_key().items()}
