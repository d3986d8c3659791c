"""PyramidInfer: layer sizes and choices against plain loops, its prefill against a whole forward pass under masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.attention import received
from kvcli.attention.capture import Needs
from kvcli.cache.budget import Budget
from kvcli.errors import KvcliError
from kvcli.methods.catalog import build
from kvcli.methods.generating import Generating
from kvcli.methods.pyramidinfer import Pyramid, PyramidInfer
from kvcli.models import pruned_prefill as passes
from kvcli.models.pruned_prefill import Pruned, pruned_prefill
from kvcli.models.wrapper import Model
from kvcli.testbed.model import build_tokenizer
from tests.engine import tiny
from tests.models.test_families import SUPPORTED, random_model
from tests.oracles.picks import near
from tests.oracles.prompts import budget, random_prompt, tied_prompt
from tests.oracles.pyramidinfer import authors_sizes, going_on, score, solved_sizes

RATIOS = ["0.02", "0.1", "0.26", "0.3", "0.5", "0.62", "0.77", "0.9", "0.99", "1"]


def budget_of(n: int, layers: int, ratio: str, *, kv_heads: int = 2, strict: bool = False) -> Budget:
    return Budget.of_ratio(Decimal(ratio), n, layers, kv_heads, strict)


# How many tokens enter each layer.


def test_published_settings_keep_three_quarters() -> None:
    """The authors' 7B settings at 900 tokens: a mean of 0.76 over 32 layers, the first two whole."""
    sizes = authors_sizes(900, 32, 0.9)
    assert round(sum(sizes) / 32 / 900, 2) == 0.76
    assert sizes[:3] == [900, 900, 899]


@pytest.mark.parametrize("share, interval", [(0.9, 1), (0.8, 2), (0.9, 3), (0.6, 1)])
def test_the_published_decay_is_found_again_from_its_mean(share: float, interval: int) -> None:
    """Rounded down in every layer there, only at the end here; the mean is a whole number of tokens here."""
    theirs = authors_sizes(900, 32, share, interval=interval)
    size = round(sum(theirs) / 32)
    plan = build(f"pyramidinfer:interval={interval}").prefill_start(Budget.of_size(size, 900, 32, 2))  # type: ignore[attr-defined]
    assert plan.notes["scale"] == 1
    if min(theirs) > 270:  # the code leaves a layer alone that would fall below the least context
        assert plan.notes["share"] == pytest.approx(share, abs=0.005)
        assert max(abs(a - b) for a, b in zip(plan.sizes, theirs, strict=True)) <= 9
    assert plan.sizes[0] == 900
    assert plan.recent == 181


SHAPES = [(900, 32), (445, 4), (100, 12), (60, 3), (7, 2), (40, 1), (2, 5), (1, 3)]


@pytest.mark.parametrize("text, more", [
    ("pyramidinfer", {}), ("pyramidinfer:interval=3", {"interval": 3}),
    ("pyramidinfer:recent=0.05,context=5", {"recent": 0.05, "least": 5}),
    ("pyramidinfer:recent=0,context=0", {"recent": 0.0, "least": 0}), ("pyramidinfer:recent=1", {"recent": 1.0}),
])  # fmt: skip
@pytest.mark.parametrize("n, layers", SHAPES)
def test_layer_sizes_agree_with_plain_loops(n: int, layers: int, text: str, more: dict[str, Any]) -> None:
    for ratio in RATIOS:
        for strict in (False, True):
            plan = build(text).prefill_start(budget_of(n, layers, ratio, strict=strict))  # type: ignore[attr-defined]
            sizes, newest, flags = solved_sizes(n, layers, budget(ratio, n), strict=strict, **more)
            assert (plan.sizes, plan.recent, set(plan.flags)) == (sizes, newest, flags), (ratio, strict)


@given(
    n=st.integers(1, 1200), layers=st.integers(1, 40), percent=st.integers(1, 100), strict=st.booleans(),
    recent=st.floats(0, 1), context=st.integers(0, 100), interval=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=150, deadline=None, derandomize=True)
def test_layer_sizes_are_a_pyramid_of_the_asked_total(
    n: int, layers: int, percent: int, strict: bool, recent: float, context: int, interval: int
) -> None:
    size = budget_of(n, layers, f"{percent / 100:.2f}", strict=strict)
    plan = PyramidInfer(recent=recent, context=context, interval=interval).prefill_start(size)
    total = size.per_head * layers
    assert plan.sizes[0] == n
    assert all(a >= b >= plan.recent >= 1 for a, b in pairwise(plan.sizes))
    if "over_budget" in plan.flags:
        assert sum(plan.sizes) > total
        assert strict or plan.sizes == [n] + [1] * (layers - 1)
    else:
        assert sum(plan.sizes) == total
    assert len(plan.weights) == plan.recent
    assert ("fallback" in plan.flags) <= (not strict and plan.recent <= 1 + int(recent * n))
    if size.everything:
        assert plan.sizes == [n] * layers
        assert not plan.flags


def test_below_the_floor_newest_and_least_shrink_together() -> None:
    """At 900 tokens and 32 layers: 245 of them in all layers but the first is a mean of 0.295."""

    def start(ratio: str, strict: bool = False) -> Pyramid:
        return PyramidInfer().prefill_start(budget_of(900, 32, ratio, strict=strict))

    assert not start("0.3").flags
    assert start("0.3").sizes[-1] == 245
    low = start("0.16")
    assert low.flags == {"fallback"}
    assert set(low.sizes[1:]) <= {119, 120}
    assert low.recent == 88  # 181 of 245 before
    assert start("0.16", strict=True).flags == {"over_budget"}
    assert start("0.16", strict=True).sizes == [900] + [245] * 31
    none = start("0.03")
    assert none.flags == {"fallback", "unreachable", "over_budget"}
    assert none.sizes == [900] + [1] * 31


# Which tokens go on.


def received_of(attention: np.ndarray, plan: Pyramid) -> Tensor:
    """[H, m] as the pass hands it over."""
    return (torch.tensor(attention[:, -plan.recent :]) * plan.weights.double()[:, None]).sum(1)


@pytest.mark.parametrize("m", [3, 17, 64])
@pytest.mark.parametrize("kv_heads, group", [(1, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("text, more", [
    ("pyramidinfer", {}), ("pyramidinfer:sinks=0", {"sinks": 0}), ("pyramidinfer:weight=3,sinks=1", {"sinks": 1}),
])  # fmt: skip
def test_tokens_that_go_on_agree_with_plain_loops(
    text: str, more: dict[str, int], kv_heads: int, group: int, m: int
) -> None:
    method = build(text)
    prompt = random_prompt(m, kv_heads=kv_heads, group=group, layers=1)
    for newest in {1, 2, m // 3, m}:
        weights = torch.linspace(1.0, method.weight, max(1, newest))  # type: ignore[attr-defined]
        scores = score(prompt.attention[0], max(1, newest), method.weight)  # type: ignore[attr-defined]
        for size in range(max(1, newest), m + 1):
            plan = Pyramid([m, size], max(1, newest), weights)
            got = method.prefill_keep(0, received_of(prompt.attention[0], plan), torch.arange(m), plan).tolist()  # type: ignore[attr-defined]
            want = going_on(scores, m, size, max(1, newest), **more)
            other = [(scores[a], scores[b]) for a, b in zip(got, want, strict=True) if a != b]
            assert all(near(a, b) for a, b in other), (newest, size, got, want)


def test_ties_keep_the_first_tokens() -> None:
    prompt = tied_prompt(20, layers=1)
    plan = Pyramid([20, 9], 3, torch.ones(3))
    got = PyramidInfer().prefill_keep(0, received_of(prompt.attention[0], plan), torch.arange(20), plan)
    assert got.tolist() == [0, 1, 2, 3, 4, 5, 17, 18, 19]


def test_the_first_tokens_stay_before_better_ones() -> None:
    plan = Pyramid([10, 6], 1, torch.ones(1))
    got = PyramidInfer().prefill_keep(0, torch.arange(10.0).expand(2, -1), torch.arange(10), plan)
    assert got.tolist() == [0, 1, 2, 3, 8, 9]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 32 << 20])
def test_weighted_sums_agree_with_plain_loops(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "_BLOCK_BYTES", block)
    prompt = random_prompt(70, kv_heads=2, group=2, layers=1)
    for newest in (1, 40, 70):
        q, k = torch.tensor(prompt.queries[0]).to(dtype), torch.tensor(prompt.keys[0]).to(dtype)
        weights = torch.linspace(1, 1.2, newest)
        got = received.summed_received(q[:, 70 - newest :], k, weights, prompt.scaling)
        rounded = dataclasses.replace(prompt, queries=[q.double().numpy()], keys=[k.double().numpy()])
        want = (torch.tensor(rounded.attention[0])[:, 70 - newest :] * weights.double()[:, None]).sum(1)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, atol=1e-12 if dtype == torch.float64 else 1e-5, rtol=0)


# The prefill.


@pytest.fixture
def exact() -> Iterator[None]:
    """Norms in float64; transformers' own compute in float32."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    yield
    patch.undo()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


@torch.no_grad()
def whole_forward(model: Model, ids: list[int], sizes: list[int], newest: int) -> Pruned:
    """All tokens through all layers of a Llama, one after the other; a token that was dropped is masked for all others.

    It shares no code with kvcli: what a dropped token goes on computing reaches nobody. Choices by the oracle.
    """
    hf = model.hf.model
    n, heads, group = len(ids), model.shapes.heads, model.shapes.heads // model.shapes.kv_heads[0]
    hidden = hf.embed_tokens(torch.tensor([ids]))
    cos, sin = (x[0] for x in hf.rotary_emb(hidden, torch.arange(n)[None]))
    hidden, alive = hidden[0], list(range(n))
    keys, values, positions, state = [], [], [], []
    for number, layer in enumerate(hf.layers):
        x, att = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (p(x).view(n, -1, att.head_dim).transpose(0, 1) for p in (att.q_proj, att.k_proj, att.v_proj))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mask = torch.full((n, n), float("-inf"), dtype=q.dtype)
        for i in range(n):
            for j in (*(j for j in alive if j <= i), i):
                mask[i, j] = 0
        p = torch.stack([(q[h] @ k[h // group].T * att.head_dim**-0.5 + mask).softmax(-1) for h in range(heads)])
        mixed = torch.cat([p[h] @ v[h // group] for h in range(heads)], -1)
        hidden = hidden + att.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        keys.append(k[:, alive])
        values.append(v[:, alive])
        positions.append(torch.tensor(alive))
        among = p[:, alive][:, :, alive].numpy()
        state.append({"recent": torch.tensor(ring_of(among, newest, n))})
        if number + 1 < len(sizes):
            going = going_on(score(among, newest), len(alive), sizes[number + 1], newest)
            alive = [alive[i] for i in going]
    return Pruned(keys, values, positions, model.hf.lm_head(hf.norm(hidden[-1])), state=state)


def ring_of(attention: np.ndarray, newest: int, n: int) -> np.ndarray:
    """[1, m, newest]: what each of the last queries of n tokens gave to each key; query i's place is i mod newest."""
    out = np.zeros((1, attention.shape[2], newest))
    for back in range(newest):
        out[0, :, (n - 1 - back) % newest] = attention[:, -1 - back].mean(0)
    return out


@pytest.mark.parametrize("n, ratio", [(50, "0.77"), (50, "0.4"), (90, "0.62"), (90, "0.28"), (33, "0.1"), (3, "0.7")])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_prefill_equals_a_whole_forward_pass_under_masks(exact: None, kv_heads: int, n: int, ratio: str) -> None:
    model = tiny.tiny_llama(torch.float64, layers=5, kv_heads=kv_heads)
    ids, size = tiny.prompt(n, n).ids, budget_of(n, 5, ratio, kv_heads=kv_heads)
    method = PyramidInfer(context=8)
    done = pruned_prefill(model, ids, method, size, decode=True)
    plan = method.prefill_start(size)
    want = whole_forward(model, ids, plan.sizes, plan.recent)
    assert [len(p) for p in done.positions] == plan.sizes
    assert [p.tolist() for p in done.positions] == [p.tolist() for p in want.positions]
    for got, truth in zip((*done.keys, *done.values), (*want.keys, *want.values), strict=True):
        torch.testing.assert_close(got, truth, atol=1e-10, rtol=0)
    for mine, theirs in zip(done.state, want.state, strict=True):
        torch.testing.assert_close(mine["recent"], theirs["recent"], atol=1e-10, rtol=0)
    assert done.facts == {"recent": plan.recent}
    assert done.logits.dtype == torch.float32
    torch.testing.assert_close(done.logits, want.logits.float(), atol=1e-6, rtol=0)
    assert done.flags == plan.flags
    if "unreachable" not in plan.flags:
        assert sum(map(len, done.positions)) * kv_heads == size.model_total


def test_dropping_tokens_changes_the_answer() -> None:
    """The equality above is not about a model that reads nothing."""
    model, ids = tiny.tiny_llama(torch.float64, layers=5), tiny.prompt(90, 90).ids
    plain = model.prefill([ids], Needs(), [80]).logits[0]
    done = pruned_prefill(model, ids, PyramidInfer(context=8), budget_of(90, 5, "0.62"))
    assert (done.logits - plain).abs().max() > 0.01


@pytest.mark.parametrize("n", [1, 2, 64])
def test_ratio_1_is_the_plain_prefill(n: int) -> None:
    model, ids = tiny.tiny_llama(torch.float64), tiny.prompt(n, 8).ids
    plain = model.prefill([ids], Needs(), [0])
    done = pruned_prefill(model, ids, PyramidInfer(), budget_of(n, 3, "1"))
    for layer in range(3):
        torch.testing.assert_close(done.keys[layer], plain.keys[layer][0], atol=1e-10, rtol=0)
        torch.testing.assert_close(done.values[layer], plain.values[layer][0], atol=1e-10, rtol=0)
        assert done.positions[layer].tolist() == list(range(n))
    torch.testing.assert_close(done.logits, plain.logits[0], atol=1e-10, rtol=0)
    assert not done.flags


@pytest.mark.parametrize("family", SUPPORTED)
def test_families_drop_tokens(family: str) -> None:
    """What entered a layer is what its cache holds, and the answer is that of the whole text under masks."""
    model = Model(random_model(family, SUPPORTED[family]), build_tokenizer(), name=family)
    ids = tiny.prompt(60, 1).ids
    done = pruned_prefill(model, ids, PyramidInfer(recent=0.1, context=4), budget_of(60, 2, "0.6"))
    assert [len(p) for p in done.positions] == [60, 12]
    assert [k.shape[1] for k in done.keys] == [60, 12]
    with torch.inference_mode(), passes.patched(model.hf, passes._Masked(done.positions)):
        want = passes._logits(model, ids, use_cache=False)[0]
    torch.testing.assert_close(done.logits, want, atol=1e-5, rtol=1e-5)


def test_prompts_one_after_the_other_do_not_mix() -> None:
    model, method = tiny.tiny_llama(layers=4), PyramidInfer(context=8)

    def run(n: int) -> Pruned:
        return pruned_prefill(model, tiny.prompt(n, n).ids, method, budget_of(n, 4, "0.5"))

    first = run(70)
    run(40)
    again = run(70)
    assert torch.equal(first.logits, again.logits)
    assert all(torch.equal(a, b) for a, b in zip(first.positions, again.positions, strict=True))
    plain = model.prefill([tiny.prompt(70, 70).ids], Needs(), [0])
    assert [k.shape[2] for k in plain.keys] == [70] * 4, "hooks were left on the model"


def test_prefills_of_a_pass_begin_to_generate_as_alone(exact: None) -> None:
    model, ids = tiny.tiny_llama(torch.float64, layers=4), tiny.prompt(60, 3).ids
    method = PyramidInfer(context=4)
    asked = [passes.Asked(method, budget_of(60, 4, ratio), decode) for ratio, decode in
             (("0.5", True), ("0.7", False), ("0.3", True))]  # fmt: skip
    together = passes.pruned_prefills(model, ids, asked)
    assert together[1].state == []
    for one, done in zip(asked, together, strict=True):
        alone = pruned_prefill(model, ids, *one)
        assert len(alone.state) == len(done.state) == 4 * one.decode
        for a, b in zip(alone.state, done.state, strict=True):
            torch.testing.assert_close(a["recent"], b["recent"], atol=1e-10, rtol=0)


def test_the_newest_queries_vote_with_rising_weights() -> None:
    """By hand: three voters, queries 10 to 12, of weights 1, 1.5 and 2; the sink leaves after the others."""
    method, held = PyramidInfer(weight=2.0, sinks=1), [0, 4, 5, 9, 10, 11, 12, -1]
    given = {4: (0.5, 0.2, 0.1), 5: (0.1, 0.2, 0.5), 9: (0.3, 0.3, 0.0)}
    ring = torch.zeros(1, 1, 8, 4)  # a row beside it has four voters
    for slot, p in enumerate(held):
        for query, weight in zip((10, 11), given.get(p, (0, 0)), strict=False):
            ring[0, 0, slot, query % 3] = weight
        ring[0, 0, slot, 12 % 3] = 99  # the one before: query 9
    newest = torch.tensor([[given.get(p, (0, 0, 0))[2] for p in held]])
    view = Generating(
        layer=0, heads=2, position=torch.tensor([[held, held]]), competing=torch.tensor([[[p >= 0 for p in held]] * 2]),
        attention=torch.stack([newest * 2, newest * 0], 1), n=torch.tensor([[[10]]]), newest=torch.tensor([[[12]]]),
        cap=torch.tensor([[[5]]]), counts=torch.tensor([[[True]]]), state={"recent": ring},
        facts={"recent": torch.tensor([[3, 3]])},
    )  # fmt: skip
    method.decode_update(view)
    rank = method.decode_rank(view)
    assert rank[0, 0].tolist() == rank[0, 1].tolist()
    assert rank[0, 0, 1:4].tolist() == pytest.approx([0.5 + 0.3 + 0.2, 0.1 + 0.3 + 1.0, 0.3 + 0.45])
    assert 1e30 < rank[0, 0, 0] < float("inf")
    assert rank[0, 0, 4:7].tolist() == [float("inf")] * 3


# What goes wrong is said.


class Keeps:
    """A pruner that answers whatever the test says."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def prefill_start(self, budget: Budget) -> Pyramid:
        return Pyramid([], 1, torch.ones(1))

    def prefill_keep(self, layer: int, received: Tensor, positions: Tensor, state: Any) -> Tensor:
        return self.answer(received.shape[1])  # type: ignore[no-any-return]


def hooks_of(model: Model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.hf.modules())


@pytest.mark.parametrize("answer, message", [
    (lambda m: torch.arange(m - 1), "9 among them"), (lambda m: torch.tensor([3, 1, m - 1]), "not sorted or repeat"),
    (lambda m: torch.tensor([2, 2, m - 1]), "not sorted or repeat"),
    (lambda m: torch.tensor([], dtype=torch.long), "among them"),
    (lambda m: torch.arange(m).float(), "int64"), (lambda m: torch.tensor([-1, m - 1]), "among them"),
    (lambda m: torch.arange(m)[None], "int64"),
])  # fmt: skip
def test_a_method_that_breaks_its_contract_is_told_and_everything_is_undone(answer: Any, message: str) -> None:
    model, ids = tiny.tiny_llama(), tiny.prompt(10, 1).ids
    hooks, attn = hooks_of(model), model.hf.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        pruned_prefill(model, ids, Keeps(answer), budget_of(10, 3, "0.5"))
    assert hooks_of(model) == hooks
    assert model.hf.config._attn_implementation == attn


def test_layers_that_make_their_own_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would go on without an error, with tokens in the wrong places."""
    plain = modeling_llama.LlamaDecoderLayer.forward
    model = tiny.tiny_llama()

    def own(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        places = torch.arange(hidden_states.shape[1])[None]
        kwargs["position_embeddings"] = model.hf.model.rotary_emb(hidden_states, places)
        return plain(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", own)
    with pytest.raises(KvcliError, match=r"family 'llama' .*without a token they do not compute") as error:
        pruned_prefill(model, tiny.prompt(20, 1).ids, PyramidInfer(), budget_of(20, 3, "0.5"))
    assert error.value.given == "--model tiny"


def test_layers_with_other_arguments_for_each_token_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = modeling_llama.LlamaDecoderLayer.__call__
    model = tiny.tiny_llama()

    def with_more(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(self, hidden_states, *args, **kwargs, gates=torch.ones(1, kwargs["position_ids"].shape[1]))

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__call__", with_more)
    with pytest.raises(KvcliError, match="argument gates of their layers"):
        pruned_prefill(model, tiny.prompt(20, 1).ids, PyramidInfer(), budget_of(20, 3, "0.5"))
    assert model not in passes._CHECKED


def test_a_model_whose_layers_are_not_found_is_refused() -> None:
    model = tiny.tiny_llama()
    model.hf.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(KvcliError, match="decoder layers were not found"):
        pruned_prefill(model, tiny.prompt(20, 1).ids, PyramidInfer(), budget_of(20, 3, "0.5"))


def test_it_never_selects_after_a_prefill() -> None:
    with pytest.raises(NotImplementedError, match="prefill of its own"):
        PyramidInfer().select(None, budget_of(20, 3, "0.5"))  # type: ignore[arg-type]
