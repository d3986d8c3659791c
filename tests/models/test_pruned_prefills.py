"""Several prefills that drop tokens, of one prompt in one pass: each is what it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from kvcli.attention.capture import Needs
from kvcli.cache.budget import Budget
from kvcli.errors import KvcliError
from kvcli.methods.pyramidinfer import Pyramid, PyramidInfer
from kvcli.models.pruned_prefill import Pruned, pruned_prefill, pruned_prefills
from kvcli.models.wrapper import Model
from kvcli.testbed.model import build_tokenizer
from tests.engine import asks, tiny
from tests.models.test_families import SUPPORTED, random_model

RATIOS = ("0.9", "0.62", "0.62", "0.4", "0.26", "0.02", "1")
METHODS = (PyramidInfer(context=8), PyramidInfer(recent=0.05, context=3, interval=2), PyramidInfer(sinks=0, weight=3.0))


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with asks.exact_model(layers=5) as model:
        yield model


def asked(n: int, layers: int, kv_heads: int = 2) -> list[tuple[Any, Budget]]:
    """Every method at every ratio, the methods taking turns."""
    budgets = [Budget.of_ratio(Decimal(ratio), n, layers, kv_heads, False) for ratio in RATIOS]
    return [(method, budget) for budget in budgets for method in METHODS]


def assert_same(found: Pruned, truth: Pruned, room: float) -> None:
    assert [p.tolist() for p in found.positions] == [p.tolist() for p in truth.positions]
    for a, b in zip((*found.keys, *found.values), (*truth.keys, *truth.values), strict=True):
        torch.testing.assert_close(a, b, atol=room, rtol=0)
    assert found.logits.dtype == torch.float32
    torch.testing.assert_close(found.logits, truth.logits, atol=max(room, 1e-6), rtol=0)
    assert (found.flags, found.notes) == (truth.flags, truth.notes)


@pytest.mark.parametrize("n", [1, 2, 7, 33, 90])
def test_each_is_what_it_is_alone(exact: Model, n: int) -> None:
    ids, wanted = tiny.prompt(n, n).ids, asked(n, 5)
    found = pruned_prefills(exact, ids, wanted)
    for one, (method, budget) in zip(found, wanted, strict=True):
        assert_same(one, pruned_prefill(exact, ids, method, budget), 1e-10)
    if n > 7:
        assert len({tuple(map(len, one.positions)) for one in found}) > 10


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_in_float32_too(kv_heads: int) -> None:
    model, ids = tiny.tiny_llama(layers=4, kv_heads=kv_heads), tiny.prompt(120, 5).ids
    wanted = asked(120, 4, kv_heads)
    for one, (method, budget) in zip(pruned_prefills(model, ids, wanted), wanted, strict=True):
        assert_same(one, pruned_prefill(model, ids, method, budget), 1e-4)


@pytest.mark.parametrize("family", SUPPORTED)
def test_families_take_several_at_once(family: str) -> None:
    model = Model(random_model(family, SUPPORTED[family]), build_tokenizer(), name=family)
    ids, wanted = tiny.prompt(60, 1).ids, asked(60, 2)
    for one, (method, budget) in zip(pruned_prefills(model, ids, wanted), wanted, strict=True):
        assert_same(one, pruned_prefill(model, ids, method, budget), 1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "blockwise", "reference"])
def test_every_backend_keeps_them_apart(backend: str) -> None:
    model, ids = tiny.tiny_llama(layers=4), tiny.prompt(50, 2).ids
    wanted = asked(50, 4)
    truth = [pruned_prefill(model, ids, *one) for one in wanted]
    model.attn = backend
    for one, right in zip(pruned_prefills(model, ids, wanted), truth, strict=True):
        assert_same(one, right, 1e-4)


def test_the_first_layer_is_held_once_and_the_others_by_each(exact: Model) -> None:
    """A prefill that is no longer needed gives its memory back while others stay."""
    found = pruned_prefills(exact, tiny.prompt(60, 3).ids, asked(60, 5)[:6])
    for part in ("keys", "values"):
        layers = [[getattr(one, part)[layer] for one in found] for layer in range(5)]
        assert len({x.data_ptr() for x in layers[0]}) == 1
        for deeper in layers[1:]:
            assert all(x.untyped_storage().nbytes() == x.nbytes for x in deeper)


class Refuses(PyramidInfer):
    """A method that fails behind its second layer."""

    def prefill_keep(self, layer: int, received: Tensor, positions: Tensor, state: Pyramid) -> Tensor:
        if layer == 1:
            raise ValueError("no further")
        return super().prefill_keep(layer, received, positions, state)


def test_the_fault_of_one_ends_the_pass_and_everything_is_undone(exact: Model) -> None:
    ids, (first, *_, last) = tiny.prompt(40, 4).ids, asked(40, 5)
    before = exact.prefill([ids], Needs(), [0])
    with pytest.raises(ValueError, match="no further"):
        pruned_prefills(exact, ids, [first, (Refuses(context=8), first[1]), last])
    after = exact.prefill([ids], Needs(), [0])
    assert [k.shape[2] for k in after.keys] == [40] * 5
    assert torch.equal(before.logits, after.logits)


def test_layers_that_mix_what_stands_in_one_sequence_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each layer adds from its last token is right in a pass of one prefill, and another's in one of several."""
    plain = modeling_llama.LlamaDecoderLayer.forward

    def mixing(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return plain(self, hidden_states, *args, **kwargs) + hidden_states[:, -1:]

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", mixing)
    model = tiny.tiny_llama()
    with pytest.raises(KvcliError, match=r"family 'llama' .*without a token they do not compute"):
        pruned_prefill(model, tiny.prompt(20, 1).ids, PyramidInfer(), asked(20, 3)[0][1])
