"""Equality 2 for every method that evicts, at other head counts than the engine's own tests; what compositions and
readers decode over; and identity at r_p = r_d = 1. float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from kvcli.cache.budget import Budget
from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.reading import ReadingCache
from kvcli.cache.rows import Kept, Row, head_positions
from kvcli.cache.stored import StoredCache, StoredRow
from kvcli.cache.workspace import Workspace
from kvcli.config import SweepConfig
from kvcli.engine.asking import _merged, stored_layers
from kvcli.engine.selecting import select
from kvcli.methods import catalog
from kvcli.methods.base import Method, Reader
from kvcli.methods.catalog import build
from kvcli.methods.composed import merge_of, transform_of
from kvcli.methods.context import Context
from kvcli.models import profiles
from kvcli.models.profiles import HeadProfile
from kvcli.models.wrapper import Model
from tests.engine import asks, tiny
from tests.engine.asks import exact_model
from tests.engine.test_equalities import masked_logits, prefilled
from tests.engine.test_stored import truth
from tests.oracles.kivi import kivi
from tests.oracles.merge import d2o
from tests.oracles.prompts import Prompt
from tests.oracles.quant import quant
from tests.oracles.quest import quest

N, NEW = 90, 6
PROFILE = HeadProfile(((0.4, 0.1, 0.3, 0.2), (0.0, 0.9, 0.05, 0.1), (0.2, 0.2, 0.7, 0.01)))
"""Of the query heads of a model of three layers."""
TEXTS = [
    "random:sinks=2,window=4", "random_shot", "random_shot:scope=all-layers", "streaming_llm", "h2o:reduce=max",
    "snapkv:window=8", "pyramidkv:window=2", "chunkkv:reuse=2,window=4", "shotkv", "shotkv:queries=window,window=4",
    "adakv:base.window=4", "adakv:rule=safeguard,base=h2o", "adakv:base=knorm", "adakv:base=oracle",
    "criticalkv:base.window=4", "criticalkv:heads=adaptive,base=h2o", "headkv:window=4", "headkv:temp=3,window=2",
    "duo_attention:sinks=2,recent=6", "fastgen:recovery=0.5", "tova", "scissorhands:recent=3", "knorm",
    "knorm:skip_layers=none", "keydiff", "keydiff:block=16", "lagkv:lag=16,sinks=4", "expected_attention", "kvzip",
    "scope", "scope:prefill=snapkv", "rkv:window=4", "oracle",
]  # fmt: skip


def test_every_method_that_evicts_is_compared_here() -> None:
    evictors = {name for name in catalog.own_names() if catalog.find(name).kind == "evict"}
    assert evictors - {text.partition(":")[0] for text in TEXTS} == {"full"}


def prompted(model: Model, method: Method) -> tuple[Tensor, Context]:
    """Logits behind the prompt, and a context with a head profile."""
    needs = {need for need in method.needs() if not profiles.is_profile(need)}
    done, context = prefilled(model, N, needs)
    given = {need: lambda: PROFILE for need in method.needs() if profiles.is_profile(need)}
    return done.logits[0], dataclasses.replace(
        context, kv_heads=model.shapes.kv_heads[0], passes={**context.passes, **given}
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_over_what_is_kept_is_decoding_with_the_rest_masked(
    text: str, first_token: str, kv_heads: int
) -> None:
    with exact_model(kv_heads=kv_heads) as model:
        method = build(text)
        _, ctx = prompted(model, method)
        kept = select(method, ctx, Budget.of_size(27, N, ctx.layers, kv_heads)).kept
        counts = [len(p) for layer in kept for p in head_positions(layer, kv_heads)]
        assert sum(counts) < N * kv_heads * ctx.layers
        again = first_token == "compressed"
        stored = [[p[:-1] if again else p for p in head_positions(layer, kv_heads)] for layer in kept]
        begin = N - 1 if again else N
        fed = [ctx.token_ids[-1] if again else 17, *(23 * i % 300 + 4 for i in range(NEW - 1))]
        cache = CompressedCache([Row(ctx.keys, ctx.values, stored)], NEW)  # type: ignore[list-item]
        found = [model.step(torch.tensor([[t]]), torch.tensor([[begin + i]]), cache)[0, 0] for i, t in enumerate(fed)]
        wanted = masked_logits(model, ctx.token_ids[:begin] + fed, N, kept, begin)[begin:]
        assert torch.allclose(torch.stack(found), wanted, rtol=0, atol=1e-10)
        whole = masked_logits(model, ctx.token_ids[:begin] + fed, N, [torch.arange(N)] * ctx.layers, begin)[begin:]
        assert (wanted - whole).abs().max() > 1e-3, "what was evicted matters"


# What is stored of an evicted prompt: the oracle's form of the pairs that the oracle's merge left.


def settings_of(text: str) -> dict[str, Any]:
    pairs = (pair.split("=") for pair in text.partition(":")[2].split(",") if pair)
    return {k: int(v) if v.isdigit() else v for k, v in pairs}


def pairs_left(text: str, ctx: Context, kept: Kept) -> list[list[tuple[Tensor, Tensor]]]:
    """[layer][KV head]: keys and values, behind an explicit merge where there is one."""
    if "+merge" not in text:
        return [
            [(ctx.keys[i][h, p], ctx.values[i][h, p]) for h, p in enumerate(head_positions(form, ctx.kv_heads))]
            for i, form in enumerate(kept)
        ]
    arrays = [[x.numpy() for x in xs] for xs in (ctx.keys, ctx.values)]
    prompt = Prompt([], arrays[0], arrays[1], 1.0, [])
    out = []
    for layer, form in enumerate(kept):
        lists = [p.tolist() for p in head_positions(form, ctx.kv_heads)]
        out.append([(torch.tensor(k), torch.tensor(v)) for k, v in d2o(prompt, layer, lists)])
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "text",
    ["snapkv:window=4+kivi:group=4,residual=4", "snapkv:window=4+merge+quant", "h2o+quant:dtype=int4,group=8",
     "streaming_llm+merge+kivi:bits=4,group=8,residual=8", "tova+merge"],
)  # fmt: skip
def test_a_composition_decodes_over_what_its_parts_leave_one_after_the_other(text: str, kv_heads: int) -> None:
    """Against transformers' own attention over the oracles' pairs; generated pairs are stored in the form, too."""
    new, size = 30, 27
    with exact_model(kv_heads=kv_heads) as model:
        method = build(text)
        _, ctx = prompted(model, method)
        kept = select(method, ctx, Budget.of_size(size, N, ctx.layers, kv_heads)).kept
        merge, transform = merge_of(method), transform_of(method)
        keys, values, chosen = ctx.keys, ctx.values, kept
        if merge is not None:
            keys, values, chosen = _merged(merge, ctx, kept)  # type: ignore[assignment]
        row = Row(keys, values, chosen)
        if transform is None:
            cache: CompressedCache = CompressedCache([row], new)
        else:
            cache = StoredCache([StoredRow(keys, values, chosen, None, lambda: stored_layers(transform, ctx, row, kept))], new)  # fmt: skip  # noqa: E501
        fed = [23 * i % 300 + 4 for i in range(new)]
        found = [model.step(torch.tensor([[t]]), torch.tensor([[N + i]]), cache)[0, 0] for i, t in enumerate(fed)]
        left = pairs_left(text, ctx, kept)
        packed = [[torch.stack(x) for x in zip(*heads, strict=True)] for heads in left]
        small = dataclasses.replace(ctx, n=size, keys=[k for k, _ in packed], values=[v for _, v in packed])
        wanted = decoded(model, small, form_of(text), fed)
        assert torch.allclose(torch.stack(found), wanted, rtol=0, atol=1e-9)


def form_of(text: str) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    last = text.rpartition("+")[2]
    form = {"kivi": kivi, "quant": quant}.get(last.partition(":")[0])

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if form is None:
            return keys, values
        each = [form(k.numpy(), v.numpy(), **settings_of(last))[:2] for k, v in zip(keys, values, strict=True)]  # type: ignore[operator]
        return torch.stack([torch.tensor(k) for k, _ in each]), torch.stack([torch.tensor(v) for _, v in each])

    return read


def decoded(model: Model, ctx: Context, read: Any, fed: list[int]) -> Tensor:
    """`tests.engine.test_stored.truth` of a cache with fewer pairs than positions: new tokens continue at N."""
    plain = model.hf.forward

    def shifted(*args: Any, position_ids: Tensor, **more: Any) -> Any:
        return plain(*args, position_ids=position_ids + N - ctx.n, **more)

    model.hf.forward = shifted
    try:
        return truth(model, ctx, ctx.n, read, fed)
    finally:
        model.hf.forward = plain


# A reader.


@contextmanager
def pages_only(model: Model, method: Reader, begin: int) -> Iterator[None]:
    """transformers' own layers with attention over the pages of the oracle, for queries from `begin` on."""
    chosen = [method.settings()[name] for name in ("tokens", "page", "least")]
    dense = method.settings()["dense_layers"]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> tuple[Tensor, None]:
        heads, size, kv_heads = query.shape[1], query.shape[2], key.shape[1]
        out = torch.zeros_like(query)
        for i in range(size):
            everything = [set(range(i + 1))] * heads
            reads = everything
            if i >= begin and module.layer_idx >= dense:
                reads = quest(query[0, :, i].numpy(), key[0].numpy(), [i + 1] * kv_heads, *chosen)
            for h in range(heads):
                some = sorted(reads[h])
                g = h * kv_heads // heads
                weights = (key[0, g, some] @ query[0, h, i] * module.scaling).softmax(-1)
                out[0, h, i] = weights @ value[0, g, some]
        return out.transpose(1, 2), None

    AttentionInterface.register("audit_pages", attend)
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("audit_pages")
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("text", ["quest:tokens=20,page=4,least=2,dense_layers=1", "quest:tokens=1,page=7,least=3,dense_layers=0"])  # fmt: skip  # noqa: E501
def test_a_reader_decodes_like_the_full_cache_with_the_other_pages_masked(text: str, kv_heads: int) -> None:
    with exact_model(kv_heads=kv_heads) as model:
        method = build(text)
        assert isinstance(method, Reader)
        _, ctx = prompted(model, method)
        rows = [Row(ctx.keys, ctx.values, [torch.arange(N)] * ctx.layers)]
        cache = ReadingCache(method, rows, [NEW], Workspace())
        fed = [23 * i % 300 + 4 for i in range(NEW)]
        found = [model.step(torch.tensor([[t]]), torch.tensor([[N + i]]), cache)[0, 0] for i, t in enumerate(fed)]
        with pages_only(model, method, N), torch.no_grad():
            wanted = model.hf(torch.tensor([ctx.token_ids + fed]), use_cache=False).logits[0, N:]
        assert torch.allclose(torch.stack(found), wanted, rtol=0, atol=1e-10)
        everything = masked_logits(model, ctx.token_ids + fed, N, [torch.arange(N)] * ctx.layers, N)[N:]
        assert (wanted - everything).abs().max() > 1e-3


# r_p = r_d = 1.

WHOLE = [name for name in catalog.own_names() if catalog.find(name).domain.kind == "continuous" and name != "merge"]
FORMS = ["think:prune=0", "minicache:start=1", "lowrank:keys=1,values=1", "quest", "fastgen:recovery=1"]
MERGED = ["h2o+merge", "streaming_llm+merge:style=cam", "duo_attention+merge"]


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "profile_of", lambda source, need: PROFILE)
    monkeypatch.setattr("kvcli.engine.needs.parse_model", lambda name: None)


@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_keeping_everything_while_reading_and_generating_gives_the_tokens_of_generate(
    first_token: str, kv_heads: int, profile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equality 1 at r_p = r_d = 1, where nothing may ever leave: tokens, bytes at the end and flags."""
    monkeypatch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset())
    methods = (*WHOLE, *FORMS, *MERGED)
    config = SweepConfig(methods=methods, ratios=("1",), decode_ratios=("same", "1"), first_token=(first_token,))
    prompts, new = asks.of_length(tiny.prompt_set([50, 33]), 20), 20
    with exact_model(kv_heads=kv_heads) as model:
        sink, outcome = tiny.run(model, config, prompts)
        assert outcome.errors == 0, outcome.messages
        model.hf.set_attn_implementation("sdpa")
        texts = {}
        for i, prompt in enumerate(prompts.prompts):
            ids = torch.tensor([prompt.ids])
            model.hf.generation_config.eos_token_id = None
            done = model.hf.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)
            texts[f"s{i}"] = done[0, len(prompt.ids) :].tolist()
    assert {r["method"] for r in sink.records} == {"full", *methods}
    for record in sink.records:
        where = (record["method"], record["sample_id"])
        assert record["output_ids"] == texts[record["sample_id"]], where
        assert record["measured_ratio"] == pytest.approx(1.0) or record["method"].startswith("lowrank"), where
        fed = record["n_prompt"] + new - 1
        pairs = 3 * kv_heads * fed * 2 * 16 * 2
        assert record["kv_bytes"]["end"] == pairs or record["method"].startswith("lowrank"), where
        assert not set(record["flags"]) & {"over_budget", "unreachable", "fallback"}, where
