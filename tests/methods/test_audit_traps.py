"""Known traps that are seen in a whole run: bytes, flags, first tokens, families, and a sweep of everything."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvcli.cache.budget import Budget
from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import Row, head_positions, payload_bytes
from kvcli.config import SweepConfig
from kvcli.engine.selecting import select
from kvcli.errors import KvcliError
from kvcli.grammar import round_half_up
from kvcli.methods import catalog
from kvcli.methods.catalog import build
from kvcli.models import profiles
from kvcli.models.wrapper import Model
from kvcli.testbed import vocabulary as V
from kvcli.testbed.model import build_tokenizer
from tests.engine import asks, tiny
from tests.engine.asks import exact_model
from tests.methods.test_audit_declared import NO_RATIO
from tests.methods.test_audit_equalities import PROFILE, TEXTS, WHOLE, N, prompted
from tests.methods.test_audit_properties import HELD, kept_of
from tests.oracles.harness import budget_for, context_for, lists
from tests.oracles.prompts import random_prompt

# "Keys repeated per query head before storing: 4x memory"; "Fake keys instead of eviction: no memory saved".


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_those_of_the_pairs_that_are_stored_per_kv_head(text: str) -> None:
    """One KV head for four query heads: real storage, every stored key one of the prompt's."""
    with exact_model(kv_heads=1) as model:
        method = build(text)
        _, ctx = prompted(model, method)
        kept = select(method, ctx, Budget.of_size(27, N, ctx.layers, 1)).kept
        half = Row([k.half() for k in ctx.keys], [v.half() for v in ctx.values], kept)
        cache = CompressedCache([half], 0)
        for layer, form in enumerate(kept):
            (positions,) = head_positions(form, 1)
            keys, values = cache.layers[layer]._keys, cache.layers[layer]._values
            assert keys.shape == values.shape == (1, 1, len(positions), 16)
            assert torch.equal(keys[0, 0], half.keys[layer][0, positions])
            assert torch.equal(values[0, 0], half.values[layer][0, positions])
        tensors = [x for one in cache.layers for x in (one._keys, one._values)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        real = sum(x.nbytes for x in tensors)
        assert payload_bytes(kept, model.shapes.dims) == real == cache.nbytes()
        assert sum(storages.values()) <= real * 17 // 16, "a buffer is a 16th larger, for the next cache"
        assert real < ctx.layers * N * 2 * 16 * 2


HEADWISE = ["adakv:base.window=4", "criticalkv:heads=adaptive,base.window=4", "headkv:window=4", "kvzip",
            "duo_attention:sinks=2,recent=6", "fastgen:recovery=0.75"]  # fmt: skip


@pytest.mark.parametrize("text", HEADWISE)
def test_heads_of_other_lengths_hold_no_pair_that_was_evicted(text: str) -> None:
    """What pads a short head is not counted, is not seen, and reaches no further than the layer's longest head."""
    with exact_model(kv_heads=4) as model:
        method = build(text)
        _, ctx = prompted(model, method)
        kept = select(method, ctx, Budget.of_size(27, N, ctx.layers, 4)).kept
        cache = CompressedCache([Row(ctx.keys, ctx.values, kept)], 1)
        counts = [[len(p) for p in head_positions(form, 4)] for form in kept]
        assert any(len(set(layer)) > 1 for layer in counts), "heads differ"
        for layer, row in enumerate(counts):
            assert cache.layers[layer]._keys.shape[2] == max(row) + 1
            seen = cache.visible(layer, 1)
            assert seen is None or seen.expand(1, 4, 1, -1).sum(-1).flatten().tolist() == [c + 1 for c in row]
        assert payload_bytes(kept, model.shapes.dims) == sum(map(sum, counts)) * 2 * 16 * 2


def test_a_sweep_records_the_bytes_of_what_it_kept() -> None:
    """Every method that evicts behind the prefill: bytes = pairs in its map x a pair, whatever the compute dtype."""
    names = [t for t in TEXTS if not t.startswith(("headkv", "duo_attention"))]
    config = SweepConfig(methods=tuple(names), ratios=("0.3",))
    with exact_model() as model:
        sink, outcome = tiny.run(model, config, tiny.prompt_set([60, 45]))
    assert outcome.errors == 0
    for record in sink.records:
        maps = sink.maps[record["cell_id"], record["sample_id"]]
        pairs = sum(len(head) * (2 // len(layer)) for layer in maps for head in layer)
        full = record["n_prompt"] * 3 * 2
        assert record["kv_bytes"]["prefill"] == pairs * 2 * 16 * 2, record["method"]
        assert record["kv_bytes"]["full"] == full * 2 * 16 * 2
        assert record["measured_ratio"] == pytest.approx(pairs / full, abs=1e-6)


# "L2Norm does not count the layers it skips (589 at 128)."


def test_skipped_layers_are_counted_at_a_nominal_128() -> None:
    prompt = random_prompt(1024, kv_heads=1, group=1, layers=32, dim=2)
    method = build("knorm")
    kept = lists(method.select(context_for(method, prompt), Budget.of_size(128, 1024, 32, 1)), 1)
    sizes = [len(layer[0]) for layer in kept]
    assert sum(sizes) == 32 * 128 and sizes[0] == sizes[1] == 1024 and max(sizes[2:]) < 128


# "Per-sequence state kept on the method": every method, not only those of the benchmark.


@pytest.mark.parametrize("text", HELD)
def test_one_method_gives_each_prompt_what_it_gives_it_alone(text: str) -> None:
    one = build(text)
    prompts = [random_prompt(n, layers=2, dim=4, seed=s) for n, s in ((40, 1), (23, 2), (40, 3))]
    alone = [kept_of(build(text), p, budget_for(p, "0.4")) for p in prompts]
    for i in (0, 1, 2, 1, 0, 0):
        assert kept_of(one, prompts[i], budget_for(prompts[i], "0.4")) == alone[i]


# "Literal per-step r_d on an already pruned cache collapses below one token."


@pytest.mark.parametrize("ratio", ["0.1", "0.4"])
@pytest.mark.parametrize("method", ["shotkv", "shotkv:recent=3", "scope:recent=2"])
def test_the_generated_part_is_a_share_of_all_that_was_generated(
    method: str, ratio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset())
    least = 4 if "recent=3" in method else 1
    held = []
    for new in (2, 11, 30, 60):
        prompts = asks.of_length(tiny.prompt_set([60]), new)
        config = SweepConfig(methods=(method,), ratios=("0.5",), decode_ratios=(ratio,), full=False)
        sink, _ = tiny.run(tiny.tiny_llama(), config, prompts)
        (record,) = sink.records
        bytes_ = record["kv_bytes"]
        generated = (bytes_["end"] - bytes_["prefill"]) // (3 * 2 * 2 * 16 * 2)
        t = record["n_new"] - 1
        assert t == new - 1
        assert generated == min(t, max(least, round_half_up(Decimal(ratio) * t)))
        held.append(generated)
    assert held == sorted(held) and held[-1] > held[0]


# "Eviction before the layer's own attention silently changes the model": what is read is read densely by all.


def test_every_method_behind_the_shared_prefill_begins_with_fulls_own_token() -> None:
    names = [t for t in TEXTS if not t.startswith(("headkv", "duo_attention"))]
    config = SweepConfig(
        methods=(*names, "kivi", "think", "lowrank", "minicache", "quant", "quest", "h2o+merge"), ratios=("0.1",),
        first_token=("prefill",),
    )  # fmt: skip
    with exact_model() as model:
        sink, outcome = tiny.run(model, config, tiny.prompt_set([60, 45, 72]))
    assert outcome.errors == 0
    full = {r["sample_id"]: r["output_ids"][0] for r in sink.records if r["method"] == "full"}
    assert len(sink.records) == 3 * (len(names) + 8)
    assert all(r["output_ids"][0] == full[r["sample_id"]] for r in sink.records)


# "All run, or are refused for a family with the reason."

LIKE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}  # fmt: skip


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_families_that_need_what_is_not_there_are_refused_with_the_reason(family: str) -> None:
    config = AutoConfig.for_model(family, vocab_size=len(V.WORDS), **LIKE)
    torch.manual_seed(1)
    hf = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(KvcliError, match=r"soft-capped|sliding-window") as found:
        Model(hf, build_tokenizer(), name=f"my-{family}")
    assert family in found.value.what and found.value.given == f"--model my-{family}" and found.value.fix


# A sweep of everything.


def test_a_sweep_of_all_methods_completes_with_the_flags_that_are_due(kvcli: Any, tmp_path: Path) -> None:
    """The testbed's prompts have about 445 tokens: windows, floors and units do not fit everywhere."""
    done = kvcli("sweep", "--model", "testbed", "--method", "all", "--ratio", "0.1,0.3,0.5", "--task", "tb_recall",
                 "--limit", "1", "--no-fidelity", "--out", tmp_path / "run")  # fmt: skip
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {r["method"] for r in rows} == set(catalog.own_names()) - {"merge"}
    assert {r["status"] for r in rows} == {"ok"}
    flags = {(r["method"], r["ratio"]): set(r["flags"]) for r in rows}
    assert flags["snapkv", 0.1] == {"fallback"} and flags["snapkv", 0.3] == flags["snapkv", 0.5] == set()
    assert flags["lagkv", 0.1] == flags["lagkv", 0.3] == {"unreachable", "over_budget"}
    assert flags["lagkv", 0.5] == set()
    assert all(flags["duo_attention", r] == {"unreachable", "over_budget"} for r in (0.1, 0.3, 0.5))
    assert "unreachable" in flags["pyramidinfer", 0.1] and flags["pyramidinfer", 0.5] == {"fallback"}
    assert flags["knorm", 0.1] == {"fallback"} and flags["headkv", 0.1] == {"fallback"}
    assert {"simulated"} <= flags["quest", None]
    own = {r["method"] for r in rows if r["ratio"] is None}
    assert own == NO_RATIO, "one cell at what comes out"
    for record in rows:
        asked = record["ratio"]
        if asked is not None and not {"over_budget", "unreachable"} & set(record["flags"]):
            assert record["measured_ratio"] <= asked + 0.5 / record["n_prompt"] + 1e-9, record["method"]
        if record["method"] == "full":
            assert record["measured_ratio"] == 1


# "Cache left untouched when the prompt is shorter than the budget: flag `noop`."


def test_every_method_says_when_a_prompt_is_too_short_to_compress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "profile_of", lambda source, need: PROFILE)
    monkeypatch.setattr("kvcli.engine.needs.parse_model", lambda name: None)
    config = SweepConfig(methods=(*WHOLE, "snapkv+merge", "fastgen:recovery=1", "quest"), budgets=(60,))
    sink, outcome = tiny.run(tiny.tiny_llama(), config, tiny.prompt_set([40, 61]))
    assert outcome.errors == 0, outcome.messages
    assert {r["method"] for r in sink.records} == {"full", *config.methods}
    for record in sink.records:
        short = record["sample_id"] == "s0" or record["method"] in ("fastgen:recovery=1", "quest")
        expected = short and record["method"] != "full"
        if record["measured_ratio"] < 1:
            assert not short and "noop" not in record["flags"], record["method"]
        else:
            assert ("noop" in record["flags"]) == (record["method"] != "full"), record["method"]
        assert not expected or "noop" in record["flags"], record["method"]
