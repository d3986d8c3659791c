"""KL, top-1 agreement and NLL against computations of their own: the whole text through the unmodified model, with
masks where pairs were evicted, and log-softmax in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcli.cache.rows import Kept, head_positions
from kvcli.config import SweepConfig
from kvcli.engine import fidelity
from kvcli.engine.cells import Cell
from kvcli.engine.records import repetition
from kvcli.engine.runner import Options
from kvcli.models.wrapper import Model
from tests.engine import tiny
from tests.engine.asks import exact_model, of_length, sweep
from tests.engine.test_equalities import masked_logits
from tests.engine.test_generating import limits_of
from tests.oracles.generating import masked_generate, rule_of

OPTIONS = Options(16, keep_maps=99, fidelity=True)
NULL = dict.fromkeys(("kl", "top1", "nll", "tokens"))
Figures = dict[str, Any]


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with exact_model() as model:
        yield model


@pytest.fixture(autouse=True)
def _some_end_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of different lengths."""
    monkeypatch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset(range(0, 400, 11)))


def figures(full: Tensor, other: Tensor, right: list[int]) -> Figures:
    """full, other [T, V]: logits before each of the tokens `right`."""
    a, b = full.double().log_softmax(-1), other.double().log_softmax(-1)
    rows = range(len(right))
    return {
        "kl": float((a.exp() * (a - b)).sum(-1).mean()),
        "top1": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
        "nll": sum(float(a[t, right[t]] - b[t, right[t]]) for t in rows) / len(right),
        "tokens": len(right),
    }


def measured(record: dict[str, Any]) -> Figures:
    return {name: record["fidelity"][name] for name in NULL}


def whole(kept: list[list[list[int]]], heads: int) -> Kept:
    return [[torch.tensor(p) for p in (layer * heads if len(layer) == 1 else layer)] for layer in kept]


def truth(model: Model, ids: list[int], answer: list[int], kept: Kept, first_token: str) -> Figures:
    """Of a cache that keeps `kept` of the prompt and every generated token; answer: full's."""
    n, compressed = len(ids), first_token == "compressed"
    begin = n - 1 if compressed else n
    fed, right = ([ids[-1], *answer[:-1]], answer) if compressed else (answer[:-1], answer[1:])
    everything: Kept = [torch.arange(n)] * model.shapes.layers
    full, other = (masked_logits(model, ids[:begin] + fed, n, k, begin)[begin:] for k in (everything, kept))
    return figures(full, other, right)


def full_of(sink: tiny.Memory) -> dict[tuple[str, str], list[int]]:
    return {(r["first_token"], r["sample_id"]): r["output_ids"] for r in sink.records if r["method"] == "full"}


METHODS = ("snapkv", "pyramidkv:window=2,beta=4", "h2o", "shotkv", "streaming_llm", "kvzip", "chunkkv", "random")


def test_the_figures_are_those_of_the_masked_model(exact: Model) -> None:
    """Both first-token modes, per-layer, per-head and ragged selections, answers of different lengths, in batches."""
    prompts = of_length(tiny.prompt_set([50, 21, 64, 37, 45]), 12)
    config = SweepConfig(methods=METHODS, ratios=("0.2", "0.6"), first_token=("compressed", "prefill"))
    sink, outcome = sweep(exact, config, prompts, OPTIONS)
    assert outcome.errors == 0
    answers, lengths = full_of(sink), set()
    for record in sink.records:
        sample, mode = record["sample_id"], record["first_token"]
        if record["method"] == "full":
            assert measured(record) == {
                "kl": 0.0,
                "top1": 1.0,
                "nll": 0.0,
                "tokens": len(record["output_ids"]) - (mode == "prefill"),
            }
            continue
        answer = answers[mode, sample]
        kept = whole(sink.maps[record["cell_id"], sample], 2)
        ids = prompts.prompts[int(sample[1:])].ids
        wanted = NULL if mode == "prefill" and len(answer) == 1 else truth(exact, ids, answer, kept, mode)
        assert measured(record) == pytest.approx(wanted, abs=2e-8), (record["method"], mode, sample)
        lengths.add(len(answer))
    assert len(lengths) > 2
    lossy = [r["fidelity"]["kl"] for r in sink.records if r["method"] != "full" and r["fidelity"]["kl"] is not None]
    assert sum(kl > 0.01 for kl in lossy) > len(lossy) / 2


def test_at_ratio_one_nothing_differs(exact: Model) -> None:
    config = SweepConfig(methods=METHODS, ratios=("1",), first_token=("compressed", "prefill"))
    sink, outcome = sweep(exact, config, of_length(tiny.prompt_set([50, 21, 64]), 12), OPTIONS)
    assert outcome.errors == 0
    for record in sink.records:
        found = measured(record)
        assert found["kl"] < 1e-9 and found["top1"] == 1.0 and abs(found["nll"]) < 1e-9, record["method"]


@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
@pytest.mark.parametrize("method", ["h2o", "tova", "streaming_llm", "shotkv", "scope"])
def test_a_cache_that_evicts_on_is_compared_step_by_step(exact: Model, method: str, first_token: str) -> None:
    """The oracle is fed full's answer and evicts by the paper's rule as it goes."""
    prompts = of_length(tiny.prompt_set([37, 24, 31]), 12)
    config = SweepConfig(methods=(method,), ratios=("0.4",), decode_ratios=("0.3",), first_token=(first_token,))
    sink, outcome = sweep(exact, config, prompts, OPTIONS)
    assert outcome.errors == 0
    answers = full_of(sink)
    (cell,) = (c for c in tiny.plan_of(config, prompts).cells.values() if c.method != "full")
    for record in sink.records:
        if record["method"] == "full":
            continue
        sample, ids = record["sample_id"], prompts.prompts[int(record["sample_id"][1:])].ids
        answer = answers[first_token, sample]
        if first_token == "prefill" and len(answer) == 1:
            assert measured(record) == NULL
            continue
        other = torch.stack(_stepwise(exact, cell, ids, sink.maps[cell.id, sample], answer))
        begin = len(ids) - (first_token == "compressed")
        right = answer if first_token == "compressed" else answer[1:]
        text = [*ids, *answer[:-1]]
        full = masked_logits(exact, text, len(ids), [torch.arange(len(ids))] * 3, begin)[begin:]
        assert measured(record) == pytest.approx(figures(full, other, right), abs=2e-8)
        assert record["fidelity"]["kl"] > 1e-4


def _stepwise(model: Model, cell: Cell, ids: list[int], kept: list[Any], answer: list[int]) -> list[Tensor]:
    heads, kv_heads = model.shapes.heads, model.shapes.kv_heads[0]
    kept = [layer * kv_heads if len(layer) == 1 else layer for layer in kept]
    rule = rule_of(cell.method, heads, kv_heads)
    limit = limits_of(cell, len(kept[0][0]), len(ids), rule)
    run = masked_generate(model.hf, ids, kept, rule, len(answer), limit, first_token=cell.first_token, forced=answer)
    return run.logits


def pruned_logits(model: Model, text: list[int], n: int, kept: Kept) -> Tensor:
    """Logits where, layer by layer, a token that had left sees itself alone and is seen by nobody else."""
    size, hooks = len(text), []
    for number, layer in enumerate(model.hf.model.layers):
        seen = torch.cat([head_positions(kept[number], 1)[0], torch.arange(n, size)])
        visible = torch.eye(size, dtype=torch.bool)
        visible[:, seen] = True
        visible &= torch.ones(size, size, dtype=torch.bool).tril()
        mask = torch.zeros(1, 1, size, size, dtype=model.dtype).masked_fill(~visible, float("-inf"))

        def give(module: object, args: Any, kwargs: Any, mask: Tensor = mask) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(give, with_kwargs=True))
    model.hf.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            return model.hf(torch.tensor([text]), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("modes", [("compressed",), ("prefill",), ("compressed", "prefill")])
def test_rows_that_were_pruned_while_they_were_read_are_compared_from_the_first_token_on(
    exact: Model, modes: tuple[str, ...]
) -> None:
    """Their first token is predicted by their own prefill, whatever the mode of `full`."""
    prompts = of_length(tiny.prompt_set([50, 64, 45]), 10)
    config = SweepConfig(methods=("pyramidinfer:context=4",), ratios=("0.6",), first_token=modes)
    sink, outcome = sweep(exact, config, prompts, OPTIONS)
    assert outcome.errors == 0
    answers = full_of(sink)
    rows = [r for r in sink.records if r["method"] != "full"]
    assert len(rows) == 3 and {r["first_token"] for r in rows} == {"n/a"}
    for record in rows:
        sample = record["sample_id"]
        ids, answer = prompts.prompts[int(sample[1:])].ids, answers[modes[-1], sample]
        assert record["fidelity"]["identical"] == (record["output_ids"] == answer)
        n, text = len(ids), [*ids, *answer[:-1]]
        other = pruned_logits(exact, text, n, [torch.tensor(p[0]) for p in sink.maps[record["cell_id"], sample]])
        full = masked_logits(exact, text, n, [torch.arange(n)] * 3, n)
        assert measured(record) == pytest.approx(figures(full[n - 1 :], other[n - 1 :], answer), abs=1e-6)
        assert record["fidelity"]["kl"] > 1e-3
    assert any(len(answers[modes[-1], r["sample_id"]]) > 1 for r in rows)


def test_what_cannot_be_compared_is_null(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = of_length(tiny.prompt_set([50, 21]), 1)
    config = SweepConfig(methods=("snapkv",), ratios=("0.3",), first_token=("compressed", "prefill"))
    sink, _ = sweep(exact, config, prompts, OPTIONS)
    for record in sink.records:
        if record["method"] == "full":
            continue
        assert record["fidelity"]["identical"] is not None
        one_token_of_the_prefill = record["first_token"] == "prefill"
        assert (measured(record) == NULL) == one_token_of_the_prefill
        assert record["fidelity"]["tokens"] == (None if one_token_of_the_prefill else 1)

    monkeypatch.setattr(fidelity, "distances", lambda *a, **k: pytest.fail("computed"))
    quiet = dataclasses.replace(OPTIONS, fidelity=False)
    sink, _ = sweep(exact, config, prompts, quiet)
    for record in sink.records:
        assert record["method"] == "full" or measured(record) == NULL
        assert record["fidelity"]["identical"] is not None or record["method"] == "full"
    sink, _ = sweep(exact, dataclasses.replace(config, full=False), prompts, OPTIONS)
    assert len(sink.records) == 4
    for record in sink.records:
        assert record["fidelity"] == {**NULL, "first_divergence": None, "identical": None}


def test_of_long_answers_the_beginning_is_compared(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = of_length(tiny.prompt_set([50, 21]), 12)
    config = SweepConfig(methods=("snapkv", "h2o"), ratios=("0.3",), first_token=("compressed", "prefill"),
                         decode_ratios=("off", "0.5"))  # fmt: skip
    options = dataclasses.replace(OPTIONS, ignore_eos=True)
    whole_, _ = sweep(exact, config, prompts, options)
    monkeypatch.setattr(fidelity, "MOST_TOKENS", 5)
    sink, _ = sweep(exact, config, prompts, options)
    answers = full_of(sink)
    assert {key: r["output_ids"] for key, r in sink.by_key().items()} == {
        key: r["output_ids"] for key, r in whole_.by_key().items()
    }
    checked = 0
    for record in sink.records:
        if record["method"] == "full":
            continue
        mode, sample = record["first_token"], record["sample_id"]
        assert record["fidelity"]["tokens"] == (5 if mode == "compressed" else 4)
        if record["decode"] is None:
            ids, kept = prompts.prompts[int(sample[1:])].ids, whole(sink.maps[record["cell_id"], sample], 2)
            wanted = truth(exact, ids, answers[mode, sample][:5], kept, mode)
            assert measured(record) == pytest.approx(wanted, abs=2e-8)
            checked += 1
    assert checked == 8


@pytest.mark.parametrize("logits", [1, 2000, 20_000])
def test_many_logits_are_computed_in_parts(exact: Model, monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    prompts = of_length(tiny.prompt_set([50, 21, 64]), 12)
    config = SweepConfig(methods=("snapkv", "pyramidkv"), ratios=("0.3",), first_token=("compressed", "prefill"))
    at_once, _ = sweep(exact, config, prompts, OPTIONS)
    monkeypatch.setattr(fidelity, "_LOGITS", logits)
    in_parts, _ = sweep(exact, config, prompts, OPTIONS)
    for key, record in in_parts.by_key().items():
        assert measured(record) == pytest.approx(measured(at_once.by_key()[key]), abs=2e-8)


def test_sampled_answers_are_compared_with_fulls_own_draw(exact: Model) -> None:
    """Teacher-forced on the answer of the same seed and draw; the figures are of the model's own probabilities."""
    prompts = of_length(tiny.prompt_set([50, 21]), 8)
    config = SweepConfig(methods=("snapkv",), ratios=("0.3",), first_token=("compressed", "prefill"), draws=2,
                         seeds=(0, 5), temperature=0.7)  # fmt: skip
    sink, _ = sweep(exact, config, prompts, dataclasses.replace(OPTIONS, temperature=0.7))
    full = {
        (r["first_token"], r["sample_id"], r["seed"], r["draw"]): r["output_ids"]
        for r in sink.records if r["method"] == "full"
    }  # fmt: skip
    assert len(full) == 16
    for record in sink.records:
        if record["method"] == "full":
            continue
        mode, sample = record["first_token"], record["sample_id"]
        answer = full[mode, sample, record["seed"], record["draw"]]
        assert record["fidelity"]["identical"] == (record["output_ids"] == answer)
        if mode == "prefill" and len(answer) == 1:
            assert measured(record) == NULL
            continue
        kept = whole(sink.maps[record["cell_id"], sample], 2)
        wanted = truth(exact, prompts.prompts[int(sample[1:])].ids, answer, kept, mode)
        assert measured(record) == pytest.approx(wanted, abs=2e-8)


def test_a_row_of_nan_is_recorded_without_figures(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of the store is strict JSON: NaN must not end the command, and must not reach another row's figures."""
    from kvcli.engine.asking import Asker
    from kvcli.results.store import encode

    prompts = of_length(tiny.prompt_set([50, 21, 64]), 6)
    config = SweepConfig(methods=("snapkv",), ratios=("0.3",))
    sound, _ = sweep(exact, config, prompts, OPTIONS)
    ask = Asker.ask

    def spoiled(self: Asker, prompts: Any, sample: int, cell: Cell, ready: Any, *more: Any) -> Any:
        found = ask(self, prompts, sample, cell, ready, *more)
        if (sample, cell.method) == (1, "snapkv"):
            found.row.values = [torch.full_like(v, float("nan")) for v in found.row.values]
        return found

    monkeypatch.setattr(Asker, "ask", spoiled)
    sink, outcome = sweep(exact, config, prompts, OPTIONS)
    assert (len(sink.records), outcome.errors) == (6, 0)
    for record in sink.records:
        encode(record)
        if (record["sample_id"], record["method"]) == ("s1", "snapkv"):
            assert (record["fidelity"]["kl"], record["fidelity"]["nll"]) == (None, None)
        else:
            assert tiny.same(record) == tiny.same(sound.by_key()[record["cell_id"], record["sample_id"]])


def test_repetition_by_hand() -> None:
    assert repetition([]) is None
    assert repetition([1, 2, 3, 4]) is None
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([7] * 5) == 0.5
    assert repetition([7] * 9) == pytest.approx(5 / 6, abs=1e-6)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # five 4-grams, the last is the first again
    assert repetition([1, 2, 1, 2, 1, 2, 1, 2]) == pytest.approx(3 / 5)
