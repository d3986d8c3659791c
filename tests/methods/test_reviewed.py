"""What a reader found: figures that depended on the batch, cells that were alike and should not be, late refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvcli.cache.budget import Budget
from kvcli.config import SweepConfig
from kvcli.engine.cells import make_cells
from kvcli.engine.runner import Options, Runner
from kvcli.errors import KvcliError
from kvcli.grammar import parse_methods
from kvcli.methods import catalog
from kvcli.methods.base import Merge
from kvcli.methods.catalog import build, code_hash
from kvcli.models.profiles import HeadProfile, read_profile
from tests.engine import tiny
from tests.engine.asks import exact_model
from tests.oracles.harness import context_for
from tests.oracles.prompts import Prompt, random_prompt

NOISE = """
import dataclasses, torch
from kvcli.methods._ranked import RankedMethod
@dataclasses.dataclass(frozen=True)
class Noise(RankedMethod):
    seeded = True
    sharing = 2
    def scores(self, ctx, layer, newest, sinks):
        return torch.rand(ctx.kv_heads, ctx.n - newest - sinks, generator=ctx.generator("noise", layer))
"""


def test_what_quest_reads_does_not_depend_on_the_batch_and_a_changed_answer_is_no_noop() -> None:
    config = SweepConfig(methods=("quest:dense_layers=0,page=4,tokens=60,least=1",), first_token=("compressed",))
    prompts = tiny.prompt_set([40, 64, 91, 33, 57])
    with exact_model() as model:
        together = tiny.run(model, config, prompts)[0].by_key()
        alone = tiny.run(model, config, prompts, prefill_rows=1, decode_rows=1)[0].by_key()
    for key, record in together.items():
        assert record["kv_bytes"] == alone[key]["kv_bytes"] and record["flags"] == alone[key]["flags"]
    flags = {r["sample_id"]: r["flags"] for r in together.values() if r["method"] != "full"}
    assert flags["s3"] == ["noop", "simulated"] and flags["s2"] == ["simulated"]
    assert flags["s4"] == ["simulated"], "57 tokens fit in 15 pages, the answer behind them does not"


def test_an_edited_base_of_a_wrapper_is_a_new_cell(tmp_path: Path) -> None:
    file = tmp_path / "noise.py"
    file.write_text(NOISE)
    (text,) = parse_methods([f"adakv:base='{file}:Noise'"])
    before = code_hash(text)
    file.write_text(NOISE + "\n# edited\n")
    assert before and code_hash(text) not in (None, before)


def test_a_wrapper_is_as_random_and_as_dear_as_its_base(tmp_path: Path) -> None:
    (tmp_path / "noise.py").write_text(NOISE)
    method = build(f"adakv:base='{tmp_path / 'noise.py'}:Noise'")
    assert method.seeded and method.sharing == 2 and not build("adakv").seeded
    assert build("adakv:base=oracle").sharing == 2
    prompt = random_prompt(60, seed=4)
    budget = Budget.of_size(20, 60, prompt.layers, prompt.kv_heads)
    ctx = context_for(method, prompt, seed=0)
    first = method.select(ctx, budget).kept
    ctx.seed = 1
    assert any(
        not torch.equal(a, b)
        for x, y in zip(first, method.select(ctx, budget).kept, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("method", ["kivi", "kivi:residual=64", "think", "think:prune=0", "minicache:start=1"])
def test_a_transform_that_saves_nothing_is_a_noop_and_never_costs_more_than_full(method: str) -> None:
    sink, outcome = tiny.run(tiny.tiny_llama(), SweepConfig(methods=(method,)), tiny.prompt_set([20]))
    assert outcome.errors == 0
    (record,) = (r for r in sink.records if r["method"] != "full")
    assert record["flags"] == ["noop"] and record["measured_ratio"] == 1.0


@pytest.mark.parametrize(("method", "words"), [
    ("criticalkv:base=expected_attention", "norms of the values"), ("criticalkv:base=knorm", "below zero"),
    ("criticalkv:base=keydiff", "below zero"), ("criticalkv:base=lagkv", "below zero"),
    ("adakv:base=knorm,normalize=true", "below zero"),
])  # fmt: skip
def test_bases_that_a_wrapper_cannot_weigh_are_refused_before_anything_runs(method: str, words: str) -> None:
    with pytest.raises(KvcliError, match=words):
        build(method)
    assert build("criticalkv:base=expected_attention,base.vnorm=false")


def test_gates_are_used_with_the_sinks_they_were_trained_with(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("1.0\t0.0\n0.2\t0.9\n")
    (tmp_path / "config.json").write_text('{"sink_size": 128, "recent_size": 256}')
    profile = read_profile(tmp_path)
    assert profile.how["sinks"] == 128 and profile.how["recent"] == 256
    prompt = random_prompt(60, layers=2, seed=1)
    budget = Budget.of_size(30, 60, prompt.layers, prompt.kv_heads)
    for sinks, fits in ((64, False), (128, True)):
        method = build(f"duo_attention:heads=file,profile='{tmp_path}',sinks={sinks}")
        ctx = context_for(build("full"), prompt)
        (need,) = method.needs()
        ctx.passes = {need: lambda: profile}
        if fits:
            assert method.select(ctx, budget).kept
        else:
            with pytest.raises(KvcliError, match="trained with 128 sinks"):
                method.select(ctx, budget)


def test_an_unreachable_ratio_names_the_nearest_one() -> None:
    prompt = random_prompt(70, seed=2)
    selection = build("lagkv").select(
        context_for(build("lagkv"), prompt), Budget.of_size(7, 70, prompt.layers, prompt.kv_heads)
    )
    assert "unreachable" in selection.flags and selection.notes["nearest_ratio"] == 1.0


def test_equal_likenesses_reach_their_own_mean() -> None:
    prompt = random_prompt(41, seed=3)
    merge = build("merge")
    assert isinstance(merge, Merge)
    for dropped in (7, 24, 31):
        ctx = context_for(build("full"), prompt, dtype=torch.float32)
        ctx.keys = [key[:1, :1].expand_as(key).clone() for key in ctx.keys]  # all keys are one
        kept = [torch.arange(dropped, 41)] * ctx.kv_heads
        for head, (_, values) in enumerate(merge.fold(ctx, 0, kept)):
            own = ctx.values[0][head, dropped:]
            assert not torch.equal(values, own), f"{dropped} equal keys: none was merged in head {head}"


PACKAGE = """
import dataclasses, torch
from kvcli import Method, Selection
@dataclasses.dataclass(frozen=True)
class Ends(Method):
    def select(self, ctx, budget):
        return Selection([torch.arange(ctx.n - budget.per_head, ctx.n)] * ctx.layers)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with the entry points `ends` and `broken`, found as installed ones are."""
    facts = tmp_path / "ends-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: ends\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[kvcli.methods]\nends = ends_package:Ends\nbroken = no_such_module:X\n")
    (tmp_path / "ends_package.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for cached in (catalog.names, catalog._entry_points, catalog._by_name):
        cached.cache_clear()
    yield tmp_path / "ends_package.py"
    for cached in (catalog.names, catalog._entry_points, catalog._by_name):
        cached.cache_clear()


def test_an_edited_package_is_a_new_cell_and_a_broken_one_leaves_the_others_usable(installed: Path) -> None:
    (text,) = parse_methods(["ends"])
    before = code_hash(text)
    installed.write_text(PACKAGE + "\n# edited\n")
    assert before and code_hash(text) not in (None, before)
    assert code_hash(parse_methods(["snapkv"])[0]) is None
    with pytest.raises(KvcliError, match="package of method 'broken' cannot be imported"):
        build("broken")
    names = {card["name"] for card in catalog.cards()}
    assert "snapkv" in names and "broken" not in names
    assert "broken" not in [str(m) for m in catalog.expand(["all"])]


def test_an_anchors_profile_and_seed_are_part_of_the_cells_matched_to_it(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"

    def ids(first: float) -> dict[str, str]:
        profile = HeadProfile(((first, 0.1, 0.2, 0.3),) * 4)
        file.write_text(json.dumps(profile.to_dict()))
        config = SweepConfig(methods=("snapkv", f"headkv:profile={file}+kivi"), ratios=("0.5",), match="bytes")
        return {c.method: c.id for c in make_cells(config, [tiny.TASK], {"model": "tiny"})}

    before, after = ids(0.4), ids(0.9)
    assert before["full"] == after["full"] and before["snapkv"] != after["snapkv"]
    config = SweepConfig(methods=("snapkv", "random+kivi"), ratios=("0.5",), match="bytes", seeds=(0, 1))
    matched = [c for c in make_cells(config, [tiny.TASK], {"model": "tiny"}) if c.method == "snapkv"]
    assert [c.seed for c in matched] == [0, 1]


def test_bytes_behind_a_merge_are_those_of_what_was_merged() -> None:
    config = SweepConfig(
        methods=("streaming_llm+merge+minicache:gamma=0.3,start=0",), ratios=("0.5",), max_new_tokens=1
    )
    prompts = tiny.prompt_set([40, 64, 91])
    plan = tiny.plan_of(config, prompts)
    sink = tiny.Memory()
    Runner(tiny.tiny_llama(), plan, {tiny.KEY: prompts}, sink, Options(64, max_new_tokens=1)).run()
    mine = [r for r in sink.records if r["method"] != "full"]
    assert len(mine) == 3 and all(r["kv_bytes"]["prefill"] == r["kv_bytes"]["end"] for r in mine)


def test_scores_that_are_no_numbers_fail_the_sample_by_name(tmp_path: Path) -> None:
    (tmp_path / "nan.py").write_text(NOISE.replace("torch.rand(", "float('nan') * torch.rand("))
    for method in (f"{tmp_path / 'nan.py'}:Noise", f"adakv:base='{tmp_path / 'nan.py'}:Noise'"):
        config = SweepConfig(methods=(method,), ratios=("0.5",))
        sink, outcome = tiny.run(tiny.tiny_llama(), config, tiny.prompt_set([30]))
        assert outcome.errors == 1
        (record,) = (r for r in sink.records if r["method"] != "full")
        assert "NaN" in record["error"]


def test_a_window_that_was_not_asked_for_is_named(prompt_of: Callable[..., Prompt]) -> None:
    ctx = context_for(build("full"), prompt_of(40))
    with pytest.raises(ValueError, match="needs\\(\\) must name 'window:8'"):
        ctx.window_attention(0, 8)


def test_a_setting_of_the_base_is_spelled_out() -> None:
    with pytest.raises(KvcliError) as caught:
        build("adakv:base=h2o,reduce=max")
    assert caught.value.fix == "adakv:base.reduce=max"
