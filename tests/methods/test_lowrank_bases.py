"""Low rank on directions of the model: the oracle's projection of every pair, generated ones too; what the weights'
directions give is what decomposed weights give."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcli.attention.capture import Needs
from kvcli.cache.rows import Row, head_positions
from kvcli.cache.stored import StoredCache, StoredRow
from kvcli.config import SweepConfig
from kvcli.engine.asking import stored_layers
from kvcli.engine.needs import given, require
from kvcli.errors import KvcliError
from kvcli.methods.catalog import build, expand
from kvcli.methods.context import Context
from kvcli.models.directions import Bases, of_weights
from kvcli.models.wrapper import Model
from kvcli.testbed.model import build_tokenizer
from tests.engine import tiny
from tests.engine.asks import exact_model
from tests.engine.test_stored import prefilled, truth
from tests.methods import storing
from tests.models.test_families import SUPPORTED, random_model
from tests.oracles.lowrank import best_of_rank, on_leading, rotated, truncated

FREQUENCIES = [1e4 ** -(2 * j / 16) for j in range(8)]
CALIBRATED = "lowrank:basis=calibrated,keys=0.25,values=0.5,group=2"
NEED = "bases:2:"


def rows(what: str, layer: int, heads: int = 4, dim: int = 16, count: int = 200) -> np.ndarray:
    """What calibration texts might have given for all heads side by side [T, H * D]; no two directions alike."""
    rng = np.random.default_rng(sum(map(ord, what)) + layer)
    return rng.standard_normal((count, heads * dim)) * np.linspace(0.2, 3, heads * dim)


def calibrated(heads: int = 4, dim: int = 16) -> Bases:
    def moment(what: str, layer: int, first: int, count: int) -> tuple[Tensor, None]:
        x = torch.tensor(rows(what, layer, heads, dim))[:, first * dim : (first + count) * dim]
        return x.T @ x / len(x), None

    return Bases("some texts", moment)


def context(text: str, n: int, *, kv_heads: int = 4, layers: int = 2, dtype: torch.dtype = torch.float64) -> Context:
    """A random prompt of a model with such bases."""
    ctx = storing.context("lowrank", n, kv_heads=kv_heads, layers=layers, dtype=dtype)
    (need,) = build(text).needs() - {"rope"}
    return dataclasses.replace(ctx, passes={need: lambda: calibrated(kv_heads)})


def wanted(
    layer: int, pairs: list[tuple[np.ndarray, np.ndarray]], places: list[list[int]], together: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per KV head of 4: its pairs projected as `CALIBRATED` says, in groups of 2 or alone."""
    before = [rotated(k, [-p for p in at], FREQUENCIES) for (k, _), at in zip(pairs, places, strict=True)]
    found: dict[str, list[np.ndarray]] = {}
    for what, xs, share in (("keys", before, 0.25), ("values", [v for _, v in pairs], 0.5)):
        own = rows(what, layer)
        found[what] = []
        for first in range(0, 4, 2 if together else 1):
            heads = range(first, first + (2 if together else 1))
            wide = 16 * len(heads)
            x = np.concatenate([xs[h] for h in heads], axis=1)
            done = on_leading(x, own[:, first * 16 : first * 16 + wide], round(share * wide))
            found[what] += [done[:, 16 * i : 16 * i + 16] for i in range(len(heads))]
    return [
        (rotated(k, at, FREQUENCIES), v) for k, v, at in zip(found["keys"], found["values"], places, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 33, 60])
@pytest.mark.parametrize("form", storing.FORMS)
def test_every_pair_is_projected_as_the_oracle_says_generated_ones_too(form: str, n: int) -> None:
    """Also where the last prompt token is fed again behind the others; positions go on from it."""
    ctx = context(CALIBRATED, n)
    positions, fresh = storing.kept(form, ctx), storing.new_pairs(ctx, 5)
    whole = storing.stored(CALIBRATED, ctx, positions)
    fed = storing.stored(CALIBRATED, ctx, storing.without_last(positions))
    storing.feed(fed, storing.pair_at(ctx, n - 1))
    for layers in (whole, fed):
        for pairs in fresh:
            storing.feed(layers, pairs)
        for layer, read in enumerate(storing.heads_of(layers)):
            kept = [p.tolist() for p in head_positions(positions[layer], 4)]
            own = [
                tuple(torch.cat([x[layer][h, p], *[new[layer][i][h] for new in fresh]]).numpy()
                      for i, x in enumerate((ctx.keys, ctx.values)))
                for h, p in enumerate(kept)
            ]  # fmt: skip
            places = [[*p, *range(n, n + 5)] for p in kept]
            alike = len({tuple(p) for p in kept}) == 1 and form != "ragged"
            for got, best in zip(read, wanted(layer, own, places, alike), strict=True):  # type: ignore[arg-type]
                assert all(np.allclose(a.numpy(), b, atol=1e-9) for a, b in zip(got, best, strict=True))
    assert storing.payload(whole) == storing.payload(fed)


@pytest.mark.parametrize("form", storing.FORMS)
@pytest.mark.parametrize("n", [1, 33, 66])
def test_the_payload_is_the_storage_of_coefficients_and_positions(form: str, n: int) -> None:
    """The directions are the model's: they are in neither."""
    ctx = context(CALIBRATED, n)
    layers = storing.stored(CALIBRATED, ctx, storing.kept(form, ctx))
    for _ in range(2):
        assert storing.payload(layers) == storing.real_bytes(layers)
        for pairs in storing.new_pairs(ctx, 7):
            storing.feed(layers, pairs)


@pytest.mark.parametrize(("form", "tables"), [("all", 0), ("layer", 4 * 65), ("head", 4 * 4 * 65)])
def test_bytes_by_hand(form: str, tables: int) -> None:
    """4 KV heads of 16 in twos: keys of rank 8 of 32, values of rank 16 of 32; 66 pairs, 3 generated; alone 4 and 8 of
    16. The note says what the directions weigh: per group 32 rows of 8 and of 16."""
    ctx = context(CALIBRATED, 99 if form != "all" else 66, layers=1)
    layers = storing.stored(CALIBRATED, ctx, storing.kept(form, ctx))
    for pairs in storing.new_pairs(ctx, 3):
        storing.feed(layers, pairs)
    assert storing.payload(layers) == 2 * (66 + 3) * 2 * (8 + 16) + tables
    method: Any = build(CALIBRATED)
    noted = method.notes(ctx, storing.kept(form, ctx))
    groups, width, ranks = (4, 16, 4 + 8) if form == "head" else (2, 32, 8 + 16)
    assert noted == {"basis": "some texts", "basis_bytes": 2 * groups * width * ranks}


def test_no_error_is_below_the_prompts_own_directions_and_none_above_everything() -> None:
    """Eckart and Young: of all projections of a rank the prompt's own is the nearest; each takes something away."""
    ctx = context(CALIBRATED, 120)
    positions = storing.kept("all", ctx)
    plain = storing.plain_heads(ctx, positions)
    for layer, read in enumerate(storing.heads_of(storing.stored(CALIBRATED, ctx, positions))):
        for first in (0, 2):
            values = np.concatenate([plain[layer][h][1].numpy() for h in (first, first + 1)], axis=1)
            off = np.concatenate([read[h][1].numpy() for h in (first, first + 1)], axis=1) - values
            least = np.linalg.norm(best_of_rank(values, 16) - values)
            assert least < np.linalg.norm(off) < np.linalg.norm(values)


def test_on_its_own_calibration_text_it_is_the_best_approximation() -> None:
    ctx = context(CALIBRATED, 64, layers=1)
    assert ctx.rope is not None
    places = torch.arange(64)
    own = {"keys": ctx.rope.move(ctx.keys[0], places, torch.zeros_like(places)), "values": ctx.values[0]}

    def moment(what: str, layer: int, first: int, count: int) -> tuple[Tensor, None]:
        x = own[what][first : first + count].transpose(0, 1).flatten(1)
        return x.T @ x, None

    ctx = dataclasses.replace(ctx, passes={NEED: lambda: Bases("itself", moment)})
    read = storing.heads_of(storing.stored(CALIBRATED, ctx, storing.kept("all", ctx)))[0]
    keys = ctx.rope.move(torch.stack([k for k, _ in read]), places, torch.zeros_like(places))
    for what, found, rank in (("keys", keys, 8), ("values", torch.stack([v for _, v in read]), 16)):
        for first in (0, 2):
            x, got = (y[first : first + 2].transpose(0, 1).flatten(1) for y in (own[what], found))
            left = torch.linalg.svdvals(x)[rank:].norm()
            assert torch.allclose((got - x).norm(), left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_has_the_models_dtype_and_bytes_do_not_depend_on_it(dtype: torch.dtype) -> None:
    ctx, exact = context(CALIBRATED, 40, dtype=dtype), context(CALIBRATED, 40)
    layers, other = (storing.stored(CALIBRATED, c, storing.kept("all", c)) for c in (ctx, exact))
    assert {x.dtype for layer in storing.heads_of(layers) for pair in layer for x in pair} == {dtype}
    assert storing.payload(layers) == storing.payload(other)


FAMILIES = ("llama", "mistral", "qwen2", "phi3", "granite", "stablelm", "starcoder2", "phi", "gpt_neox")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Model:
    """A random model in float64; biases that are not zero."""
    hf = random_model(request.param, SUPPORTED[request.param]).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):
            parameter.data += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 5
    return Model(hf, build_tokenizer(), name=request.param)


def attention_inputs(model: Model, ids: list[int]) -> list[np.ndarray]:
    """Per layer what its attention module reads [n, hidden]."""
    seen: dict[int, np.ndarray] = {}
    hooks = []
    for module in model.hf.modules():
        layer = getattr(module, "layer_idx", None)
        if layer is not None and "attention" in type(module).__name__.lower():

            def note(_: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
                seen[layer] = (args[0] if args else kwargs["hidden_states"])[0].numpy()

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    model.prefill([ids], Needs(), [len(ids)])
    for hook in hooks:
        hook.remove()
    return [seen[i] for i in range(len(seen))]


def weights_of(model: Model, layer: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(W_k, b_k), (W_v, b_v) as this family names and lays them out: separate; behind the queries (phi3); head by head
    query, key, value (gpt_neox)."""
    state = {k: v.numpy() for k, v in model.hf.state_dict().items()}
    mine = {k: v for k, v in state.items() if f".{layer}." in k}

    def one(name: str) -> np.ndarray | None:
        return next((v for k, v in mine.items() if k.endswith(name)), None)

    heads, kv_heads = model.shapes.heads, model.shapes.kv_heads[0]
    dim = model.shapes.value_width
    if one("k_proj.weight") is not None:
        pairs = [(one(f"{x}_proj.weight"), one(f"{x}_proj.bias")) for x in "kv"]
    elif one("qkv_proj.weight") is not None:
        parts = np.split(one("qkv_proj.weight"), [heads * dim, (heads + kv_heads) * dim])  # type: ignore[arg-type]
        pairs = [(parts[1], None), (parts[2], None)]
    else:
        weight, bias = one("query_key_value.weight"), one("query_key_value.bias")
        assert weight is not None and bias is not None
        w, b = weight.reshape(heads, 3, dim, -1), bias.reshape(heads, 3, dim)
        pairs = [(w[:, i].reshape(heads * dim, -1), b[:, i].ravel()) for i in (1, 2)]
    return tuple((w, np.zeros(len(w)) if b is None else b) for w, b in pairs)  # type: ignore[arg-type]


def test_the_weights_directions_give_what_the_decomposed_weights_give(family: Model) -> None:
    """Palu: keys before rotation and values of truncated W_k and W_v, group by group, biases beside them."""
    text = "lowrank:basis=weights,keys=0.5,values=0.25,group=2"
    ids = tiny.prompt(21, 3).ids
    dense, _ = family.prefill_one(ids, Needs(), len(ids), chunk=4096)
    shapes = family.shapes
    ctx = Context(
        n=21, heads=shapes.heads, kv_heads=shapes.kv_heads[0], token_ids=ids, regions=[], keys=dense.keys,
        values=dense.values, column_sums={}, window_queries=[], scaling=[], sample_id="s", seed=0, rope=family.rope,
        passes=given(family, build(text).needs()),
    )  # fmt: skip
    require(family, {text: build(text).needs()})
    read = storing.heads_of(storing.stored(text, ctx, storing.kept("all", ctx)))
    states, dim = attention_inputs(family, ids), shapes.value_width
    assert family.rope is not None
    for layer, x in enumerate(states):
        for which, share in ((0, 0.5), (1, 0.25)):
            weight, bias = weights_of(family, layer)[which]
            found = torch.stack([pair[which] for pair in read[layer]])
            if which == 0:
                places = torch.arange(21)
                found = family.rope.move(found, places, torch.zeros_like(places))
            for first in range(0, shapes.kv_heads[0], 2):
                part = slice(first * dim, (first + 2) * dim)
                low = truncated(weight[part], round(share * 2 * dim))
                best = x @ low.T + bias[part]
                got = found[first : first + 2].transpose(0, 1).flatten(1).numpy()
                assert np.allclose(got, best, atol=1e-5 * np.abs(best).max()), (layer, which)


@pytest.mark.parametrize("name", ["qwen3", "olmo2"])
def test_models_that_normalise_their_keys_are_refused_by_reason(name: str) -> None:
    model = Model(random_model(name, SUPPORTED[name]), build_tokenizer(), name=name)
    text = "lowrank:basis=weights"
    with pytest.raises(KvcliError, match=f"{text} cannot run on {name}: it lacks keys that are what their projection"):
        require(model, {text: build(text).needs()})
    require(model, {"lowrank": build("lowrank").needs()})


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with exact_model() as model:
        yield model


@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
def test_decoding_through_the_form_is_decoding_over_what_it_reads(exact: Model, first_token: str) -> None:
    """Against transformers' own attention over pairs that are turned back, projected and turned on, every one of them
    anew at each step; teacher-forced over 30 tokens."""
    text = "lowrank:basis=weights,keys=0.5,values=0.75,group=2"
    transform, bases = storing.transform(text), of_weights(exact)
    n, new = 50, 30
    logits, ctx = prefilled(exact, n, 1)
    ctx = dataclasses.replace(ctx, passes={"bases:weights": lambda: bases})
    end = n - 1 if first_token == "compressed" else n
    fed = [ctx.token_ids[-1] if end < n else int(logits.argmax()), *(7 * i % 200 + 4 for i in range(new - 1))]
    positions = [torch.arange(end)] * ctx.layers
    row = Row(ctx.keys, ctx.values, positions)
    cache = StoredCache(
        [StoredRow(ctx.keys, ctx.values, positions, None, lambda: stored_layers(transform, ctx, row, positions))], new
    )
    found = [exact.step(torch.tensor([[t]]), torch.tensor([[end + i]]), cache)[0, 0] for i, t in enumerate(fed)]

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        rope = exact.rope
        assert rope is not None
        places = torch.arange(keys.shape[1])
        out = []
        for which, x in ((0, rope.move(keys, places, torch.zeros_like(places))), (1, values)):
            weight, _ = weights_of(exact, layer)[which]
            wide = x.transpose(0, 1).flatten(1).numpy()
            low = on_leading(wide, weight.T, round((0.5, 0.75)[which] * wide.shape[1]))
            out.append(torch.tensor(low).unflatten(1, (2, -1)).transpose(0, 1))
        return rope.move(out[0], torch.zeros_like(places), places), out[1]

    exact_logits = truth(exact, ctx, end, read, fed)
    assert torch.allclose(torch.stack(found), exact_logits, rtol=0, atol=1e-8)
    assert (exact_logits - truth(exact, ctx, end, lambda _, k, v: (k, v), fed)).abs().max() > 1e-3


def test_a_sweep_gives_the_same_in_any_batch_and_says_what_the_directions_weigh(exact: Model) -> None:
    """Behind an evictor too, whose heads may keep different tokens."""
    methods = ("lowrank:basis=weights", "snapkv:window=4+lowrank:basis=weights,group=1",
               "h2o+lowrank:basis=weights")  # fmt: skip
    config = SweepConfig(methods=methods, ratios=("0.5",), first_token=("compressed", "prefill"))
    prompts = tiny.prompt_set([50, 21, 37])
    sinks = [tiny.run(exact, config, prompts, prefill_rows=a, decode_rows=b)[0] for a, b in ((8, 64), (1, 1))]
    ids = [{key: r["output_ids"] for key, r in sink.by_key().items()} for sink in sinks]
    assert ids[0] == ids[1]
    alone = [r for r in sinks[0].records if r["method"] == methods[0]]
    assert len(alone) == 6
    for record in alone:  # 3 layers, 2 heads of 16: keys of rank 5 and values of rank 16 of 32
        assert record["notes"] == {"basis": "weights", "basis_bytes": 3 * 2 * 32 * (5 + 16)}
        assert record["kv_bytes"]["prefill"] == record["n_prompt"] * 3 * (5 + 16) * 2


def test_a_basis_that_is_none_is_named() -> None:
    with pytest.raises(KvcliError, match="'basis=eigen' is not one of its values"):
        build("lowrank:basis=eigen")
    assert build("lowrank:basis=./b.st,group=2").needs() == {"rope", "bases:2:./b.st"}
    assert build("lowrank:basis=weights").needs() == {"rope", "bases:weights"}
    assert "lowrank" in map(str, expand(["all"])) and build("lowrank").needs() == {"rope"}
