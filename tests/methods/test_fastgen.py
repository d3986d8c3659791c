"""FastGen: rules, what they hold and which is taken, against plain loops over whole attention matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.attention.capture import Needs
from kvcli.cache.budget import Budget
from kvcli.config import SweepConfig
from kvcli.engine.prefilling import passes
from kvcli.engine.selecting import select
from kvcli.methods import fastgen as module
from kvcli.methods.catalog import build
from kvcli.methods.context import Context, Region
from kvcli.methods.fastgen import RULES, _is_punctuation, _least, _share, _shares
from tests.attention.test_bands import within_band
from tests.attention.test_capture import eager_attentions
from tests.engine import tiny
from tests.oracles.fastgen import chosen, fastgen
from tests.oracles.harness import budget_for, context_for, lists
from tests.oracles.prompts import Prompt, random_prompt, tied_prompt

MARKS = [".", " ,", "word", "a.", "!?", "\n", " ", "", "x"]
"""Token texts, one after the other; three of nine are punctuation."""


def text_of(i: int) -> str:
    return MARKS[i % len(MARKS)]


def punctuation(prompt: Prompt) -> set[int]:
    return {i for i in range(prompt.n) if i % len(MARKS) in (0, 1, 4)}


def bands_of(prompt: Prompt, dtype: torch.dtype) -> Callable[[int], list[Tensor]]:
    return lambda width: [within_band(torch.tensor(a), width).to(dtype) for a in prompt.attention]


def context_of(prompt: Prompt, dtype: torch.dtype = torch.float64) -> Context:
    sums = context_for(build("h2o"), prompt, dtype=dtype)
    bands = bands_of(prompt, dtype)
    return dataclasses.replace(sums, token_text=text_of, passes={"bands": lambda: bands}, _made={})


def whole(prompt: Prompt) -> Budget:
    return Budget.of_size(prompt.n, prompt.n, prompt.layers, prompt.kv_heads)


def assert_agrees(prompt: Prompt, recovery: float, *, dtype: torch.dtype = torch.float64, **shares: str) -> set[int]:
    """Returns the rules taken."""
    text = ",".join([f"fastgen:recovery={recovery}", *(f"{k}={v}" for k, v in shares.items())])
    selection = build(text).select(context_of(prompt, dtype), whole(prompt))
    assert not selection.flags
    kept, used = lists(selection, prompt.kv_heads), []
    for layer, heads in enumerate(fastgen(prompt, punctuation(prompt), recovery, **shares)):
        for head, (sets, held) in enumerate(heads):
            fitting = [r for r in sorted(chosen(held, recovery)) if sets[r] == kept[layer][head]]
            assert int(selection.facts[layer]["rule"][head]) in fitting
            assert fitting, (
                f"{prompt.name} {text}: layer {layer}, KV head {head} keeps {kept[layer][head]}, held {held}"
            )
            used.append(fitting[0])
            assert set(sets[0]) <= set(kept[layer][head]), "special tokens stay"
    assert sum(selection.notes["rules"].values()) == prompt.layers * prompt.kv_heads
    return set(used)


@pytest.mark.parametrize("n", [1, 2, 5, 17, 64, 100])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("regions", ["shots", "plain", "open"])
def test_selection_agrees_with_plain_loops(regions: str, group: int, n: int) -> None:
    prompt = random_prompt(n, group=group, regions=regions)
    for recovery in (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.95, 1.0):
        assert_agrees(prompt, recovery)


def test_every_rule_is_reached() -> None:
    prompt = random_prompt(100, layers=4)
    used = set()
    for recovery in (0.0, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.95, 1.0):
        used |= assert_agrees(prompt, recovery)
    assert used == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("local, frequent", [("0.3", "0"), ("1", "0"), ("0.7", "0.1"), ("0.5", "0.3")])
def test_other_shares_agree(local: str, frequent: str) -> None:
    """45 tokens: shares that end in a half."""
    used = set()
    for percent in range(30, 100, 5):
        used |= assert_agrees(random_prompt(45), percent / 100, local=local, frequent=frequent)
    assert 3 in used


def test_without_a_local_share_a_query_sees_itself() -> None:
    for percent in range(30, 100, 5):
        assert_agrees(random_prompt(45), percent / 100, local="0", frequent="0.3")


def test_float32_statistics_agree() -> None:
    for recovery in (0.3, 0.5, 0.7, 0.9):
        assert_agrees(random_prompt(65, group=4), recovery, dtype=torch.float32)


@given(n=st.integers(1, 40), kv_heads=st.integers(1, 3), recovery=st.integers(0, 100), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_arbitrary_prompts_agree(n: int, kv_heads: int, recovery: int, seed: int) -> None:
    assert_agrees(random_prompt(n, kv_heads=kv_heads, layers=2, seed=seed), recovery / 100)


def test_more_recovery_never_keeps_less() -> None:
    prompt = random_prompt(80)
    context = context_of(prompt)
    counts = []
    for percent in range(0, 101, 5):
        kept = build(f"fastgen:recovery={percent / 100}").select(context, whole(prompt)).kept
        counts.append([len(head) for layer in kept for head in layer])
    assert all((np.diff(np.array(counts), axis=0) >= 0).ravel())
    assert counts[0] < counts[-1] == [80] * 6


def test_frequent_ties_keep_the_first_positions() -> None:
    """Six of equal column sums stay beside the special and the last token, the first ones."""
    prompt = tied_prompt(20, regions="plain")
    even = [np.ones((4, 20))] * 2
    context = context_for(build("h2o"), prompt, column_sums=even)
    bands = bands_of(prompt, torch.float64)
    context = dataclasses.replace(context, passes={"bands": lambda: bands}, _made={})
    selection = build("fastgen:recovery=0.35").select(context, whole(prompt))
    assert lists(selection, 2) == [[[0, 1, 2, 3, 4, 5, 6, 19]] * 2] * 2


def test_the_knob_decides_whatever_the_ratio() -> None:
    prompt = random_prompt(60)
    context = context_of(prompt)
    sets = [lists(build("fastgen").select(context, budget_for(prompt, r)), 2) for r in ("0.1", "0.5", "1")]
    assert sets[0] == sets[1] == sets[2]
    assert build("fastgen").domain.kind == "none"


def test_where_every_head_needs_everything_nothing_is_evicted_and_said_so() -> None:
    prompt = random_prompt(40)
    selection = select(build("fastgen:recovery=1"), context_of(prompt), whole(prompt))
    assert selection.flags == {"noop"}
    assert selection.notes["rules"] == {**dict.fromkeys(RULES, 0), "full": 6}


@pytest.mark.parametrize(
    "text, mark",
    [(".", True), (" ,", True), ("...", True), ("\u3002", True), ("\u00ab", True), ("$", True), ("</", True),
     ("a.", False), ("", False), (" ", False), ("\n", False), ("word", False), ("3", False), ("\u00b0", False)],
)  # fmt: skip
def test_what_punctuation_is(text: str, mark: bool) -> None:
    assert _is_punctuation(text) is mark


def test_without_texts_there_is_no_punctuation() -> None:
    prompt = random_prompt(30)
    context = dataclasses.replace(context_of(prompt), token_text=None, _made={})
    kept = lists(build("fastgen:recovery=0").select(context, whole(prompt)), 2)
    assert kept == [[[0, 29]] * 2] * 3
    assert context.once("special and punctuation", lambda: None)[1].sum() == 0


def test_bands_of_a_real_prompt_equal_eager_attention() -> None:
    """The pass behind 'bands', any width, once each; a width captured in the prefill needs no pass."""
    model, prompt = tiny.tiny_llama(), tiny.prompt(70, 2)
    done = model.prefill([prompt.ids], Needs.of({"band_sum:9"}), [0])
    dense = done.dense(0)
    extra = passes(model, dense, prompt.ids, prompt.regions, 4)
    runs: list[int] = []
    own = extra["bands"]()
    context = Context(
        n=70, heads=4, kv_heads=2, token_ids=prompt.ids, regions=prompt.regions, keys=dense.keys, values=dense.values,
        column_sums=dense.column_sums, window_queries=[], scaling=done.capture.scaling, sample_id="s", seed=0,
        passes={"bands": lambda: lambda width: runs.append(width) or own(width)},
    )  # fmt: skip
    for layer, attention in enumerate(eager_attentions(model, prompt.ids)):
        for width in (1, 9, 21):
            torch.testing.assert_close(
                context.band_sum(layer, width), within_band(attention, width), atol=1e-6, rtol=1e-5
            )
    assert runs == [1, 21]


# While generating; whole answers are compared in tests/engine/test_generating_own.py.


def test_generation_begins_with_column_sums_and_with_what_tokens_are() -> None:
    prompt = random_prompt(30, kv_heads=2, group=2)
    method, context = build("fastgen"), context_of(prompt)
    special = {p for kind, start, end, _ in prompt.layout if kind == "special" for p in range(start, end)}
    kinds = [(p in special) + 2 * (p in punctuation(prompt)) for p in range(30)]
    assert {0, 2, 3} <= set(kinds)
    for layer in range(prompt.layers):
        state = method.decode_start(context, layer)
        assert state["kind"].tolist() == [kinds, kinds]
        for head in range(2):
            sums = [sum(float(prompt.attention[layer][h, :, p].sum()) for h in (2 * head, 2 * head + 1)) / 2
                    for p in range(30)]  # fmt: skip
            assert state["received"][head].tolist() == pytest.approx(sums, abs=1e-12)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.3, 0.35, 0.5, 0.123, 1.0])
def test_shares_of_many_lengths_round_half_up(part: float) -> None:
    lengths = list(range(60))
    assert _shares(part, torch.tensor(lengths)).tolist() == [_share(part, n) for n in lengths]


@pytest.mark.parametrize("few", [0, 3, 100])
def test_the_smallest_are_found_one_by_one_and_by_sorting(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many equal sums: the newest of them leaves first, whatever its slot."""
    monkeypatch.setattr(module, "_FEW", few)
    draw = np.random.default_rng(few)
    received = torch.tensor(draw.integers(0, 4, (3, 2, 25)).astype(float))
    position = torch.tensor(np.stack([draw.permutation(25) for _ in range(6)]).reshape(3, 2, 25))
    among = torch.tensor(draw.random((3, 2, 25)) < 0.6)
    count = torch.tensor(draw.integers(-2, 6, (3, 2, 1)))
    got = _least(received, position, among, count)
    for r in range(3):
        for g in range(2):
            slots = [s for s in range(25) if among[r, g, s]]
            slots.sort(key=lambda s: (float(received[r, g, s]), -int(position[r, g, s])))
            assert got[r, g].nonzero()[:, 0].tolist() == sorted(slots[: max(0, int(count[r, g]))])


def test_a_sweep_makes_one_cell_of_it() -> None:
    """Through the runner, behind nothing but the knob; heads differ in length, two prompts do not mix."""
    model, prompts = tiny.tiny_llama(), tiny.prompt_set([60, 45])
    config = SweepConfig(methods=("fastgen:recovery=0.6",), ratios=("0.2", "0.5"))

    def records(rows: int) -> list[Any]:
        sink, _ = tiny.run(model, config, prompts, prefill_rows=rows)
        found = [r for r in sink.records if r["method"].startswith("fastgen")]
        assert [r["status"] for r in found] == ["ok", "ok"]
        return sorted((r["sample_id"], r["kept"], str(r["notes"]), r["output_ids"]) for r in found)

    assert records(4) == records(1)
    assert Region("special", 0, 1) in prompts.prompts[0].regions
