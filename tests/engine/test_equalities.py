"""The equalities of docs/architecture.md that a user's trust rests on."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.attention.capture import Needs
from kvcli.cache.budget import Budget
from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import Kept, Row, head_positions
from kvcli.config import SweepConfig
from kvcli.engine.generate import Ask, Start, StopRules, generate
from kvcli.engine.needs import GIVEN as GIVEN_NEED
from kvcli.engine.needs import captured
from kvcli.engine.prefilling import passes
from kvcli.engine.prefixes import question_start
from kvcli.engine.selecting import select
from kvcli.errors import KvcliError
from kvcli.methods import catalog
from kvcli.methods.context import Context
from kvcli.models.wrapper import Model, Prefilled
from tests.engine import asks, tiny

GIVEN = [n for n in catalog.names() if any(map(GIVEN_NEED.fullmatch, catalog.build(n).needs()))]
"""Methods that need something from outside of the run: tested by themselves."""
SHORT = {"lagkv": "lagkv:lag=16,sinks=4"}
"""Settings that suit prompts of fewer than 100 tokens."""
EVICTORS = [n for n in catalog.names() if n not in ("full", *GIVEN) and catalog.find(n).kind == "evict"]
SIZED = [SHORT.get(n, n) for n in EVICTORS if catalog.find(n).domain.kind == "continuous"]
OWN_SIZE = ["fastgen:recovery=0.5"]
"""A method whose own setting decides, set so that it evicts from the prompts of these tests."""
METHODS = [*SIZED, *OWN_SIZE]
TIER1 = SweepConfig(methods=tuple(METHODS), ratios=("0.2", "0.5"), first_token=("compressed", "prefill"))


@pytest.fixture
def exact() -> Iterator[Model]:
    """A float64 model whose norms stay in float64."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    yield tiny.tiny_llama(torch.float64)
    patch.undo()


def prefilled(model: Model, n: int, needs: set[str]) -> tuple[Prefilled, Context]:
    prompt = tiny.prompt(n, seed=n)
    done = model.prefill([prompt.ids], Needs.of(captured(needs)), [question_start(prompt.regions)])
    dense = done.dense(0)
    context = Context(
        n=n, heads=model.shapes.heads, kv_heads=model.shapes.kv_heads[0], token_ids=prompt.ids, regions=prompt.regions,
        keys=dense.keys, values=dense.values, column_sums=dense.column_sums, window_queries=dense.window_queries,
        scaling=done.capture.scaling, sample_id="s", seed=0,
        passes=passes(model, dense, prompt.ids, prompt.regions, 6), rope=model.rope, o_proj=model.o_proj,
        moments=dense.moments,
    )  # fmt: skip
    return done, context


def masked_logits(model: Model, ids: list[int], n: int, kept: Kept, first_masked: int) -> Tensor:
    """Logits of the unmodified model over the whole text, where rows from `first_masked` on do not see evicted keys.

    Written apart from kvcli's attention: transformers' own sdpa with one additive mask per layer and head.
    """
    hf, size = model.hf, len(ids)
    group = model.shapes.heads // model.shapes.kv_heads[0]
    hooks = []
    for number, layer in enumerate(hf.model.layers):
        visible = torch.ones(size, size, dtype=torch.bool).tril().repeat(model.shapes.heads, 1, 1)
        for head, positions in enumerate(head_positions(kept[number], model.shapes.kv_heads[number])):
            gone = torch.ones(n, dtype=torch.bool)
            gone[positions] = False
            gone[first_masked:] = False
            for h in range(head * group, (head + 1) * group):
                visible[h, first_masked:, :n] &= ~gone
        mask = torch.zeros(1, *visible.shape, dtype=hf.dtype).masked_fill(~visible[None], float("-inf"))

        def give(module: object, args: tuple, kwargs: dict, mask: Tensor = mask) -> tuple[tuple, dict]:  # type: ignore[type-arg]
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(give, with_kwargs=True))
    hf.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            return hf(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
@pytest.mark.parametrize("method", [*METHODS, "pyramidkv:window=2,beta=4", "shotkv:scope=all-layers,queries=question"])
def test_evicted_cache_decodes_like_the_full_cache_with_those_positions_masked(
    exact: Model, method: str, first_token: str
) -> None:
    """Equality 2, float64: step by step and all new tokens in one pass."""
    n, new = 90, 6
    built = catalog.build(method)
    done, context = prefilled(exact, n, set(built.needs()))
    budget = Budget.of_size(27, n, context.layers, context.kv_heads)
    kept = select(built, context, budget).kept
    assert sum(len(p) for layer in kept for p in head_positions(layer, 2)) < n * 2 * context.layers
    compressed = first_token == "compressed"
    in_cache = [[p[:-1] for p in head_positions(layer, 2)] for layer in kept] if compressed else kept
    begin = n - 1 if compressed else n
    row = Row(context.keys, context.values, in_cache)  # type: ignore[arg-type]
    given = None if compressed else int(done.logits[0].argmax())
    start = Start(context.token_ids[-1], begin, given)
    ((_, answer),) = generate(exact, [Ask(row, start, StopRules(new))])
    out = answer.ids
    fed = ([context.token_ids[-1]] if compressed else []) + out[:-1]
    cache = CompressedCache([row], len(fed))
    stepwise = [exact.step(torch.tensor([[t]]), torch.tensor([[begin + i]]), cache)[0, 0] for i, t in enumerate(fed)]
    positions = torch.arange(begin, begin + len(fed))[None]
    at_once = exact.step(torch.tensor([fed]), positions, CompressedCache([row], len(fed)))[0]
    truth = masked_logits(exact, context.token_ids[:begin] + fed, n, kept, begin)[begin:]
    assert torch.allclose(torch.stack(stepwise), truth, rtol=0, atol=1e-10)
    assert torch.allclose(at_once, truth, rtol=0, atol=1e-10)
    assert truth.argmax(-1).tolist() == out[-len(fed) :]


def test_per_head_and_per_layer_lengths_in_one_batch(exact: Model) -> None:
    """Equality 2 for ragged rows: every layer and KV head of every row keeps another number of pairs."""
    n, generator = 60, torch.Generator().manual_seed(3)
    _, context = prefilled(exact, n, set())

    def pick(size: int) -> Tensor:
        return torch.cat([torch.randperm(n - 1, generator=generator)[: size - 1].sort().values, torch.tensor([n - 1])])

    rows_kept: list[Kept] = [
        [[pick(5 + 7 * row + 3 * layer + 11 * h) for h in range(2)] for layer in range(3)] for row in range(3)
    ]
    rows_kept.append([torch.arange(n)] * 3)
    tokens = torch.tensor([5, 9, 17])
    rows = [Row(context.keys, context.values, kept) for kept in rows_kept]
    cache = CompressedCache(rows, len(tokens))
    for i, token in enumerate(tokens):
        logits = exact.step(token.expand(4, 1), torch.full((4, 1), n + i), cache)[:, 0]
        for row, kept in enumerate(rows_kept):
            truth = masked_logits(exact, context.token_ids + tokens[: i + 1].tolist(), n, kept, n)[-1]
            assert torch.allclose(logits[row], truth, rtol=0, atol=1e-10)


def test_wrong_positions_are_noticed(exact: Model) -> None:
    """The control of equality 2: continuing at the physical length gives other logits."""
    n = 60
    _, context = prefilled(exact, n, set())
    kept = [torch.arange(30, 60)] * 3
    row = Row(context.keys, context.values, kept)
    right = exact.step(torch.tensor([[5]]), torch.tensor([[n]]), CompressedCache([row], 1))
    wrong = exact.step(torch.tensor([[5]]), torch.tensor([[30]]), CompressedCache([row], 1))
    assert (right - wrong).abs().max() > 0.1


@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
def test_full_and_every_method_at_ratio_one_give_the_tokens_of_generate(first_token: str) -> None:
    """Equality 1, float32."""
    model = tiny.tiny_llama()
    prompts = tiny.prompt_set([50, 33, 61])
    config = SweepConfig(methods=tuple(SIZED), ratios=("1",), first_token=(first_token,))
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0
    model.hf.set_attn_implementation("sdpa")
    for record in sink.records:
        ids = prompts.prompts[int(record["sample_id"][1:])].ids
        plain = model.hf.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert record["output_ids"] == plain[0, len(ids) :].tolist(), record["method"]
        assert record["measured_ratio"] == 1.0
        assert record["flags"] == []
    assert len(sink.records) == 3 * (1 + len(SIZED))


def test_shared_sweep_equals_separate_runs_any_batch_size_any_order(exact: Model) -> None:
    """Equality 3, float64: same kept sets, same tokens, same records, whatever runs beside a row."""
    prompts = tiny.prompt_set([50, 21, 64, 37, 45])
    shared, _ = tiny.run(exact, TIER1, prompts)
    truth = {key: tiny.same(r) for key, r in shared.by_key().items()}
    assert len(truth) == 5 * 2 * (1 + 2 * len(SIZED) + len(OWN_SIZE))
    for prefill_rows, decode_rows in ((1, 1), (5, 7), (2, 1000)):
        other, _ = tiny.run(exact, TIER1, prompts, prefill_rows=prefill_rows, decode_rows=decode_rows)
        assert {key: tiny.same(r) for key, r in other.by_key().items()} == truth
        assert other.maps == shared.maps
    for method in METHODS:
        for ratio in TIER1.ratios if method in SIZED else TIER1.ratios[:1]:
            alone = SweepConfig(methods=(method,), ratios=(ratio,), first_token=TIER1.first_token)
            sink, _ = tiny.run(exact, alone, prompts)
            # the first batch of a run without `full` beside it would lack the divergence; full is always there
            assert all(tiny.same(r) == truth[key] for key, r in sink.by_key().items())
    order = list(range(5))
    random.Random(1).shuffle(order)
    turned = tiny.PromptSet(
        prompts.task, tiny.KEY, [prompts.samples[i] for i in order], [prompts.prompts[i] for i in order]
    )
    sink, _ = tiny.run(exact, TIER1, turned)
    assert {key: tiny.same(r) for key, r in sink.by_key().items()} == truth


def test_each_sample_gives_alone_what_it_gives_after_another(exact: Model) -> None:
    """No state is left over: the second of two samples equals a run that never saw the first."""
    both = tiny.prompt_set([40, 55])
    second = tiny.PromptSet(both.task, tiny.KEY, both.samples[1:], both.prompts[1:])
    together, _ = tiny.run(exact, TIER1, both, prefill_rows=1)
    alone, _ = tiny.run(exact, TIER1, second)
    truth = together.by_key()
    assert alone.records
    for key, record in alone.by_key().items():
        assert tiny.same(record) == tiny.same(truth[key])
        assert alone.maps[key] == together.maps[key]
        if record["method"] != "full":
            assert record["measured_ratio"] < 1


def test_float32_batches_choose_the_same_positions() -> None:
    """Equality 3, float32: a kept set differs between batch sizes only where two scores tie to 1e-5."""
    model = tiny.tiny_llama()
    prompts = tiny.prompt_set([50, 21, 64, 37])
    one, _ = tiny.run(model, TIER1, prompts, prefill_rows=1, decode_rows=1)
    many, _ = tiny.run(model, TIER1, prompts, prefill_rows=4, decode_rows=500)
    same_sets = sum(one.maps[key] == many.maps[key] for key in one.maps)
    tokens = [r["output_ids"] == many.by_key()[key]["output_ids"] for key, r in one.by_key().items()]
    print(f"float32: {same_sets} of {len(one.maps)} kept sets, {sum(tokens)} of {len(tokens)} outputs equal")
    for key, kept in one.maps.items():
        assert kept == many.maps[key] or _near_ties(model, prompts, one.by_key()[key], kept, many.maps[key])


def _near_ties(model: Model, prompts: tiny.PromptSet, record: dict, a: list, b: list) -> bool:  # type: ignore[type-arg]
    """Whether the positions that differ have column sums or window scores within 1e-5 of each other."""
    built = catalog.build(record["method"])
    prompt = prompts.prompts[int(record["sample_id"][1:])]
    done = model.prefill([prompt.ids], Needs.of({"column_sum", "window:64"}), [question_start(prompt.regions)])
    for layer in range(len(a)):
        for head in range(len(a[layer])):
            extra, missing = set(a[layer][head]) - set(b[layer][head]), set(b[layer][head]) - set(a[layer][head])
            scores = done.capture.column_sums["all"][layer][0].mean(0)
            if "column_sum" not in built.needs() and (extra or missing):
                return False
            for x, y in zip(sorted(extra), sorted(missing), strict=True):
                if abs(scores[x] - scores[y]) > 1e-5 * scores[x]:
                    return False
    return True


def test_prompts_too_short_to_compress_are_flagged() -> None:
    """Equality 7: nothing was evicted although something was asked for."""
    model = tiny.tiny_llama()
    config = SweepConfig(methods=("snapkv", "h2o"), budgets=(40,))
    sink, _ = tiny.run(model, config, tiny.prompt_set([30, 60]))
    flags = {(r["method"], r["sample_id"]): r["flags"] for r in sink.records}
    assert flags["snapkv", "s0"] == ["noop"]
    assert flags["h2o", "s0"] == ["noop"]
    assert "noop" not in flags["snapkv", "s1"]
    assert flags["full", "s0"] == []


def test_rerotated_keys_are_those_of_the_kept_tokens_alone(exact: Model) -> None:
    """streaming_llm:rerotate, its own equality: layer 0 keys depend on token and position only, so after moving they
    equal the keys of a prompt that consists of the kept tokens."""
    n = 50
    _, context = prefilled(exact, n, set())
    built = catalog.build("streaming_llm:rerotate=true")
    selection = select(built, context, Budget.of_size(20, n, context.layers, context.kv_heads))
    assert selection.rerotate
    kept = selection.kept[0]
    assert exact.rope is not None
    moved = exact.rope.move(context.keys[0][:, kept], kept, torch.arange(20))  # type: ignore[arg-type]
    short = exact.prefill([[context.token_ids[i] for i in kept]], Needs(), [0])  # type: ignore[union-attr]
    assert torch.allclose(moved, short.keys[0][0], rtol=0, atol=1e-4)  # rotary tables are float32
    assert not torch.allclose(context.keys[0][:, kept], short.keys[0][0], rtol=0, atol=0.1)


def test_sample_error_is_a_record_and_the_rest_goes_on(tmp_path: Path) -> None:
    """A method that breaks its contract fails its own rows only."""
    plugin = tmp_path / "bad.py"
    plugin.write_text(
        "import dataclasses, torch\nfrom kvcli.methods.base import Method, Selection\n"
        "@dataclasses.dataclass(frozen=True)\nclass Bad(Method):\n"
        "    def select(self, ctx, budget):\n        return Selection([torch.arange(ctx.n)] * ctx.layers)\n"
    )
    config = SweepConfig(methods=(f"{plugin}:Bad", "h2o"), ratios=("0.5",))
    sink, outcome = tiny.run(tiny.tiny_llama(), config, tiny.prompt_set([30, 40]))
    bad = [r for r in sink.records if r["status"] == "error"]
    assert outcome.errors == len(bad) == 2
    assert all("the budget is" in r["error"] for r in bad)
    assert sum(r["status"] == "ok" for r in sink.records) == 4


def plugin(tmp_path: Path, body: str, extra: str = "") -> str:
    path = tmp_path / "plugin.py"
    path.write_text(
        "import dataclasses, torch\nfrom kvcli.methods.base import Method, Selection\n"
        f"@dataclasses.dataclass(frozen=True)\nclass P(Method):\n    {extra or 'pass'}\n"
        f"    def select(self, ctx, budget):\n        {body}\n"
    )
    return f"{path}:P"


KEEP = "last = torch.arange(ctx.n - budget.per_head, ctx.n)"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{KEEP}; return Selection([last] * ctx.layers, frozenset({{'mine'}}))", "unknown flag mine"),
        (f"{KEEP}; return Selection([last] * ctx.layers, notes={{'x': last}})", "plain JSON"),
        (f"{KEEP}; return Selection([last.expand(2, -1)] * ctx.layers, rerotate=True)", "rerotate needs one set"),
        (f"{KEEP}; return Selection([last[:-1]] * ctx.layers)", "the last prompt token"),
        (f"{KEEP}; return Selection([last.flip(0)] * ctx.layers)", "not sorted"),
        (f"{KEEP}; return Selection([last] * 2)", "2 layers selected"),
    ],
)
def test_what_breaks_the_contract_fails_its_own_rows_only(tmp_path: Path, body: str, message: str) -> None:
    config = SweepConfig(methods=(plugin(tmp_path, body), "h2o"), ratios=("0.5",))
    prompts = tiny.prompt_set([30])
    sink, outcome = tiny.run(tiny.tiny_llama(), config, prompts)
    (bad,) = [r for r in sink.records if r["status"] == "error"]
    assert message in bad["error"].lower() or message in bad["error"]
    alone, _ = tiny.run(tiny.tiny_llama(), SweepConfig(methods=("h2o",), ratios=("0.5",)), prompts)
    good = {key: tiny.same(r) for key, r in sink.by_key().items() if r["status"] == "ok"}
    assert good == {key: tiny.same(r) for key, r in alone.by_key().items()}
    assert outcome.errors == 1
    assert sum(outcome.messages.values()) == 1


def test_a_method_that_writes_into_what_all_share_ends_the_run_before_anything_wrong_is_saved(tmp_path: Path) -> None:
    for body in ("ctx.keys[0].zero_()", "ctx.window_queries[0].mul_(2)", "ctx.column_sums['all'][1].zero_()"):
        config = SweepConfig(
            methods=(plugin(tmp_path, body, "needs = lambda self: frozenset({'window:8', 'column_sum'})"), "h2o"),
            ratios=("0.5",),
        )
        sink = tiny.Memory()
        with pytest.raises(KvcliError, match="writes into ctx"):
            tiny.run(tiny.tiny_llama(), config, tiny.prompt_set([30, 40]), sink=sink)
        assert sink.records == []


@pytest.mark.parametrize("score", [float("nan"), 7.0, -0.1])
def test_a_scorer_that_gives_no_share_fails_its_samples_only(score: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcli.evals.spec import Score

    whole = tiny.AnyTask.score
    wrong = lambda self, sample, output: Score(score, None) if sample.id == "s0" else whole(self, sample, output)  # noqa: E731
    monkeypatch.setattr(tiny.AnyTask, "score", wrong)
    sink, outcome = tiny.run(
        tiny.tiny_llama(), SweepConfig(methods=("h2o",), ratios=("0.5",)), tiny.prompt_set([30, 40])
    )
    assert outcome.errors == 2
    assert {r["sample_id"] for r in sink.records if r["status"] == "ok"} == {"s1"}


def test_a_smaller_limit_measures_no_more_than_asked() -> None:
    """A command with --limit 1 in a folder whose earlier, larger command did not finish."""
    model, prompts = tiny.tiny_llama(), tiny.prompt_set([30, 40, 50])
    plan = tiny.plan_of(SweepConfig(methods=("h2o",), ratios=("0.5",)), prompts)
    sink = tiny.Memory()
    tiny.Runner(model, plan, {tiny.KEY: prompts}, sink, tiny.Options(64), limit=1).run()
    assert {r["sample_id"] for r in sink.records} == {"s0"}
    assert len(sink.records) == 2


GENERATING = SweepConfig(
    methods=("pyramidkv:window=2,beta=4", "chunkkv", "kvzip", "h2o", "tova", "shotkv",
             "scissorhands:history=20,recent=4", "pyramidinfer:context=4", "fastgen:recovery=0.6"),
    ratios=("0.3",), first_token=("compressed", "prefill"), decode_ratios=("off", "0.4"),
)  # fmt: skip
"""Per-layer, per-head and ragged budgets, caches that grow and that evict, prefills of their own."""


@pytest.fixture
def many_end_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers end at very different steps."""
    monkeypatch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset(range(0, 500, 13)))


def long_answers() -> tiny.PromptSet:
    return asks.of_length(tiny.prompt_set([50, 21, 64, 37]), 18)


def assert_equal_records(found: tiny.Memory, truth: tiny.Memory) -> None:
    """Kept sets, tokens and records; figures that are rounded to 8 digits within the last one."""
    assert found.maps == truth.maps
    assert set(found.by_key()) == set(truth.by_key())
    for key, record in found.by_key().items():
        a, b = tiny.same(record), tiny.same(truth.by_key()[key])
        assert a.pop("fidelity") == pytest.approx(b.pop("fidelity"), abs=2e-8), key
        assert a == b


def test_no_neighbour_no_wave_and_no_order_reaches_a_generated_answer(exact: Model, many_end_tokens: None) -> None:
    """Equality 3 while rows leave and enter and evict, float64, with what is compared on the way."""
    prompts = long_answers()
    options = tiny.Options(8, keep_maps=99, fidelity=True)
    truth, outcome = asks.sweep(exact, GENERATING, prompts, options)
    assert outcome.errors == 0
    assert len({r["n_new"] for r in truth.records}) > 8
    assert {r["finish"] for r in truth.records} == {"eos", "length"}
    assert len(truth.records) == 4 * (2 * (1 + 3 + 2 * 5) + 2)
    for rows, prefill_rows, deterministic in ((3, 3, False), (1, 1, False), (40, 4, True)):
        other = dataclasses.replace(options, decode_rows=rows, deterministic=deterministic)
        found, _ = asks.sweep(exact, GENERATING, prompts, other, prefill_rows=prefill_rows)
        assert_equal_records(found, truth)
    bytes_alone, _ = asks.sweep(exact, GENERATING, prompts, dataclasses.replace(options, memory=60_000))
    assert_equal_records(bytes_alone, truth)
    order = [3, 0, 2, 1]
    turned = tiny.PromptSet(
        prompts.task, tiny.KEY, [prompts.samples[i] for i in order], [prompts.prompts[i] for i in order]
    )
    found, _ = asks.sweep(exact, GENERATING, turned, options)
    assert_equal_records(found, truth)


@pytest.mark.parametrize("method", ["h2o", "pyramidkv:window=2,beta=4", "pyramidinfer:context=4", "kvzip"])
def test_a_method_alone_generates_what_it_does_in_the_sweep(exact: Model, many_end_tokens: None, method: str) -> None:
    prompts = long_answers()
    options = tiny.Options(8, keep_maps=99, fidelity=True)
    several = dataclasses.replace(GENERATING, methods=(*GENERATING.methods[4:7], method))
    truth = asks.sweep(exact, several, prompts, options)[0].by_key()
    for decode in GENERATING.decode_ratios:
        alone = dataclasses.replace(GENERATING, methods=(method,), decode_ratios=(decode,))
        sink, _ = asks.sweep(exact, alone, prompts, options)
        assert any(r["method"] != "full" for r in sink.records)
        for key, record in sink.by_key().items():
            a, b = tiny.same(record), tiny.same(truth[key])
            assert a.pop("fidelity") == pytest.approx(b.pop("fidelity"), abs=2e-8)
            assert a == b


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_killed_run_goes_on_to_the_records_of_an_undisturbed_one(
    dtype: torch.dtype, deterministic: bool, many_end_tokens: None
) -> None:
    """Whatever was written before it ended: what is missing, and nothing else, byte for byte apart from times."""
    model, prompts = tiny.tiny_llama(dtype), long_answers()
    config = dataclasses.replace(GENERATING, methods=("snapkv", "pyramidkv", "h2o"))
    options = tiny.Options(3, keep_maps=99, fidelity=True, deterministic=deterministic)
    plan = tiny.plan_of(config, prompts)
    whole, outcome = asks.sweep(model, config, prompts, options, plan=plan)
    assert outcome.errors == 0
    truth = {key: asks.timeless(record) for key, record in whole.by_key().items()}
    rng, count = random.Random(3), len(whole.records)
    cuts = [whole.records[: count // 3], whole.records[: 4 * count // 7]]
    cuts += [rng.sample(whole.records, count // 2), [r for r in whole.records if r["method"] != "full"]]
    for had in cuts:
        sink = tiny.Memory(done={(r["cell_id"], r["sample_id"]) for r in had})
        full = asks.answers_of_full(plan, had)
        rest, _ = asks.sweep(model, config, prompts, options, plan=plan, sink=sink, full_outputs=full)
        found = {key: asks.timeless(record) for key, record in rest.by_key().items()}
        assert len(rest.records) == count - len(had) == len(found)
        assert found == {key: record for key, record in truth.items() if key not in sink.done}


def test_a_killed_run_whose_rows_were_compared_together_goes_on_the_same() -> None:
    """More rows in a decode batch than are compared in one pass: the passes are formed as they were."""
    model, prompts = tiny.tiny_llama(), asks.of_length(tiny.prompt_set([50, 21, 64, 37]), 8)
    config = SweepConfig(methods=("snapkv", "h2o", "pyramidkv"), ratios=("0.1", "0.2", "0.3", "0.4", "0.5"),
                         first_token=("compressed", "prefill"))  # fmt: skip
    options, plan = tiny.Options(16, fidelity=True), tiny.plan_of(config, prompts)
    whole, _ = asks.sweep(model, config, prompts, options, plan=plan)
    assert max(Counter(r["batch_id"] for r in whole.records).values()) > 64
    truth = {key: asks.timeless(record) for key, record in whole.by_key().items()}
    for had in (whole.records[:10], whole.records[:70], whole.records[3::4]):
        sink = tiny.Memory(done={(r["cell_id"], r["sample_id"]) for r in had})
        full = asks.answers_of_full(plan, had)
        rest, _ = asks.sweep(model, config, prompts, options, plan=plan, sink=sink, full_outputs=full)
        assert {key: asks.timeless(record) for key, record in rest.by_key().items()} == {
            key: record for key, record in truth.items() if key not in sink.done
        }
