"""What --dry-run says beforehand, held against what the run then does: tokens, groups, kinds of caches, bytes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvcli.cache.kv_cache import CompressedCache
from kvcli.config import SweepConfig
from kvcli.engine import prefilling
from kvcli.engine.asking import Options
from kvcli.engine.checking import check
from kvcli.engine.estimate import Estimate, Sizes, estimate, rows_that_fit
from kvcli.engine.plan import Plan
from kvcli.engine.session import Session, execute, open_session
from kvcli.methods import catalog
from kvcli.models import pruned_prefill
from kvcli.models.wrapper import PROBE, Model
from tests.engine import tiny
from tests.engine.asks import of_length, sweep
from tests.engine.test_prefixes import behind


@dataclasses.dataclass
class Ran:
    """Prompt tokens that went through the model: densely, in prefills that drop tokens, in passes that repeat the
    context; and the most bytes that caches and their workspace held."""

    dense: int = 0
    pruned: int = 0
    repeated: int = 0
    caches: int = 0


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    seen = Ran()
    prefill, pruned, again, advance = (
        Model.prefill, pruned_prefill._run, prefilling.reconstruction, CompressedCache.advance)  # fmt: skip

    def counted(self: Model, prompts: Sequence[Sequence[int]], *args: Any, **kw: Any) -> Any:
        if [list(p) for p in prompts] != [list(PROBE)]:
            seen.dense += sum(map(len, prompts))
        return prefill(self, prompts, *args, **kw)

    def counted_pruned(model: Model, ids: list[int], asked: list[Any]) -> Any:
        if list(ids) != list(PROBE):
            seen.pruned += len(asked) * len(ids)
        return pruned(model, ids, asked)

    def counted_again(*args: Any) -> Any:
        found = again(*args)
        seen.repeated += found.end - found.start
        return found

    def measured(self: CompressedCache, new: int) -> None:
        advance(self, new)
        seen.caches = max(seen.caches, self.memory.nbytes())

    monkeypatch.setattr(Model, "prefill", counted)
    monkeypatch.setattr(pruned_prefill, "_run", counted_pruned)
    monkeypatch.setattr(prefilling, "reconstruction", counted_again)
    monkeypatch.setattr(CompressedCache, "advance", measured)
    return seen


def session_of(folder: Path, **settings: Any) -> Session:
    given: dict[str, Any] = {"tasks": ("tb_recall",), "ratios": ("0.3",), "limit": 6, "fidelity": False, **settings}
    return open_session(check(SweepConfig(out=str(folder), **given)), lambda text: None)


def run(session: Session) -> None:
    nothing: Any = lambda *_: None  # noqa: E731
    outcome = execute(session, argv=[], passed={}, say=nothing, warn=nothing, progress=nothing, stop=nothing)
    assert outcome.errors == 0


def facts_of(model: Model, plan: Plan, prompts: tiny.PromptSet, done: Any = (), limit: int | None = None) -> Estimate:
    methods = {c.method: catalog.build(c.method) for c in plan.cells.values()}
    sizes = Sizes.of(model.hf.config)
    sets = {tiny.KEY: prompts}
    return estimate(plan, set(plan.cells), sets, sizes, 4, 16, None, set(done), limit, methods, 1 << 30)


@pytest.mark.parametrize("tasks", ["tb_recall", "tb_choice", "tb_longgen"])
def test_the_testbeds_tokens(tmp_path: Path, ran: Ran, tasks: str) -> None:
    session = session_of(tmp_path / "run", tasks=(tasks,), methods=("snapkv", "h2o"), ratios=("0.3", "0.6"))
    facts = session.estimate()
    (group,) = facts.groups
    assert (facts.cells, facts.samples, facts.records) == (5, 6, 30)
    assert (group.sharing, group.cells, group.prompts, group.task) == (1, 5, 6, tasks)
    run(session)
    assert facts.prefill_tokens == group.tokens == ran.dense
    (prompts,) = session.prepared.prompt_sets.values()
    assert facts.separate_prefill_tokens == group.tokens_alone == 5 * sum(len(p.ids) for p in prompts.prompts)
    assert facts.decode_tokens == 30 * prompts.task.max_new_tokens
    after = session_of(tmp_path / "run", tasks=(tasks,), methods=("snapkv", "h2o"), ratios=("0.3", "0.6")).estimate()
    assert (after.records, after.prefill_tokens, after.decode_tokens, after.groups) == (0, 0, 0, [])


def shared_prompts(count: int) -> tiny.PromptSet:
    """Most behind one block, of which a third goes on alike for a while."""
    block = tiny.prompt(60, 1).ids
    longer = [*block, *tiny.prompt(41, 2).ids[1:]]
    prompts = tiny.prompt_set([9] * count)
    prompts.prompts = [behind(longer if i % 3 == 0 else block, 8 + 3 * i, i) for i in range(count)]
    return prompts


@pytest.mark.parametrize("methods", [("snapkv", "h2o"), ("snapkv",), ("h2o", "shotkv:queries=question")])
def test_shared_beginnings_are_counted_once(ran: Ran, methods: tuple[str, ...]) -> None:
    model, prompts = tiny.tiny_llama(), shared_prompts(8)
    config = SweepConfig(methods=methods, ratios=("0.3",))
    plan = tiny.plan_of(config, prompts)
    facts = facts_of(model, plan, prompts)
    ran.dense = 0
    sweep(model, config, prompts, Options(16), plan=plan)
    assert facts.prefill_tokens == ran.dense
    assert 3 * facts.prefill_tokens < facts.separate_prefill_tokens


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("methods", [("pyramidinfer",), ("pyramidinfer", "snapkv"), ("pyramidinfer", "kvzip")])
def test_prefills_of_their_own_are_counted_per_cell(ran: Ran, methods: tuple[str, ...], full: bool) -> None:
    model, prompts = tiny.tiny_llama(), shared_prompts(8)
    config = SweepConfig(methods=methods, ratios=("0.5", "0.8"), full=full)
    plan = tiny.plan_of(config, prompts)
    facts = facts_of(model, plan, prompts)
    ran.dense = 0
    _, outcome = sweep(model, config, prompts, Options(16), plan=plan)
    assert outcome.errors == 0
    (own,) = (g for g in facts.groups if g.sharing == 3)
    assert ran.pruned == own.tokens_alone == 2 * sum(len(p.ids) for p in prompts.prompts)
    extra = sum(len(p.ids) for p in prompts.prompts) if "kvzip" in methods else 0
    assert facts.prefill_tokens == ran.dense + ran.pruned + extra


@pytest.mark.parametrize("full", [True, False])
def test_a_pass_of_its_own_is_counted_per_prompt(ran: Ran, full: bool) -> None:
    """Each prompt repeats its context whole, whatever it shares with others; ratios of one method share the pass."""
    model, prompts = tiny.tiny_llama(), shared_prompts(8)
    config = SweepConfig(methods=("kvzip",), ratios=("0.3", "0.6"), full=full)
    plan = tiny.plan_of(config, prompts)
    facts = facts_of(model, plan, prompts)
    ran.dense = 0
    _, outcome = sweep(model, config, prompts, Options(16), plan=plan)
    assert outcome.errors == 0
    whole = sum(len(p.ids) for p in prompts.prompts)
    assert 0.6 * whole < ran.repeated <= whole
    assert ran.dense + ran.repeated <= facts.prefill_tokens <= ran.dense + whole


def test_groups_and_kinds_of_caches_by_hand() -> None:
    model, prompts = tiny.tiny_llama(), of_length(tiny.prompt_set([40, 50, 60]), 8)
    config = SweepConfig(
        methods=("snapkv", "h2o", "tova", "kvzip", "pyramidinfer", "shotkv:decode=off"), ratios=("0.3", "0.6"),
        decode_ratios=("off", "0.5"), first_token=("compressed", "prefill"),
    )  # fmt: skip
    plan = tiny.plan_of(config, prompts)
    facts = facts_of(model, plan, prompts)
    groups = {g.sharing: g for g in facts.groups}
    # full, snapkv, shotkv once, h2o and tova with both decode settings; two ratios, two first-token modes
    assert {s: (g.cells, g.prompts) for s, g in groups.items()} == {1: (2 + 4 + 4 + 8 + 8, 3), 2: (4, 3), 3: (4, 3)}
    assert groups[1].tokens == 150
    assert groups[3].tokens_alone == 4 * 150
    kinds = Counter(cell.storage or "kept" for cell in plan.cells.values())
    assert kinds == {"kept": 2 + 4 + 4 + 4 + 4 + 4 + 2, "h2o": 4, "tova": 4, "pyramidinfer": 2}
    assert {s.kind: (s.cells, s.rows) for s in facts.storage} == {k: (n, 3 * n) for k, n in kinds.items()}
    assert facts.records == 3 * len(plan.cells)
    assert facts.decode_tokens == facts.records * 8


def test_what_is_done_or_beyond_the_limit_is_not_counted() -> None:
    model, prompts = tiny.tiny_llama(), tiny.prompt_set([40, 50, 60])
    config = SweepConfig(methods=("snapkv", "pyramidinfer"), ratios=("0.5",))
    plan = tiny.plan_of(config, prompts)
    ids = {c.method: c.id for c in plan.cells.values()}
    done = {(ids["snapkv"], "s0"), (ids["full"], "s0"), (ids["pyramidinfer"], "s1")}
    facts = facts_of(model, plan, prompts, done, limit=2)
    assert facts.records == 3
    assert {g.sharing: (g.cells, g.prompts) for g in facts.groups} == {1: (2, 1), 3: (1, 1)}
    assert {g.sharing: g.tokens_alone for g in facts.groups} == {1: 100, 3: 40}


SIZES: dict[str, dict[str, Any]] = {
    "a grid": {"methods": ("snapkv", "h2o"), "ratios": ("0.1", "0.5"), "limit": 24},
    "one small ratio": {"methods": ("snapkv",), "ratios": ("0.1",), "full": False},
    "little memory": {"methods": ("snapkv", "h2o"), "ratios": ("0.1", "0.5"), "limit": 24, "memory": "4M"},
    "few rows": {"methods": ("snapkv", "h2o"), "ratios": ("0.1", "0.5"), "limit": 24, "decode_batch": 4},
    "long answers": {"methods": ("snapkv",), "ratios": ("0.1",), "full": False, "max_new_tokens": 300,
                     "ignore_eos": True},
    "long answers under a budget": {"methods": ("h2o",), "ratios": ("0.5",), "full": False, "max_new_tokens": 400,
                                    "ignore_eos": True, "decode_budgets": (16,)},
    "a fixed cap": {"methods": ("h2o",), "ratios": ("0.5",), "full": False, "max_new_tokens": 400,
                    "ignore_eos": True, "cap": "fixed"},
    "budgets": {"methods": ("snapkv",), "ratios": (), "budgets": (20,), "limit": 24, "full": False},
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_the_bytes_of_decode_caches_within_a_factor_of_two(tmp_path: Path, ran: Ran, name: str) -> None:
    session = session_of(tmp_path / "run", **SIZES[name])
    facts = session.estimate()
    run(session)
    assert 0.5 * ran.caches <= facts.memory.decode <= 2 * ran.caches, facts.memory.decode / ran.caches


def test_rows_that_fit_by_hand() -> None:
    """2 layers x 2 KV heads x (16 + 16) x 4 bytes x 100 tokens are 51,200 bytes a row."""
    config = tiny.tiny_llama(layers=2).hf.config
    assert rows_that_fit(config, 4, 100, 512_000, 256) == 10
    assert rows_that_fit(config, 4, 100, 511_999, 256) == 9
    assert rows_that_fit(config, 4, 100, 1, 256) == 1
    assert rows_that_fit(config, 4, 100, 1 << 40, 256) == 256
    assert Sizes.of(config).kv_elements == 2 * 2 * 32
