"""R-KV: the prompt's choice, the rank while generating and whole answers, each against plain loops."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.config import SweepConfig
from kvcli.methods import rkv as module
from kvcli.methods.catalog import build
from kvcli.methods.context import Context
from kvcli.methods.generating import Generating
from kvcli.methods.rkv import redundancy
from kvcli.models.wrapper import Model
from tests.engine import tiny
from tests.engine.asks import watch_pools
from tests.engine.test_generating import AXES, _after, masked, prompts_of
from tests.oracles import generating
from tests.oracles.generating import Heads, best
from tests.oracles.harness import budget_for, context_for, lists
from tests.oracles.prompts import Prompt, budget, tied_prompt
from tests.oracles.rkv import RKV, redundancies, rkv

RATIOS = ["0.02", "0.1", "0.25", "0.5", "0.9", "1"]
TEXTS = ["rkv", "rkv:window=3,kernel=3", "rkv:mix=0.7,reduce=mean", "rkv:threshold=0.1,window=4", "rkv:mix=0,kernel=1",
         "rkv:mix=1", "rkv:threshold=0"]  # fmt: skip


def settings_of(text: str) -> dict[str, Any]:
    pairs = (pair.split("=") for pair in text.partition(":")[2].split(",") if pair)
    return {k: int(v) if k in ("window", "kernel") else v for k, v in pairs}


# The prompt.


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("n, group", [(1, 1), (5, 2), (30, 2), (60, 4)])
@pytest.mark.parametrize("text", TEXTS)
def test_the_prompt_s_pairs_are_the_rule_s(
    prompt_of: Callable[..., Prompt], text: str, n: int, group: int, ratio: str
) -> None:
    prompt = prompt_of(n, group)
    method, size = build(text), budget_for(prompt, ratio)
    selection = method.select(context_for(method, prompt), size)
    wanted = rkv(prompt, budget(ratio, n), **settings_of(text))
    for heads, picks in zip(lists(selection, 2), wanted.picks, strict=True):
        for actual, pick in zip(heads, picks, strict=True):
            assert not pick.objection(actual), f"{text} at {ratio}: {pick.objection(actual)}"
            assert len(actual) == size.per_head
    assert set(selection.flags) == (set() if size.everything else wanted.flags)


def test_of_equal_pairs_the_first_stay() -> None:
    """All keys zero: no attention prefers any, none is similar to another."""
    prompt, method = tied_prompt(24), build("rkv:window=4")
    kept = lists(method.select(context_for(method, prompt), budget_for(prompt, "0.5")), 2)
    assert kept == [[[*range(8), *range(20, 24)]] * 2] * 2


@pytest.mark.parametrize("per_block", [1, 1000, 10**9])
def test_redundancies_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch, per_block: int) -> None:
    """Slots in any order, some of them empty and full of what is no number."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", per_block)
    rng = random.Random(3)
    torch.manual_seed(1)
    keys = torch.randn(2, 3, 20, 4, dtype=torch.float64)
    position = torch.stack([torch.tensor(rng.sample([*range(17), -1, -1, -1], 20)) for _ in range(6)]).view(2, 3, 20)
    keys[position < 0] = float("nan")
    got = redundancy(keys, position, 0.5)
    for r in range(2):
        for g in range(3):
            held = {p: keys[r, g, s].tolist() for s, p in enumerate(position[r, g].tolist()) if p >= 0}
            wanted = redundancies(held, 0.5)
            for slot, p in enumerate(position[r, g].tolist()):
                assert float(got[r, g, slot]) == pytest.approx(wanted[p] if p >= 0 else 0.0, rel=1e-9)


def test_of_near_duplicates_the_newest_is_spared() -> None:
    """By hand: two equal keys, and one that is unlike both."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    old, new, other = redundancy(keys, torch.tensor([0, 1, 2]), 0.5).tolist()
    assert old == pytest.approx(other) == pytest.approx(new), "of only two, each spares the other"
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    first, second, third, other = redundancy(keys, torch.arange(4), 0.5).tolist()
    assert first > second > third == pytest.approx(other)
    turned = redundancy(keys, torch.tensor([2, 1, 0, 3]), 0.5).tolist()
    assert turned[:3] == pytest.approx([third, second, first])


def test_a_sweep_compares_the_keys_once(monkeypatch: pytest.MonkeyPatch, prompt_of: Callable[..., Prompt]) -> None:
    asked: list[int] = []
    original = module.redundancy
    monkeypatch.setattr(module, "redundancy", lambda *args: asked.append(1) or original(*args))
    method, prompt = build("rkv"), prompt_of(60)
    ctx = context_for(method, prompt)
    for ratio in RATIOS:
        method.select(ctx, budget_for(prompt, ratio))
    assert len(asked) == prompt.layers


# The rank while generating.


def view_of(
    text: str, rng: random.Random, *, lengths: list[int], cap: int, group: int, tied: bool
) -> tuple[Generating, list[RKV]]:
    """Rows whose pool begins with the prompt's kept pairs in shuffled slots, and 12 queries later; the rules saw the
    same attention. A slot that a query did not see holds 0."""
    method, kv_heads, slots, dim = build(text), 2, 40, 3
    window, heads = method.window, kv_heads * group  # type: ignore[attr-defined]
    position = torch.full((len(lengths), kv_heads, slots), -1)
    ring = torch.zeros(len(lengths), heads, slots, window, dtype=torch.float64)
    keys = torch.full((len(lengths), kv_heads, slots, dim), float("nan"), dtype=torch.float64)
    rules = []
    for r, newest in enumerate(lengths):
        rule = RKV(heads, kv_heads, **settings_of(text))
        held = [sorted({*rng.sample(range(newest + 1), min(newest + 1, 24)), *range(max(0, newest - 9), newest + 1)})
                for _ in range(kv_heads)]  # fmt: skip
        rule.rows[0] = []
        table = torch.zeros(kv_heads, newest + 1, dim, dtype=torch.float64)
        table[:] = torch.tensor([[[rng.choice([0.0, 1.0]) if tied else rng.gauss(0, 1) for _ in range(dim)]
                                  for _ in range(newest + 1)] for _ in range(kv_heads)])  # fmt: skip
        place = []
        for g in range(kv_heads):
            place.append(dict(zip(held[g], rng.sample(range(slots), len(held[g])), strict=True)))
            for p, slot in place[g].items():
                position[r, g, slot], keys[r, g, slot] = p, table[g, p]
        for query in range(newest + 1):
            row = [
                {
                    p: rng.choice([0.125, 0.25, 0.5]) if tied else rng.random() ** 4
                    for p in held[h // group]
                    if p <= query
                }
                for h in range(heads)
            ]
            rule.rows[0].append(row)
            for h, weights in enumerate(row):
                ring[r, h, :, query % window] = 0
                for p, weight in weights.items():
                    ring[r, h, place[h // group][p], query % window] = weight
        rule.keys = {0: table}  # type: ignore[misc]
        rules.append(rule)
    whole = [torch.tensor([[[x]] for x in xs]) for xs in ([4] * len(lengths), lengths, [cap] * len(lengths))]
    view = Generating(
        layer=0, heads=heads, position=position, competing=position >= 0, attention=None, n=whole[0], newest=whole[1],
        cap=whole[2], counts=torch.ones(len(lengths), 1, 1, dtype=torch.bool), state={"recent": ring},
        keys=keys,
    )  # fmt: skip
    return view, rules


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("cap", [1, 3, 9, 17])
@pytest.mark.parametrize("text", TEXTS)
def test_pairs_leave_as_the_rule_says(text: str, cap: int, group: int, tied: bool) -> None:
    """Also in rows of other lengths beside it. Near ties of scores that are not exact may go either way."""
    rng = random.Random(f"{text} {cap} {group} {tied}")
    view, rules = view_of(text, rng, lengths=[20, 31, 25], cap=cap, group=group, tied=tied)
    rank = build(text).decode_rank(view)
    assert rank.shape == view.position.shape
    for r, rule in enumerate(rules):
        held = [sorted(p for p in head if p >= 0) for head in view.position[r].tolist()]
        wanted = rule.keep(0, [], held, cap)
        for g, positions in enumerate(held):
            scores = {p: round(float(rank[r, g, s]), 12) for s, p in enumerate(view.position[r, g].tolist()) if p >= 0}
            kept = sorted(best(positions, scores.__getitem__, cap))
            if not tied:
                assert kept == wanted[g]
            recent = [p for p in positions if scores[p] == float("inf")]
            assert recent == [p for p in positions if p > int(view.newest[r]) - max(1, min(rule.window, cap // 2))]
            marks = _marks(rule, g, positions, cap)
            for p, mark in marks.items():
                assert scores[p] == pytest.approx(mark, rel=1e-9, abs=1e-12)


def _marks(rule: RKV, g: int, positions: list[int], cap: int) -> dict[int, float]:
    """The oracle's scores of the pairs before the window."""
    from tests.oracles.rkv import importances

    newest, w = len(rule.rows[0]) - 1, max(1, min(rule.window, cap // 2))
    before = [p for p in positions if p <= newest - w]
    again = redundancies({p: rule.keys[0][g, p].tolist() for p in positions}, float(rule.threshold))
    wanted = importances(rule.rows[0][-w:], before, rule.group(g), rule.kernel, rule.reduce)
    return {p: float(rule.mix) * wanted[p] - (1 - float(rule.mix)) * again[p] for p in before}


def test_the_query_fed_again_is_not_taken_twice() -> None:
    method = build("rkv:window=2")
    ring = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
    for counts, wanted in ((False, [[0.1, 0.2], [0.3, 0.4]]), (True, [[0.1, 0.9], [0.3, 0.05]])):
        view = Generating(
            layer=0, heads=1, position=torch.tensor([[[3, 4]]]), competing=torch.ones(1, 1, 2, dtype=torch.bool),
            attention=torch.tensor([[[0.9, 0.05]]]), n=torch.tensor([[[5]]]), newest=torch.tensor([[[5]]]),
            cap=torch.tensor([[[2]]]), counts=torch.tensor([[[counts]]]), state={"recent": ring.clone()},
        )  # fmt: skip
        method.decode_update(view)
        assert view.state["recent"][0, 0].tolist() == [pytest.approx(x) for x in wanted]


def test_the_prompt_s_last_queries_begin_the_ring(prompt_of: Callable[..., Prompt]) -> None:
    """Rotated at their own positions: as in the prompt's attention, query i at place i mod window."""
    for n in (3, 30):
        prompt, method = prompt_of(n), build("rkv:window=8")
        ctx = context_for(method, prompt)
        ring = method.decode_start(ctx, 1)["recent"]
        assert ring.shape == (4, n, 8) and ring.dtype == torch.float64
        for query in range(max(0, n - 8), n):
            wanted = torch.tensor(prompt.attention[1][:, query])
            torch.testing.assert_close(ring[:, :, query % 8], wanted, atol=1e-6, rtol=1e-5)
        assert method.decode_start(ctx, 1)["recent"] is ring


# Whole answers, beside a full cache under masks.


@contextmanager
def _keys_for_the_rule(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The masked model shows the rule its keys."""
    original = generating._masking

    @contextmanager
    def watched(hf: Any) -> Iterator[Any]:
        with original(hf) as masking:
            RKV.keys = masking.keys
            yield masking

    with monkeypatch.context() as patch:
        patch.setattr(generating, "_masking", watched)
        patch.setitem(generating.RULES, "rkv", RKV)
        patch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset())
        patch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
        yield
    RKV.keys = None


@pytest.fixture
def rule_sees_keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with _keys_for_the_rule(monkeypatch):
        yield


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[list[Heads]]:
    return watch_pools(monkeypatch)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("method, ratio", [("rkv", "0.4"), ("rkv:window=3,kernel=3,mix=0.6,reduce=mean", "1")])
def test_every_step_holds_what_the_rule_leaves(
    rule_sees_keys: None, held: list[list[Heads]], method: str, ratio: str, axis: str, first_token: str, kv_heads: int
) -> None:
    model, prompts = tiny.tiny_llama(torch.float64, kv_heads=kv_heads), prompts_of([37])
    config = SweepConfig(methods=(method,), ratios=(ratio,), first_token=(first_token,), full=False, **AXES[axis])
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0
    (record,), (cell,) = sink.records, tiny.plan_of(config, prompts).cells.values()
    run = masked(model, prompts.prompts[0].ids, cell, sink.maps[cell.id, "s0"], len(record["output_ids"]))
    assert record["output_ids"] == run.tokens
    assert held == _after(run)


def test_a_pool_of_fixed_size_holds_what_the_rule_leaves(rule_sees_keys: None, held: list[list[Heads]]) -> None:
    """The authors' way: a budget, and compression at an interval; the prompt is shorter than the budget."""
    model, prompts = tiny.tiny_llama(torch.float64), prompts_of([21])
    config = SweepConfig(methods=("rkv:window=4",), budgets=(30,), cap="fixed", decode_interval=5, full=False)
    sink, _ = tiny.run(model, config, prompts)
    (cell,) = tiny.plan_of(config, prompts).cells.values()
    tokens = sink.records[0]["output_ids"]
    run = masked(model, prompts.prompts[0].ids, cell, sink.maps[cell.id, "s0"], len(tokens))
    assert tokens == run.tokens and held == _after(run)


def test_rows_of_many_prompts_generate_what_the_masked_model_does(rule_sees_keys: None) -> None:
    model, prompts = tiny.tiny_llama(torch.float64), prompts_of([37, 50, 21])
    config = SweepConfig(
        methods=("rkv:window=4",), ratios=("0.3", "1"), decode_ratios=("0.5",), first_token=("compressed", "prefill"),
        full=False,
    )  # fmt: skip
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0 and len(sink.records) == 12
    cells = tiny.plan_of(config, prompts).cells
    for (cell_id, sample), record in sink.by_key().items():
        ids = prompts.prompts[int(sample[1:])].ids
        run = masked(model, ids, cells[cell_id], sink.maps[cell_id, sample], len(record["output_ids"]))
        assert record["output_ids"] == run.tokens
        pairs = sum(len(head) for layer in run.after for head in layer)
        assert record["kv_bytes"]["end"] == pairs * 2 * (64 // 4) * 2
    other, _ = tiny.run(model, config, prompts, prefill_rows=1, decode_rows=2)
    assert {k: tiny.same(r) for k, r in other.by_key().items()} == {k: tiny.same(r) for k, r in sink.by_key().items()}


def test_a_float32_model_ranks_in_float32(prompt_of: Callable[..., Prompt]) -> None:
    prompt, method = prompt_of(30), build("rkv")
    ctx = context_for(method, prompt, dtype=torch.float32)
    half = dataclasses.replace(ctx, keys=[k.bfloat16() for k in ctx.keys])
    assert method.decode_start(half, 0)["recent"].dtype == torch.float32
    assert redundancy(half.keys[0], torch.arange(30).expand(2, -1), 0.5).dtype == torch.float32
    assert isinstance(half, Context) and isinstance(tiny.tiny_llama(), Model)
