"""Options are judged through the compressed cache: against transformers' own attention with evicted keys masked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from kvcli.config import SweepConfig
from kvcli.engine.prompts import PromptSet
from kvcli.engine.runner import Options
from kvcli.models.wrapper import Model
from tests.engine import asks, tiny
from tests.engine.test_equalities import OWN_SIZE, SIZED, TIER1, masked_logits

OPTIONS = [[9], [17], [17, 30], [17, 30, 8], [40, 41]]
"""Two letters, and words that begin alike."""
Choices = dict[str, list[float]]


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with asks.exact_model() as model:
        yield model


def choosing(lengths: Sequence[int], options: Sequence[Sequence[int]] = OPTIONS) -> PromptSet:
    """Prompts with options; the first option is right."""
    plain = tiny.prompt_set(lengths)
    prompts = [dataclasses.replace(p, options=[list(o) for o in options]) for p in plain.prompts]
    texts = tuple(f" option {k}" for k in range(len(options)))
    samples = [dataclasses.replace(s, options=texts, target=0) for s in plain.samples]
    return dataclasses.replace(plain, prompts=prompts, samples=samples)


def truth(model: Model, ids: list[int], kept: Any, first_token: str, option: list[int]) -> float:
    """Log-likelihood of one option behind a prompt whose evicted keys are masked."""
    n = len(ids)
    kept = [[torch.tensor(head) for head in layer] for layer in kept]
    kept = [layer * 2 if len(layer) == 1 else layer for layer in kept]
    compressed = first_token == "compressed"
    logits = masked_logits(model, ids + option, n, kept, n - 1 if compressed else n)
    scores = logits[n - 1 : n - 1 + len(option)].log_softmax(-1)
    return float(sum(scores[i, token] for i, token in enumerate(option)))


def test_each_option_has_its_log_likelihood_behind_the_evicted_cache(exact: Model) -> None:
    """Equality 2 for multiple choice, float64, all evicting methods, both first-token modes, short and long options."""
    prompts = choosing([70, 48])
    config = SweepConfig(methods=(*SIZED, *OWN_SIZE), ratios=("0.3",), first_token=("compressed", "prefill"))
    sink, outcome = tiny.run(exact, config, prompts)
    assert outcome.errors == 0
    assert len(sink.records) == 2 * 2 * (1 + len(SIZED) + len(OWN_SIZE))
    for record in sink.records:
        prompt = prompts.prompts[int(record["sample_id"][1:])]
        kept = sink.maps[record["cell_id"], record["sample_id"]]
        expected = [truth(exact, prompt.ids, kept, record["first_token"], o) for o in OPTIONS]
        close = 2e-8 if record["first_token"] == "compressed" else 1e-6  # the prefill's own logits are float32
        assert record["options"] == pytest.approx(expected, abs=close), (record["method"], record["first_token"])
        best = max(range(len(expected)), key=expected.__getitem__)
        assert record["output_ids"] == OPTIONS[best]
        assert (record["score"], record["finish"]) == (float(best == 0), "choice")
        assert record["target"] == "option 0"


def test_the_first_token_mode_decides_whether_letters_can_degrade(exact: Model) -> None:
    """The trap that gives "no loss at all": one-token options read from the dense prefill never change."""
    prompts = choosing([90, 80, 85, 70], OPTIONS[:2])
    config = SweepConfig(methods=("streaming_llm",), ratios=("0.1",), first_token=("compressed", "prefill"))
    sink, _ = tiny.run(exact, config, prompts)
    seen: dict[tuple[str, str], Choices] = {}
    for record in sink.records:
        seen.setdefault((record["method"], record["first_token"]), {})[record["sample_id"]] = record["options"]
    assert seen["streaming_llm", "prefill"] == seen["full", "prefill"]
    evicted, whole = seen["streaming_llm", "compressed"], seen["full", "compressed"]
    assert all(abs(evicted[s][0] - whole[s][0]) > 1e-3 for s in whole)
    assert any((evicted[s][0] > evicted[s][1]) != (whole[s][0] > whole[s][1]) for s in whole)


def test_choices_do_not_depend_on_what_runs_beside_them(exact: Model) -> None:
    """Equality 3 for multiple choice."""
    prompts = choosing([50, 21, 64, 37])
    shared, _ = tiny.run(exact, TIER1, prompts)
    expected = {key: tiny.same(r) for key, r in shared.by_key().items()}
    for prefill_rows, decode_rows in ((1, 1), (4, 7)):
        other, _ = tiny.run(exact, TIER1, prompts, prefill_rows=prefill_rows, decode_rows=decode_rows)
        assert {key: tiny.same(r) for key, r in other.by_key().items()} == expected


def test_choices_survive_running_out_of_memory(exact: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = choosing([50, 21, 64])
    config = SweepConfig(methods=("snapkv", "h2o"), ratios=("0.3", "0.6"))
    expected, _ = tiny.run(exact, config, prompts)
    asks.watch(exact, monkeypatch, most=3)
    sink, outcome = tiny.run(exact, config, prompts)
    assert outcome.errors == 0
    assert outcome.halved
    assert {k: tiny.same(r) for k, r in sink.by_key().items()} == {
        k: tiny.same(r) for k, r in expected.by_key().items()
    }


def test_an_option_that_does_not_fit_even_alone_is_an_error_record(
    exact: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = choosing([40])
    asks.watch(exact, monkeypatch, most=0)
    sink, outcome = tiny.run(exact, SweepConfig(methods=("snapkv",), ratios=("0.3",)), prompts)
    assert outcome.errors == 2
    assert {r["status"] for r in sink.records} == {"error"}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("quest:tokens=999", {}),
        ("quant", {}),
        ("h2o", {"decode_ratios": ("1",)}),
        ("snapkv+quant", {}),
    ],
)
def test_options_are_judged_in_every_kind_of_cache(exact: Model, method: str, changes: dict[str, Any]) -> None:
    """Eight bits move log-likelihoods by less than 0.2; a cache that keeps or reads everything not at all."""
    prompts = choosing([64, 40])
    config = SweepConfig(methods=(method,), ratios=("1",), **changes)
    sink, outcome = asks.sweep(exact, config, prompts, Options(64))
    assert outcome.errors == 0, outcome.messages
    full = {r["sample_id"]: r["options"] for r in sink.records if r["method"] == "full"}
    others = [r for r in sink.records if r["method"] != "full"]
    assert len(others) == 2
    for record in others:
        bound = 1e-8 if method in ("quest:tokens=999", "h2o") else 0.2
        assert record["options"] == pytest.approx(full[record["sample_id"]], abs=bound)


def test_full_gives_what_transformers_gives() -> None:
    model = tiny.tiny_llama()
    prompts = choosing([50, 33])
    sink, _ = tiny.run(model, SweepConfig(methods=("full",), first_token=("compressed", "prefill")), prompts)
    model.hf.set_attn_implementation("sdpa")
    for record in sink.records:
        ids = prompts.prompts[int(record["sample_id"][1:])].ids
        for option, found in zip(OPTIONS, record["options"], strict=True):
            with torch.no_grad():
                logits = model.hf(torch.tensor([ids + option])).logits[0, len(ids) - 1 : -1]
            scores = logits.log_softmax(-1).gather(1, torch.tensor(option)[:, None])
            assert found == pytest.approx(float(scores.sum()), abs=1e-4)
