"""Sampled answers: they follow the model's probabilities, and nothing but (seed, sample, draw, step) moves a draw."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from kvcli.config import SweepConfig
from kvcli.engine.runner import Options
from kvcli.engine.sampling import Sampler, top_set
from kvcli.models.wrapper import Model
from tests.engine import tiny
from tests.engine.asks import answers_of_full, of_length, sweep, timeless

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 0.9, 1.7], dtype=torch.float64)
WARM = Options(8, temperature=0.8, top_p=0.95)


def sampler(**changes: Any) -> Sampler:
    given: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seed": 0, "sample": "s", "draw": 0, **changes}
    return Sampler(**given)


def chosen(logits: Tensor, count: int, **settings: Any) -> np.ndarray:
    """How often each token was drawn over `count` (sample, draw, step)."""
    found = np.zeros(len(logits), dtype=int)
    for i in range(count):
        found[sampler(sample=f"s{i % 7}", draw=i % 5, **settings)(logits, i)] += 1
    return found


# --- which tokens are drawn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_draws_follow_the_softmax_of_the_logits_over_the_temperature(temperature: float) -> None:
    found = chosen(LOGITS, 4000, temperature=temperature)
    expected = torch.softmax(LOGITS / temperature, -1).numpy() * 4000
    few = expected < 5
    observed, wanted = (np.append(x[~few], x[few].sum()) for x in (found, expected))
    assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


def test_draws_of_neighbouring_steps_samples_draws_and_seeds_are_independent() -> None:
    """Pairs of draws that differ in one part of the key: no pair of outcomes is more frequent than chance."""
    for other in ({"sample": "t"}, {"draw": 1}, {"seed": 1}, {"step": 1}):
        step, table = other.pop("step", 0), np.zeros((4, 4))
        for i in range(1500):
            table[sampler()(LOGITS[:4], i), sampler(**other)(LOGITS[:4], i + step)] += 1
        assert stats.chi2_contingency(table).pvalue > 1e-3, other


def test_top_p_draws_from_the_top_set_alone_in_the_softmaxs_proportions() -> None:
    p = torch.softmax(LOGITS, -1)
    kept = top_set(p, 0.7)
    found = chosen(LOGITS, 3000, top_p=0.7)
    assert found[~kept.numpy()].sum() == 0
    expected = (p[kept] / p[kept].sum()).numpy() * 3000
    assert stats.chisquare(found[kept.numpy()], expected).pvalue > 1e-3


def test_the_top_set_by_hand() -> None:
    def kept(p: list[float], top_p: float) -> list[int]:
        return top_set(torch.tensor(p, dtype=torch.float64), top_p).nonzero().flatten().tolist()

    p = [0.125, 0.5, 0.125, 0.25]
    assert kept(p, 0.5) == [1]
    assert kept(p, 0.5000001) == [1, 3]
    assert kept(p, 0.75) == [1, 3]
    assert kept(p, 0.76) == [0, 1, 3]  # of the two equal ones the first
    assert kept(p, 0.875) == [0, 1, 3]
    assert kept(p, 0.9) == [0, 1, 2, 3]
    assert kept([0.25] * 4, 0.25) == [0]
    assert kept([0.25] * 4, 0.26) == [0, 1]
    assert kept([0.0, 1.0, 0.0], 0.999) == [1]
    assert kept([0.3, 0.7], 1e-9) == [1]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any), st.integers(1, 63))
def test_the_top_set_is_the_fewest_tokens_that_reach_the_mass(weights: list[int], numerator: int) -> None:
    """Exact fractions; many ties."""
    scale = 64
    parts = [Fraction(w, sum(weights)) for w in weights]
    top_p = Fraction(numerator, scale)
    order = sorted(range(len(parts)), key=lambda i: (-parts[i], i))
    reached, wanted = Fraction(0), []
    for i in order:
        if reached >= top_p:
            break
        wanted.append(i)
        reached += parts[i]
    if abs(float(reached - top_p)) < 1e-9 or any(
        abs(float(sum(parts[i] for i in order[:k]) - top_p)) < 1e-12 for k in range(len(order) + 1)
    ):
        return  # on the very edge binary fractions may round to either side
    p = torch.tensor([float(x) for x in parts], dtype=torch.float64)
    assert sorted(wanted) == top_set(p, float(top_p)).nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_any_dtype_are_taken(dtype: torch.dtype) -> None:
    """Rounded logits, but the same noise: with well separated tokens the same draws."""
    logits = torch.tensor([8.0, 0.0, 4.0, -8.0])
    same = [sampler(top_p=0.9)(logits.to(dtype), i) == sampler(top_p=0.9)(logits.double(), i) for i in range(50)]
    assert all(same)


# --- what moves a draw ------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_sample_draw_and_step_alone() -> None:
    flat = torch.zeros(1000)
    base = [sampler()(flat, i) for i in range(20)]
    assert base == [sampler()(flat, i) for i in range(20)]
    assert base[13] == sampler()(flat, 13)  # no state: any order
    for other in ({"seed": 1}, {"sample": "t"}, {"draw": 1}):
        assert sum(a == b for a, b in zip(base, [sampler(**other)(flat, i) for i in range(20)], strict=True)) <= 2
    assert len(set(base)) > 15
    assert sampler(seed=1, sample="2")(flat, 0) != sampler(seed=12, sample="")(flat, 0)


def test_equal_noise_couples_two_methods() -> None:
    """Where two distributions differ little, so do the draws: far less often than independent ones would."""
    other = LOGITS + torch.linspace(-0.1, 0.1, len(LOGITS), dtype=torch.float64)
    parted = np.mean([sampler()(LOGITS, i) != sampler()(other, i) for i in range(500)])
    apart = np.mean([sampler()(LOGITS, i) != sampler(draw=1)(other, i) for i in range(500)])
    assert parted < 0.1 < 0.6 < apart


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.tiny_llama()


METHODS = ("snapkv", "h2o", "streaming_llm", "pyramidkv", "kvzip", "random", "tova")


def test_at_ratio_one_every_method_gives_fulls_sampled_tokens(model: Model) -> None:
    config = SweepConfig(methods=METHODS, ratios=("1",), first_token=("compressed", "prefill"), temperature=0.8,
                         top_p=0.95, draws=2, seeds=(3,))  # fmt: skip
    prompts = tiny.prompt_set([50, 21, 33])
    sink, outcome = sweep(model, config, prompts, WARM)
    assert outcome.errors == 0
    answers: dict[object, set[tuple[int, ...]]] = {}
    for record in sink.records:
        answers.setdefault((record["sample_id"], record["draw"]), set()).add(tuple(record["output_ids"]))
    assert len(answers) == 3 * 2
    assert all(len(found) == 1 for found in answers.values())
    assert len(set.union(*answers.values())) == 6
    assert len(sink.records) == 6 * 2 * (1 + len(METHODS))
    assert all(r["fidelity"]["identical"] for r in sink.records if r["method"] != "full")


GRID = SweepConfig(
    methods=("snapkv", "h2o", "random"), ratios=("0.3",), first_token=("compressed", "prefill"), temperature=0.8,
    top_p=0.95, draws=2, seeds=(0, 1), decode_ratios=("off", "0.5"),
)  # fmt: skip


def by_what(sink: tiny.Memory) -> dict[tuple[Any, ...], dict[str, Any]]:
    names = ("method", "first_token", "seed", "draw", "sample_id")
    return {(*(r[n] for n in names), str(r["decode"])): r for r in sink.records}


def test_batch_size_order_and_resume_change_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64: with equal logits a draw could differ through its noise alone."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    monkeypatch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    model, prompts = tiny.tiny_llama(torch.float64), of_length(tiny.prompt_set([50, 21, 64]), 6)
    truth, outcome = sweep(model, GRID, prompts, WARM)
    assert outcome.errors == 0
    wanted = {key: tiny.same(r) for key, r in truth.by_key().items()}
    assert len(wanted) == 3 * 2 * 2 * 2 * (1 + 1 + 2 + 1)
    for options, rows in (
        (dataclasses.replace(WARM, decode_rows=1), 1),
        (dataclasses.replace(WARM, decode_rows=100, deterministic=True), 3),
    ):
        other, _ = sweep(model, GRID, prompts, options, prefill_rows=rows)
        assert {key: tiny.same(r) for key, r in other.by_key().items()} == wanted
    order = [2, 0, 1]
    turned = dataclasses.replace(
        prompts, samples=[prompts.samples[i] for i in order], prompts=[prompts.prompts[i] for i in order]
    )
    other, _ = sweep(model, GRID, turned, WARM)
    assert {key: tiny.same(r) for key, r in other.by_key().items()} == wanted


def test_a_resumed_run_draws_what_is_missing_and_compares_it_with_its_own_draw_of_full(model: Model) -> None:
    prompts, options = tiny.prompt_set([50, 21]), dataclasses.replace(WARM, fidelity=True)
    plan = tiny.plan_of(GRID, prompts)
    whole, _ = sweep(model, GRID, prompts, options, plan=plan)
    done = [r for r in whole.records if r["method"] == "full"]
    done += random.Random(1).sample([r for r in whole.records if r["method"] != "full"], 40)
    sink = tiny.Memory(done={(r["cell_id"], r["sample_id"]) for r in done})
    full = answers_of_full(plan, done)
    assert len(full) == len([r for r in done if r["method"] == "full"])
    rest, _ = sweep(model, GRID, prompts, options, plan=plan, sink=sink, full_outputs=full)
    before = whole.by_key()
    assert set(rest.by_key()) == set(before) - sink.done
    for key, record in rest.by_key().items():
        assert record["output_ids"] == before[key]["output_ids"]
        assert record["fidelity"] == pytest.approx(before[key]["fidelity"], abs=1e-5)
        assert record["fidelity"]["kl"] is not None


def test_a_folders_answers_of_full_are_found_again_by_seed_and_draw(model: Model) -> None:
    from kvcli.engine.session import _full_outputs

    prompts = tiny.prompt_set([30])
    for config, options in ((GRID, WARM), (dataclasses.replace(GRID, temperature=0.0, draws=1), Options(8))):
        plan = tiny.plan_of(config, prompts)
        sink, _ = sweep(model, config, prompts, options, plan=plan)
        assert _full_outputs(sink.records, plan) == answers_of_full(plan, sink.records)


def test_draws_are_cells_and_the_first_of_three_is_the_only_one_of_one(model: Model) -> None:
    prompts = tiny.prompt_set([30, 40])
    config = SweepConfig(methods=("snapkv",), ratios=("0.3",), temperature=0.8, top_p=0.95)
    one, _ = sweep(model, config, prompts, WARM)
    three, _ = sweep(model, dataclasses.replace(config, draws=3), prompts, WARM)
    assert len(tiny.plan_of(dataclasses.replace(config, draws=3), prompts).cells) == 6
    assert (len(one.records), len(three.records)) == (4, 12)
    assert Counter(r["draw"] for r in three.records) == {0: 4, 1: 4, 2: 4}
    first = {key: tiny.same(r) for key, r in three.by_key().items() if r["draw"] == 0}
    assert first == {key: tiny.same(r) for key, r in one.by_key().items()}
    answers = {tuple(r["output_ids"]) for r in three.records if r["method"] == "full" and r["sample_id"] == "s0"}
    assert len(answers) == 3


def test_a_row_that_starts_in_the_cache_uses_the_noise_of_step_zero_first(model: Model) -> None:
    """Both first-token modes of `full` draw the same tokens: neither skips or repeats a step."""
    config = SweepConfig(methods=("full",), temperature=1.3, first_token=("compressed", "prefill"), draws=2)
    sink, _ = sweep(model, config, of_length(tiny.prompt_set([30, 40]), 12), Options(8, temperature=1.3))
    modes: dict[object, set[tuple[int, ...]]] = {}
    for record in sink.records:
        modes.setdefault((record["sample_id"], record["draw"]), set()).add(tuple(record["output_ids"]))
    assert len(modes) == 4
    assert all(len(found) == 1 for found in modes.values())


def test_the_tables_average_draws_within_a_sample(tmp_path: Any) -> None:
    """Two samples with three draws each are two samples, not six."""
    from kvcli.analysis.reading.load import load_run
    from kvcli.analysis.tables.build import summarise
    from tests.analysis.synthetic import record, write

    facts = {"task": "t", "first_token": "compressed", "shots": 8, "metric": "exact", "extracted": "x", "seed": 0}
    drawn = {"full": [[1, 1, 0], [1, 0, 0]], "snapkv": [[1, 0, 0], [0, 0, 0]]}
    lines = [
        record(cell_id=f"{method}{draw}", sample_id=str(i), method=method, draw=draw, score=float(score), status="ok",
               ratio="1" if method == "full" else "0.1", measured_ratio=0.1, **facts)
        for method, samples in drawn.items() for i, scores in enumerate(samples) for draw, score in enumerate(scores)
    ]  # fmt: skip
    write(tmp_path / "samples.jsonl", lines)
    (tmp_path / "run.json").write_text("{}")
    (table,) = summarise(load_run(tmp_path))
    assert table.full is not None
    assert (table.full.n, table.full.records, table.full.seeds) == (2, 6, 3)
    assert table.full.score == pytest.approx((2 / 3 + 1 / 3) / 2)
    (cell,) = table.cells()
    assert (cell.n, cell.records, cell.seeds, cell.errors) == (2, 6, 3, 0)
    assert cell.score == pytest.approx((1 / 3 + 0) / 2)
    assert cell.difference is not None
    assert cell.difference.value == pytest.approx(((1 / 3 - 2 / 3) + (0 - 1 / 3)) / 2)


def test_resumed_records_are_those_of_one_run(model: Model) -> None:
    """Byte for byte apart from times, where whole decode batches were left."""
    prompts = tiny.prompt_set([50, 21])
    plan = tiny.plan_of(GRID, prompts)
    whole, _ = sweep(model, GRID, prompts, WARM, plan=plan)
    done = whole.records[: len(whole.records) // 2]
    sink = tiny.Memory(done={(r["cell_id"], r["sample_id"]) for r in done})
    rest, _ = sweep(model, GRID, prompts, WARM, plan=plan, sink=sink, full_outputs=answers_of_full(plan, done))
    assert [timeless(r) for r in rest.records] == [timeless(r) for r in whole.records[len(done) :]]
