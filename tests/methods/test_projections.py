"""The output projection of every supported family is what its attention module really multiplies with."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvcli.attention.capture import Needs
from kvcli.cache.budget import Budget
from kvcli.engine.selecting import select
from kvcli.methods.catalog import build
from kvcli.methods.context import Context
from kvcli.models.projections import output_projection
from kvcli.models.wrapper import Model
from kvcli.spans import Region
from kvcli.testbed.model import build_tokenizer
from tests.engine import tiny
from tests.models.test_families import SUPPORTED, random_model


class Given:
    """Attention that answers with given tensors instead of computing any, layer by layer."""

    def __init__(self, answers: list[Tensor]) -> None:
        self.answers = answers

    def __call__(self, module: nn.Module, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """[B, Q, H, D], as transformers' attention functions give it."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        return self.answers[layer].expand(query.shape[0], *self.answers[layer].shape), None


def attention_outputs(hf: Any, answers: list[Tensor]) -> list[Tensor]:
    """What each layer's attention module gives when its attention answers so: [Q, hidden]."""
    AttentionInterface.register("given", Given(answers))
    hf.set_attn_implementation("given")
    found: dict[int, Tensor] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        found[int(module.layer_idx)] = (output[0] if isinstance(output, tuple) else output)[0]  # type: ignore[arg-type]

    modules = [m for m in hf.modules() if "attention" in type(m).__name__.lower() and hasattr(m, "layer_idx")]
    hooks = [m.register_forward_hook(note) for m in modules]
    with torch.no_grad():
        hf(torch.arange(3, 3 + len(answers[0]))[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [found[layer] for layer in range(len(answers))]


@pytest.mark.parametrize("family", SUPPORTED)
def test_projection_is_what_the_module_multiplies_with(family: str) -> None:
    """The difference of two outputs is W_o times the difference of their inputs: a bias cancels."""
    hf = random_model(family, SUPPORTED[family]).double()
    shapes = Model(hf, build_tokenizer(), name=family).shapes
    layers, width = hf.config.num_hidden_layers, shapes.heads * shapes.value_width
    generator = torch.Generator().manual_seed(1)
    answers = [
        torch.randn(5, shapes.heads, shapes.value_width, generator=generator, dtype=torch.double) for _ in range(layers)
    ]
    some = attention_outputs(hf, answers)
    none = attention_outputs(hf, [torch.zeros_like(a) for a in answers])
    weight = output_projection(hf, width)
    assert weight is not None
    for layer in range(layers):
        matrix = weight(layer)
        assert matrix.shape == (some[layer].shape[1], width) and matrix.dtype == torch.double
        torch.testing.assert_close(answers[layer].flatten(1) @ matrix.T, some[layer] - none[layer])


@pytest.mark.parametrize("family", SUPPORTED)
def test_criticalkv_weighs_values_by_what_reaches_the_output(family: str) -> None:
    """On a real prefill: the weight of a pair is the L1 norm of what its value adds to the attention module's output
    when a query head attends to it alone, mean over the query heads of its KV head."""
    hf = random_model(family, SUPPORTED[family])
    model = Model(hf, build_tokenizer(), name=family)
    ids = tiny.prompt(18, 0).ids
    done = model.prefill([ids], Needs(window=8), [len(ids) - 1])
    dense, heads, kv_heads = done.dense(0), model.shapes.heads, model.shapes.kv_heads[0]
    ctx = Context(
        n=18, heads=heads, kv_heads=kv_heads, token_ids=ids, regions=[Region("question", 0, 18)],
        keys=dense.keys, values=dense.values, column_sums={}, window_queries=dense.window_queries,
        scaling=done.capture.scaling, sample_id="s", seed=0, o_proj=model.o_proj,
    )  # fmt: skip
    layers = len(dense.keys)
    selection = select(build("criticalkv:base.window=8"), ctx, Budget.of_ratio(Decimal("0.5"), 18, layers, kv_heads))
    assert {len(head) for layer in selection.kept for head in layer} == {9}
    group = heads // kv_heads
    zero = [torch.zeros(18, heads, model.shapes.value_width) for _ in range(layers)]
    base = attention_outputs(hf, zero)
    norms = torch.zeros(layers, heads, 18)
    for head in range(heads):
        alone = [z.clone() for z in zero]
        for layer in range(layers):
            alone[layer][:, head] = dense.values[layer][head // group]
        for layer, out in enumerate(attention_outputs(hf, alone)):
            norms[layer, head] = (out - base[layer]).abs().sum(-1)
    for layer in range(layers):
        wanted = norms[layer].unflatten(0, (kv_heads, group)).mean(1)
        torch.testing.assert_close(ctx._made["L1 of W_o v", layer], wanted, rtol=1e-3, atol=1e-3)


def test_projections_are_float32_at_least() -> None:
    model = tiny.tiny_llama(torch.bfloat16)
    assert model.o_proj is not None and model.o_proj(0).dtype == torch.float32
    exact = tiny.tiny_llama(torch.float64)
    assert exact.o_proj is not None and exact.o_proj(2).dtype == torch.float64


class OddAttention(nn.Module):
    def __init__(self, layer: int, **parts: nn.Module) -> None:
        super().__init__()
        self.layer_idx = layer
        for name, part in parts.items():
            setattr(self, name, part)


class Packed(nn.Module):
    """As 4-bit weights are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    "modules",
    [
        [OddAttention(0, proj=nn.Linear(8, 8))],
        [OddAttention(0, o_proj=nn.Linear(8, 8)), OddAttention(1, proj=nn.Linear(8, 8))],
        [OddAttention(0, o_proj=nn.Linear(8, 8)), OddAttention(0, o_proj=nn.Linear(8, 8))],
        [OddAttention(0, o_proj=nn.Linear(12, 8))],
        [OddAttention(0, o_proj=Packed())],
        [nn.Linear(8, 8)],
    ],
    ids=["no known name", "one layer without", "two in a layer", "another width", "packed", "no attention"],
)
def test_a_family_without_a_known_projection_is_none(modules: list[nn.Module]) -> None:
    assert output_projection(nn.ModuleList(modules), 8) is None


def test_a_known_one_is_found() -> None:
    projection = nn.Linear(8, 6)
    weight = output_projection(nn.ModuleList([OddAttention(0, wo=projection)]), 8)
    assert weight is not None
    torch.testing.assert_close(weight(0), projection.weight.detach())
