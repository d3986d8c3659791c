"""A prefill through windows, in float64, against masks that say of every query and head what it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.models import streaming_prefill as module
from kvcli.models.streaming_prefill import streaming_prefill, windowed
from kvcli.models.wrapper import Model
from tests.engine import tiny
from tests.oracles.generating import _masking


@pytest.fixture(scope="module")
def exact() -> Iterator[Callable[[int], Model]]:
    """exact(kv_heads): a float64 model whose norms stay in float64."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    made: dict[int, Model] = {}
    yield lambda kv_heads: made.setdefault(kv_heads, tiny.tiny_llama(torch.float64, kv_heads=kv_heads))
    patch.undo()


def streams_of(kv_heads: int, which: str) -> list[torch.Tensor]:
    """all, none, or some: another pattern in each layer, one without a streaming head."""
    if which != "some":
        return [torch.full((kv_heads,), which == "all")] * 3
    return [torch.arange(kv_heads) % 2 == 0, torch.zeros(kv_heads).bool(), torch.arange(kv_heads) >= kv_heads // 2]


@pytest.mark.parametrize("block", [1, 7, 256])
@pytest.mark.parametrize("which", ["some", "all", "none"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("n, sinks, recent", [(40, 2, 6), (40, 0, 1), (23, 30, 1), (23, 5, 40), (23, 4, 20)])
def test_what_every_query_sees_is_its_head_s_window(
    exact: Callable[[int], Model], monkeypatch: pytest.MonkeyPatch, n: int, sinks: int, recent: int, kv_heads: int,
    which: str, block: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "BLOCK", block)
    model, ids, streams = exact(kv_heads), tiny.prompt(n, 3).ids, streams_of(kv_heads, which)
    done = streaming_prefill(model, ids, streams, sinks, recent)
    with _masking(model.hf) as masking:
        masking.seen = lambda layer, head, q: [
            k for k in range(q + 1) if not streams[layer][head] or k < sinks or q - k < recent
        ]
        logits = model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(done.logits, logits.float(), atol=1e-6, rtol=1e-6)
    for layer in range(3):
        torch.testing.assert_close(done.keys[layer], masking.keys[layer], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(done.values[layer], masking.values[layer], atol=1e-10, rtol=1e-10)


def test_a_window_changes_what_deeper_layers_cache(exact: Callable[[int], Model]) -> None:
    model, ids = exact(2), tiny.prompt(40, 3).ids
    dense, windows = (streaming_prefill(model, ids, streams_of(2, which), 2, 6) for which in ("none", "all"))
    torch.testing.assert_close(dense.keys[0], windows.keys[0], msg="what enters the first layer is the same")
    assert float((dense.keys[1] - windows.keys[1])[:, 7:].abs().max()) > 1e-3
    torch.testing.assert_close(dense.keys[1][:, :6], windows.keys[1][:, :6], msg="until the window is full")


def test_in_half_precision_the_block_size_hardly_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 4, 90, 8).bfloat16(), torch.randn(2, 1, 2, 90, 8).bfloat16()
    whole = windowed(query, key, value, 0.3, 4, 20)
    assert whole.dtype == torch.bfloat16 and whole.shape == query.shape
    monkeypatch.setattr(module, "BLOCK", 1)
    torch.testing.assert_close(windowed(query, key, value, 0.3, 4, 20), whole, atol=0.01, rtol=0.01)
