"""Equality 2 while generating, where heads or layers have rules of their own: `fastgen` and `pyramidinfer`.

float64; tests/oracles/generating_own.py runs the model with the full cache under masks made in plain Python.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvcli.cache.budget import Budget
from kvcli.cache.workspace import Workspace
from kvcli.config import SweepConfig
from kvcli.engine import own_prefills
from kvcli.engine.cells import Cell
from kvcli.engine.pool import PoolCache
from kvcli.engine.pool_rows import Cap, PoolRow
from kvcli.methods import fastgen
from kvcli.methods.catalog import build
from kvcli.methods.pyramidinfer import Pyramid
from kvcli.models import pruned_prefill as passes
from kvcli.models.wrapper import PROBE, Model
from tests.engine import asks, tiny
from tests.oracles.generating import Heads, cap
from tests.oracles.generating_own import FastGen, Masked, PyramidInfer, masked

NEW = 24
PAIR = 2 * (64 // 4) * 2
"""Bytes of one pair of one KV head."""


def is_mark(text: str) -> bool:
    """What is taken for punctuation here: the tests' vocabulary has next to none."""
    return text.strip()[:1] in set("abcdehlrs")


@pytest.fixture(autouse=True)
def _long_answers_with_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset())
    monkeypatch.setattr(fastgen, "_is_punctuation", is_mark)


@pytest.fixture(scope="module")
def exact() -> Iterator[Callable[[int], Model]]:
    """exact(kv_heads): a float64 model of four layers."""
    made: dict[int, Model] = {}
    with asks.exact_model(layers=4):
        yield lambda kv_heads: made.setdefault(kv_heads, tiny.tiny_llama(torch.float64, layers=4, kv_heads=kv_heads))


def prompts_of(lengths: list[int]) -> tiny.PromptSet:
    return asks.of_length(tiny.prompt_set(lengths), NEW)


def oracle(model: Model, prompt: Any, cell: Cell, kept: list[Heads], record: dict[str, Any]) -> Masked:
    """What the masked model does with an answer's tokens; that it would give them itself is checked."""
    ids, answer, n = prompt.ids, record["output_ids"], len(prompt.ids)
    kept = [layer * model.shapes.kv_heads[0] if len(layer) == 1 else layer for layer in kept]
    again = cell.first_token == "compressed"
    fed, first = ([ids[-1], *answer[:-1]], n - 1) if again else (answer[:-1], n)
    settings = dict(pair.split("=") for pair in cell.method.partition(":")[2].split(",") if pair)
    pruned = cell.method.startswith("pyramidinfer")
    rule: Any
    if pruned:
        limit = limit_of(cell, n, [len(layer[0]) for layer in kept])
        weight, sinks = float(settings.get("weight", 1.2)), int(settings.get("sinks", 4))
        rule = PyramidInfer(n, record["notes"]["recent"], limit, sinks, weight)
    else:
        special = {p for r in prompt.regions if r.kind == "special" for p in range(r.start, r.end)}
        marks = {i for i in range(n) if is_mark(prompt.token_text(i))}
        text = {place: model.tokenizer.decode([token]) for place, token in enumerate(fed, first)}
        rule = FastGen(special, marks, n, float(settings.pop("recovery")), **settings, is_mark=is_mark, text=text)  # type: ignore[arg-type]
    assert cell.decode is not None
    run = masked(model.hf, ids, kept, rule, fed, first, cell.decode["interval"], pruned)
    assert [int(x.argmax()) for x in run.logits] == (answer if again else answer[1:]), cell.method
    return run


def limit_of(cell: Cell, n: int, sizes: list[int]) -> Callable[[int, int], int]:
    """A layer's own size, and what the cap has grown by."""
    assert cell.decode is not None
    start: dict[str, Any] = {"ratio": cell.ratio} if cell.ratio is not None else {"budget": cell.budget}
    grow = {"decode_ratio": cell.decode.get("ratio"), "decode_budget": cell.decode.get("budget")}
    fixed = cell.decode.get("cap") == "fixed"
    return lambda layer, t: (
        sizes[layer] + cap(t, n, False, fixed=fixed, **start, **grow) - cap(0, n, False, fixed=True, **start)
    )


FASTGEN = [
    "fastgen:recovery=0.05", "fastgen:recovery=0.4", "fastgen:recovery=0.85",
    "fastgen:recovery=0.85,local=0.25,frequent=0.1",
]  # fmt: skip
PYRAMID = ["pyramidinfer:context=4", "pyramidinfer:context=2,recent=0.05,sinks=0", "pyramidinfer:context=4,weight=3"]
OWN: dict[str, dict[str, Any]] = {
    "every token": {"decode_ratios": ("same",)}, "every third": {"cap": "fixed", "decode_interval": 3},
}  # fmt: skip
UNIFIED: dict[str, dict[str, Any]] = {
    "a ratio": {"decode_ratios": ("same",)}, "a size, every third": {"decode_budgets": (5,), "decode_interval": 3},
    "fixed": {"cap": "fixed"}, "fixed, every fourth": {"cap": "fixed", "decode_interval": 4},
}  # fmt: skip


def one_row(
    model: Model, config: SweepConfig, monkeypatch: pytest.MonkeyPatch, n: int
) -> tuple[Masked, list[list[Heads]], dict[str, Any]]:
    """The masked run of a config's only cell and prompt, what its pool held after every step, and its record."""
    prompts, held = prompts_of([n]), asks.watch_pools(monkeypatch)
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0, outcome.messages
    (record,) = sink.records
    (cell,) = tiny.plan_of(config, prompts).cells.values()
    return oracle(model, prompts.prompts[0], cell, sink.maps[cell.id, "s0"], record), held, record


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
@pytest.mark.parametrize("axis", OWN)
@pytest.mark.parametrize("method", FASTGEN)
def test_each_head_holds_what_its_rule_leaves(
    exact: Callable[[int], Model], monkeypatch: pytest.MonkeyPatch, method: str, axis: str, first_token: str,
    kv_heads: int,
) -> None:  # fmt: skip
    config = SweepConfig(methods=(method,), first_token=(first_token,), full=False, **OWN[axis])
    run, held, record = one_row(exact(kv_heads), config, monkeypatch, 41)
    assert held == run.after
    pairs = [len(head) for layer in run.after[-1] for head in layer]
    assert record["kv_bytes"]["end"] == sum(pairs) * PAIR
    assert sum(pairs) < len(pairs) * (41 + NEW - 2)


@pytest.mark.parametrize("method", [FASTGEN[2], PYRAMID[0]])
def test_bytes_are_those_of_the_pairs_that_are_stored(
    exact: Callable[[int], Model], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The slots in use at the end hold the masked model's own pairs, and their 16-bit bytes are the record's."""
    slots: list[tuple[Any, ...]] = []
    payload = PoolCache.payload

    def watched(self: PoolCache, row: int) -> int:
        for layer in self.layers:
            held = layer.slots.position[row].clone()
            slots.append(
                (held, layer._keys[row, :, : held.shape[1]].clone(), layer._values[row, :, : held.shape[1]].clone())
            )
        return payload(self, row)

    monkeypatch.setattr(PoolCache, "payload", watched)
    config = SweepConfig(methods=(method,), ratios=("0.6",), decode_ratios=("same",), full=False)
    run, _, record = one_row(exact(2), config, monkeypatch, 41)
    stored = 0
    for layer, (held, keys, values) in enumerate(slots):
        for g, positions in enumerate(held):
            mine = positions >= 0
            assert sorted(positions[mine].tolist()) == run.after[-1][layer][g]
            for got, truth in ((keys[g, mine], run.keys[layer]), (values[g, mine], run.values[layer])):
                torch.testing.assert_close(got, truth[g, positions[mine]], atol=1e-10, rtol=0)
                stored += got.numel() * 2
    assert record["kv_bytes"]["end"] == stored


def test_these_settings_reach_every_rule(exact: Callable[[int], Model]) -> None:
    found, _ = tiny.run(exact(2), SweepConfig(methods=tuple(FASTGEN), full=False), prompts_of([41]))
    assert all(any(r["notes"]["rules"][rule] for r in found.records) for rule in fastgen.RULES)


@pytest.mark.parametrize("kv_heads, n", [(1, 53), (2, 38)])
@pytest.mark.parametrize("axis", UNIFIED)
@pytest.mark.parametrize("method", PYRAMID)
def test_each_layer_holds_what_the_newest_attend_to(
    exact: Callable[[int], Model], monkeypatch: pytest.MonkeyPatch, method: str, axis: str, kv_heads: int, n: int
) -> None:
    config = SweepConfig(methods=(method,), ratios=("0.6",), full=False, **UNIFIED[axis])
    run, held, record = one_row(exact(kv_heads), config, monkeypatch, n)
    assert held == run.after
    sizes = [len(layer[0]) for layer in run.after[-1]]
    assert record["kv_bytes"]["end"] == sum(sizes) * kv_heads * PAIR
    assert sizes[0] > sizes[-1]
    assert record["flags"] == []


def test_rows_of_many_prompts_generate_what_the_masked_model_does(exact: Callable[[int], Model]) -> None:
    """Batches of prompts, ratios and ages; alone and together they give the same."""
    model, prompts = exact(2), prompts_of([37, 50, 21])
    config = SweepConfig(
        methods=("fastgen:recovery=0.6", "pyramidinfer:context=4"), ratios=("0.3", "0.7"),
        decode_ratios=("off", "same"), first_token=("compressed", "prefill"), full=False,
    )  # fmt: skip
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0, outcome.messages
    cells, records = tiny.plan_of(config, prompts).cells, sink.by_key()
    assert len(records) == 3 * (2 * 2 + 2 * 2)
    plain = {
        (c.method, c.ratio, c.first_token, sample): r["output_ids"]
        for (cell_id, sample), r in records.items() if (c := cells[cell_id]).decode is None
    }  # fmt: skip
    changed = 0
    for (cell_id, sample), record in records.items():
        cell = cells[cell_id]
        if cell.decode is None:
            continue
        run = oracle(model, prompts.prompts[int(sample[1:])], cell, sink.maps[cell_id, sample], record)
        assert record["kv_bytes"]["end"] == sum(len(head) for layer in run.after[-1] for head in layer) * PAIR
        changed += record["output_ids"] != plain[cell.method, cell.ratio, cell.first_token, sample]
    assert changed > 6  # eviction while generating is felt
    for prefill_rows, decode_rows in ((1, 1), (3, 2)):
        other, _ = tiny.run(model, config, prompts, prefill_rows=prefill_rows, decode_rows=decode_rows)
        assert {k: tiny.same(r) for k, r in other.by_key().items()} == {k: tiny.same(r) for k, r in records.items()}


def test_nothing_leaves_when_everything_is_kept(exact: Callable[[int], Model]) -> None:
    model, prompts = exact(2), prompts_of([40, 21])
    config = SweepConfig(
        methods=("pyramidinfer", "fastgen:recovery=1"), ratios=("1",), decode_ratios=("same",), first_token=("prefill",)
    )
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0, outcome.messages
    for sample, n in (("s0", 40), ("s1", 21)):
        rows = [r for r in sink.records if r["sample_id"] == sample]
        assert len(rows) == 3
        assert {tuple(r["output_ids"]) for r in rows} == {tuple(rows[0]["output_ids"])}
        assert {r["kv_bytes"]["end"] for r in rows} == {(n + NEW - 1) * 4 * 2 * PAIR}


def test_a_setting_of_the_decode_axis_needs_no_prefill_of_its_own(
    exact: Callable[[int], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a ratio share one prefill, and the figures that generation begins with count as what waits."""
    config = SweepConfig(
        methods=("pyramidinfer:context=4",), ratios=("0.5", "0.7"), decode_ratios=("off", "same", "0.1")
    )
    run, ran = passes._run, []

    def counted(model: Model, ids: Sequence[int], asked: Sequence[Any]) -> Any:
        ran.extend([[one.decode for one in asked]] if list(ids) != list(PROBE) else [])
        return run(model, ids, asked)

    monkeypatch.setattr(passes, "_run", counted)
    found, outcome = tiny.run(exact(2), config, prompts_of([50]))
    assert outcome.errors == 0, outcome.messages
    assert sorted(ran) == [[False, False], [True, True]]
    pairs = 50 * 4 * 2 * 32 * 8
    monkeypatch.setattr(own_prefills, "MOST_BYTES", 2 * (pairs + 50 * 4 * 11 * 8) - 1)
    ran.clear()
    short, _ = tiny.run(exact(2), config, prompts_of([50]))
    assert sorted(ran)[0] == [False, False]
    assert len(ran) > 2
    assert {k: tiny.same(r) for k, r in short.by_key().items()} == {k: tiny.same(r) for k, r in found.by_key().items()}


# Ties, ages and batches that are formed anew: the engine's own pools on attention of few exact values.


@dataclass
class Played:
    """A row in play. visible: what the rule has left, per KV head of the only layer."""

    row: PoolRow
    rule: Any
    visible: Heads
    newest: int
    interval: int


HEADS, KV_HEADS, ROOM = 4, 2, 40


def exact_weight(rng: random.Random) -> float:
    return rng.choice([0.0, 0.03125, 0.0625, 0.25])


def fastgen_row(n: int, rng: random.Random, rules: list[int], interval: int) -> Played:
    """A prompt kept whole, whose column sums are small whole numbers."""
    method, kinds = build("fastgen"), [rng.choice([0, 0, 0, 1, 2, 3]) for _ in range(n)]
    sums = [[float(rng.randrange(3)) for _ in range(n)] for _ in range(KV_HEADS)]
    special, marks = ({p for p, kind in enumerate(kinds) if kind & bit} for bit in (1, 2))
    rule = FastGen(special, marks, n, 0.95, is_mark=is_mark, rules=[rules], sums=[[dict(enumerate(x)) for x in sums]])
    kind = torch.tensor(kinds, dtype=torch.uint8).expand(KV_HEADS, -1)
    state = {"received": torch.tensor(sums, dtype=torch.float64), "kind": kind}
    cap = Cap.of({"rule": "own"}, Budget.of_size(n, n, 1, KV_HEADS, False), method)
    facts = [{"rule": torch.tensor(rules)}]
    return Played(pool_row(n, range(n), cap, state, facts, interval), rule, [[*range(n)]] * KV_HEADS, n - 1, interval)


def pyramid_row(n: int, rng: random.Random, kept: list[int], recent: int, grows: str, interval: int) -> Played:
    """A layer that caches `kept` of a prompt's n tokens, more or fewer than its budget."""
    method = build("pyramidinfer:weight=2")
    budget = Budget.of_size(n // 2, n, 1, KV_HEADS, False)
    cap_of = Cap.of({"ratio": grows}, budget, method)

    def limit(layer: int, t: int) -> int:
        return len(kept) + cap(t, n, False, budget=n // 2, decode_ratio=grows) - n // 2

    rule = PyramidInfer(n, recent, limit, weight=2.0, rows=[[{} for _ in range(n - recent)]])
    votes = [[exact_weight(rng) if p <= q else 0.0 for p in kept] for q in range(n - recent, n)]
    rule.rows[0] += [dict(zip(kept, row, strict=True)) for row in votes]
    plan = Pyramid([], recent, torch.ones(recent))
    given = torch.tensor(votes, dtype=torch.float64)
    state = method.prefill_state(0, given, torch.tensor(kept), plan)  # type: ignore[attr-defined]
    facts = [{"recent": torch.full((KV_HEADS,), recent)}]
    row = pool_row(n, kept, cap_of, state, facts, interval, beyond=len(kept) - n // 2)
    return Played(row, rule, [list(kept)] * KV_HEADS, n - 1, interval)


def pool_row(
    n: int, kept: Sequence[int], cap: Cap, state: Any, facts: Any, interval: int, beyond: int | None = None
) -> PoolRow:
    pairs, whole = [torch.zeros(KV_HEADS, len(kept), 2)], [torch.arange(len(kept))]
    more = [] if beyond is None else [torch.full((KV_HEADS,), beyond)]
    true = [torch.tensor(list(kept))]
    return PoolRow(pairs, pairs, whole, None, n, cap, [state], interval, true, facts, more, whole)


def step(cache: PoolCache, rows: list[Played], rng: random.Random) -> None:
    """One token for every row, and what the pool holds then beside what the rule leaves."""
    texts = [rng.choice(["a", "x", "x"]) for _ in rows]
    for played, text in zip(rows, texts, strict=True):
        played.newest += 1
        played.visible = [[*head, played.newest] for head in played.visible]
        if isinstance(played.rule, FastGen):
            played.rule.text[played.newest] = text
    cache.newest_texts = lambda: texts
    cache.begin(torch.tensor([[played.newest] for played in rows]))
    fresh = torch.zeros(len(rows), KV_HEADS, 1, 2)
    cache.layers[0].update(fresh, fresh)
    pool = cache.layers[0].slots
    attention = torch.zeros(len(rows), HEADS, pool.used(1), dtype=torch.float64)
    for r, played in enumerate(rows):
        row = [{p: exact_weight(rng) for p in played.visible[h * KV_HEADS // HEADS]} for h in range(HEADS)]
        for h, slots in enumerate(pool.position[r, :, : pool.used(1)].repeat_interleave(HEADS // KV_HEADS, 0).tolist()):
            attention[r, h] = torch.tensor([row[h].get(p, 0.0) for p in slots])
        played.rule.see(0, played.newest, row)
        if (played.newest - played.row.n + 1) % played.interval == 0:
            played.visible = played.rule.keep(0, played.newest, played.visible)
    cache.settle(0, attention)
    cache.advance(1)
    for r, played in enumerate(rows):
        assert [sorted(p for p in head if p >= 0) for head in pool.position[r].tolist()] == played.visible


def play(method: str, first: list[Played], later: list[Played], seed: int) -> list[Played]:
    """Two batches, the second formed of the first without its first row, and of later ones."""
    rng, made = random.Random(seed), build(method)
    with torch.inference_mode():
        cache = PoolCache(made, HEADS, [p.row for p in first], [ROOM] * len(first), Workspace())
        for _ in range(13):
            step(cache, first, rng)
        cache.reform(list(range(1, len(first))), [p.row for p in later], [ROOM] * len(later))
        rows = first[1:] + later
        for _ in range(25):
            step(cache, rows, rng)
    return rows


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_of_equal_frequent_tokens_the_newest_leaves(seed: int, interval: int) -> None:
    rng = random.Random(seed)
    rules = [[0, 2], [1, 3], [2, 4], [3, 2], [2, 3]]
    made = [fastgen_row(n, rng, r, interval) for n, r in zip((20, 7, 33, 14, 26), rules, strict=True)]
    for played in play("fastgen", made[:3], made[3:], seed):
        for head, rule in zip(played.visible, played.rule.rules[0], strict=True):
            assert (len(head) == played.newest + 1) == (rule == 4)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_of_equal_older_pairs_the_newest_leaves(seed: int, interval: int) -> None:
    """Rows with 3, 5 and 9 voters share a batch."""
    rng = random.Random(seed)
    kinds = [(20, 5, "0.5"), (30, 3, "0"), (24, 9, "0.25"), (16, 3, "0.5"), (40, 9, "0")]
    made = []
    for n, recent, grows in kinds:
        kept = sorted({*rng.sample(range(n), n // 2), 0, 1, 2, 3, *range(n - recent, n)})
        made.append(pyramid_row(n, rng, kept, recent, grows, interval))
    first, later = ([made[0], made[1]], made[2:]) if seed else (made[:3], made[3:])
    for played in play("pyramidinfer:weight=2", first, later, seed):
        assert {*range(played.newest - played.rule.recent + 1, played.newest + 1)} <= {*played.visible[0]}
        assert {0, 1, 2} <= {*played.visible[0]}
