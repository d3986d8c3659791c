"""Maps and measures of a prompt that is read in pieces, against transformers' eager attention and plain NumPy."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kvcli.attention import maps
from kvcli.attention.capture import Needs
from kvcli.attention.maps import CURVES, LOCAL, POINTS, SINKS, Look, Reading
from kvcli.attention.patch import patched
from kvcli.models.loader import load_config, load_weights
from kvcli.models.source import parse_model
from kvcli.models.wrapper import Model
from kvcli.testbed import vocabulary as V
from kvcli.testbed.model import build_tokenizer
from tests.engine import tiny

N = 61
ROWS = {"all": list(range(SINKS, N)), "question": list(range(50, N))}


def small_model(family: str, kv_heads: int = 2, context: int = 512) -> Model:
    kinds: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }  # fmt: skip
    config_of, model_of = kinds[family]
    config = config_of(
        vocab_size=len(V.WORDS), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=context, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    return Model(model_of(config).eval(), build_tokenizer(), name=family)


def the_testbed() -> Model:
    source = parse_model("testbed")
    return Model(load_weights(load_config(source), source, "float32", "cpu"), build_tokenizer(), name="testbed")


def read(model: Model, ids: Sequence[int], look: Look, chunk: int) -> Reading:
    dense, _ = model.prefill_one(ids, Needs(), len(ids) - 1, chunk=chunk)
    reading = Reading(look, dense.keys, dense.values, model.attn)
    with torch.inference_mode(), patched(model.hf, reading):
        for start in range(0, len(ids), chunk):
            reading.start = start
            tokens = torch.tensor([ids[start : start + chunk]])
            model.hf(tokens, position_ids=torch.arange(start, start + tokens.shape[1])[None], use_cache=False)
    return reading


def eager(model: Model, ids: Sequence[int]) -> np.ndarray:
    """[L, H, n, n] float64 of transformers' own eager attention."""
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    with torch.no_grad():
        found = model.hf(torch.tensor([list(ids)]), output_attentions=True).attentions
    model.hf.set_attn_implementation(before)
    return torch.cat(found).double().numpy()


def pooled(attention: np.ndarray, block: int, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and maximum over the visible pairs of each block, one pair after the other."""
    n = attention.shape[-1]
    count = -(-n // block)
    groups: dict[tuple[int, int], list[float]] = {}
    for i in rows:
        for j in range(i + 1):
            groups.setdefault((i // block, j // block), []).append(attention[i, j])
    mean, most = np.full((2, count, count), np.nan)
    for place, values in groups.items():
        mean[place], most[place] = np.mean(values), np.max(values)
    return mean, most


FAMILIES = [("llama", 1), ("llama", 2), ("llama", 4), ("qwen2", 2), ("qwen3", 2)]


@pytest.mark.parametrize("chunk", [N, 23])
@pytest.mark.parametrize(("family", "kv_heads"), FAMILIES)
def test_a_head_s_map_is_its_eager_attention(family: str, kv_heads: int, chunk: int) -> None:
    """Whole, and in pieces that stand behind one another."""
    model, ids = small_model(family, kv_heads), tiny.prompt(N, 1).ids
    truth = eager(model, ids)
    for layer, head in ((0, 0), (2, 3), (1, 2)):
        mean, most = read(model, ids, Look(N, 1, frozenset({(layer, head)}), 8, ROWS), chunk).map()
        seen = np.tril(np.ones((N, N), bool))
        np.testing.assert_allclose(mean.numpy()[seen], truth[layer, head][seen], atol=1e-6, rtol=1e-5)
        np.testing.assert_allclose(most.numpy()[seen], truth[layer, head][seen], atol=1e-6, rtol=1e-5)
        assert np.isnan(mean.numpy()[~seen]).all() and np.isnan(most.numpy()[~seen]).all()


def test_the_testbed_s_maps_are_its_eager_attention() -> None:
    model, ids = the_testbed(), tiny.prompt(300, 5).ids
    truth = eager(model, ids)
    reading = read(model, ids, Look(300, 1, frozenset({(2, 1)}), 7, {"all": list(range(SINKS, 300))}), 128)
    seen = np.tril(np.ones((300, 300), bool))
    np.testing.assert_allclose(reading.map()[0].numpy()[seen], truth[2, 1][seen], atol=1e-6, rtol=1e-5)
    for layer in range(4):
        for head in range(4):
            small, _ = pooled(truth[layer, head], 7, range(300))
            np.testing.assert_allclose(reading.small_maps()[layer, head], small, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 2, 8, 100])
def test_a_pooled_map_is_pooled_eager_attention(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over heads and visible pairs, the largest of any head; 61 tokens are no multiple of the blocks."""
    monkeypatch.setitem(maps._BLOCK_BYTES, "cpu", 9000)
    model, ids = small_model("llama"), tiny.prompt(N, 2).ids
    truth = eager(model, ids)
    chosen = frozenset({(0, 1), (0, 2), (1, 3), (2, 0)})
    mean, most = read(model, ids, Look(N, block, chosen, 8, ROWS), 23).map()
    every = [pooled(truth[layer, head], block, range(N)) for layer, head in chosen]
    np.testing.assert_allclose(mean.numpy(), np.mean([m for m, _ in every], 0), atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(most.numpy(), np.max([m for _, m in every], 0), atol=1e-6, rtol=1e-5)


def test_small_maps_are_means_over_the_sampled_queries() -> None:
    model, ids = small_model("qwen2"), tiny.prompt(N, 3).ids
    truth = eager(model, ids)
    rows = {"all": [9, 20, 33, 60], "question": [55, 60]}
    found = read(model, ids, Look(N, 1, frozenset({(0, 0)}), 8, rows), 40).small_maps()
    some = [0, 1, 2, 3, 9, 20, 33, 55, 60]
    for layer in range(3):
        for head in range(4):
            mean, _ = pooled(truth[layer, head], 8, some)
            np.testing.assert_allclose(found[layer, head], mean, atol=1e-6, rtol=1e-5)


def measured(row: np.ndarray, at: int) -> list[float]:
    """The measures of one query at position `at`, from its attention, in their order."""
    seen = row[: at + 1]
    ranked = np.sort(seen)[::-1].cumsum()
    needed = [(np.searchsorted(ranked, share * ranked[-1]) + 1) / (at + 1) for share in (0.90, 0.95)]
    some = seen[seen > 0]
    entropy = float(-(some * np.log(some)).sum())
    near = seen[max(0, at + 1 - LOCAL) :]
    return [*needed, entropy, entropy / np.log(at + 1), float(seen[:SINKS].sum()), float(near.sum())]


@pytest.mark.parametrize(("family", "kv_heads"), FAMILIES)
def test_measures_are_those_of_plain_numpy_on_eager_attention(
    family: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(maps._BLOCK_BYTES, "cpu", 9000)
    model, ids = small_model(family, kv_heads), tiny.prompt(N, 4).ids
    model.hf.double()
    truth = eager(model, ids)
    reading = read(model, ids, Look(N, 1, frozenset({(0, 0)}), 8, ROWS), 23)
    for name, rows in ROWS.items():
        found = reading.means(name).numpy()
        for layer in range(3):
            for head in range(4):
                expected = np.mean([measured(truth[layer, head, i], i) for i in rows], 0)
                np.testing.assert_allclose(found[:, layer, head], expected, atol=1e-6, rtol=1e-5)


def test_cumulative_curves_by_hand() -> None:
    received = torch.tensor([[0.4, 0.1, 0.0, 0.1, 0.2, 0.1, 0.05, 0.05]], dtype=torch.double)
    curves = maps.cumulative(received)[:, 0]
    assert curves.shape == (len(CURVES), POINTS)
    eighth = (POINTS - 1) // 8
    torch.testing.assert_close(curves[0, ::eighth], torch.tensor([0, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1, 1]).double())
    quarter = (POINTS - 1) // 4
    rest = torch.tensor([0, 0.2, 0.3, 0.35, 0.4]).double()
    torch.testing.assert_close(curves[2, ::quarter], rest)
    torch.testing.assert_close(curves[1, ::quarter], rest / 0.4)
    torch.testing.assert_close(curves[0, 1], torch.tensor(0.4 * 8 / (POINTS - 1)).double())  # a straight line


@pytest.mark.parametrize("n", [1, 3, 4, 5])
def test_prompts_of_a_few_tokens_have_curves_and_measures(n: int) -> None:
    rows = maps.measured_rows(0, n)
    assert rows and rows[-1] == n - 1
    received = torch.full((2, n), 1 / n, dtype=torch.double)
    curves = maps.cumulative(received)
    assert bool(curves.isfinite().all()) and float(curves[0, 0, -1]) == pytest.approx(1)
    model, ids = small_model("llama"), tiny.prompt(20, 1).ids[:n]
    reading = read(model, ids, Look(n, 1, frozenset({(1, 1)}), 1, {"all": rows}), 8)
    assert bool(reading.means("all").isfinite().all()) and not np.isnan(reading.map()[0].numpy()[-1]).any()


def test_rows_that_are_measured() -> None:
    assert maps.measured_rows(0, 100) == list(range(SINKS, 100))
    assert maps.measured_rows(90, 100) == list(range(90, 100))
    some = maps.measured_rows(0, 50_000)
    assert len(some) == maps.SOME_ROWS and some[-1] == 49_999 and some == sorted(set(some)) and some[0] >= SINKS
    gaps = np.diff(some)
    assert gaps.max() - gaps.min() <= 1, "they are evenly spaced"


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return out


def test_no_tensor_of_all_pairs_is_made() -> None:
    """4,096 tokens: 16.8 million pairs per head, and nothing above a block of queries or what a layer needs anyway."""
    n = 4096
    model, ids = small_model("llama", context=n), tiny.prompt(n, 6).ids
    rows = {"all": maps.measured_rows(0, n), "question": maps.measured_rows(n - 30, n)}
    dense, _ = model.prefill_one(ids, Needs(), n - 1, chunk=1024)
    reading = Reading(Look(n, 8, frozenset({(1, 2), (2, 0)}), 64, rows), dense.keys, dense.values)
    with torch.inference_mode(), patched(model.hf, reading), Largest() as seen:
        for start in range(0, n, 1024):
            reading.start = start
            at = torch.arange(start, start + 1024)[None]
            model.hf(torch.tensor([ids[start : start + 1024]]), position_ids=at, use_cache=False, logits_to_keep=1)
        mean, most = reading.map()
    assert mean.shape == most.shape == (512, 512)
    assert seen.elements <= max(1024 * 1024, (8 << 20) // 4 + 8 * n), f"{seen.elements:,} elements at once"
    assert reading.look.n * reading.look.n > 7 * seen.elements


class Held(TorchDispatchMode):
    """The most bytes that tensors made meanwhile hold together."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in self.seen:
                place, size = each.untyped_storage().data_ptr(), each.untyped_storage().nbytes()
                self.seen.add(place)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(each.untyped_storage(), self._gone, place, size)
        return out

    def _gone(self, place: int, size: int) -> None:
        self.seen.discard(place)
        self.now -= size


def test_memory_grows_with_the_prompt_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak bytes of the second reading at n and at 4 n: at most four times as many."""
    monkeypatch.setitem(maps._BLOCK_BYTES, "cpu", 1 << 16)
    model, peaks = small_model("llama", context=2048), {}
    for n in (512, 2048):
        ids = tiny.prompt(n, 7).ids
        dense, _ = model.prefill_one(ids, Needs(), n - 1, chunk=128)
        look = Look(n, n // 64, frozenset({(1, 2)}), n // 16, {"all": maps.measured_rows(0, n)[-64:]})
        reading = Reading(look, dense.keys, dense.values)
        with torch.inference_mode(), patched(model.hf, reading), Held() as held:
            for start in range(0, n, 128):
                reading.start = start
                at = torch.arange(start, start + 128)[None]
                model.hf(torch.tensor([ids[start : start + 128]]), position_ids=at, use_cache=False, logits_to_keep=1)
        peaks[n] = held.most
    assert 0 < peaks[2048] <= 4 * peaks[512], peaks
