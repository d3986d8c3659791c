"""Quest: the pages it reads against plain loops, what is counted as read, and decoding through its cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvcli.attention.decode import decode
from kvcli.cache.reading import ReadingCache
from kvcli.cache.rows import Row
from kvcli.cache.workspace import Workspace
from kvcli.config import SweepConfig
from kvcli.methods.base import Reader
from kvcli.methods.catalog import build
from tests.engine import tiny
from tests.engine.asks import exact_model
from tests.oracles.harness import select
from tests.oracles.prompts import Prompt
from tests.oracles.quest import quest, read_bytes


def reader(text: str) -> Reader:
    method = build(text)
    assert isinstance(method, Reader)
    return method


def tensors(
    seed: int, rows: int = 3, heads: int = 6, kv_heads: int = 2, slots: int = 75, dim: int = 8
) -> tuple[Tensor, Tensor, Tensor, list[list[int]], Tensor]:
    make = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, heads, dim, dtype=torch.double, generator=make)
    keys, values = (torch.randn(rows, kv_heads, slots, dim, dtype=torch.double, generator=make) for _ in "kv")
    counts = [[slots, slots - 9], [40, 17], [3, slots - 1]][:rows]
    filled = torch.arange(slots) < torch.tensor(counts)[..., None]
    return query, keys, values, counts, filled


@pytest.mark.parametrize("text", ["quest:tokens=32", "quest:tokens=20,page=5,least=1", "quest:tokens=1,page=7,least=2"])
@pytest.mark.parametrize("seed", range(4))
def test_reads_the_pages_of_the_plain_definition(text: str, seed: int) -> None:
    method = reader(text)
    sizes = [method.settings()[name] for name in ("tokens", "page", "least")]
    query, keys, _, counts, filled = tensors(seed)
    assert method.read(1, query, keys, filled) is None, "the first two layers read everything"
    chosen = method.read(2, query, keys, filled) & filled.repeat_interleave(3, 1)
    for row in range(3):
        right = quest(query[row].numpy(), keys[row].numpy(), counts[row], *sizes)
        for head in range(6):
            assert set(chosen[row, head].nonzero()[:, 0].tolist()) == right[head]


def test_of_equal_pages_the_first_are_read() -> None:
    method = reader("quest:tokens=8,page=4,least=1")
    keys = torch.ones(1, 1, 20, 4, dtype=torch.double)
    chosen = method.read(2, torch.ones(1, 2, 4, dtype=torch.double), keys, torch.ones(1, 1, 20, dtype=torch.bool))
    assert chosen.nonzero()[:, 2].tolist() == [*range(8)] * 2


def test_attention_of_each_query_head_is_over_what_it_reads() -> None:
    query, keys, values, _, filled = tensors(9)
    seen = (torch.rand(3, 2, 3, 75, generator=torch.Generator().manual_seed(1)) < 0.4) & filled[:, :, None]
    seen[..., 0] = True
    out = decode(query[:, :, None], keys, values, 0.3, seen)
    for row in range(3):
        for head in range(6):
            mask = seen[row, head // 3, head % 3]
            weights = (keys[row, head // 3, mask] @ query[row, head] * 0.3).softmax(0)
            assert torch.allclose(out[row, head, 0], weights @ values[row, head // 3, mask], atol=1e-12)


@torch.inference_mode()
def test_counts_what_is_read_as_plain_loops_do() -> None:
    method = reader("quest:tokens=20,page=5,least=1")
    make = torch.Generator().manual_seed(3)
    rows = []
    for n in (33, 50):
        keys, values = ([torch.randn(2, n, 8, dtype=torch.double, generator=make) for _ in range(3)] for _ in "kv")
        rows.append(Row(keys, values, [torch.arange(n)] * 3))
    cache = ReadingCache(method, rows, [4, 4], Workspace())
    expected = [0.0, 0.0]
    for step in range(2):
        cache.begin(torch.tensor([[33 + step], [50 + step]]))
        for layer in range(3):
            query = torch.randn(2, 6, 1, 8, dtype=torch.double, generator=make)
            new = torch.randn(2, 2, 1, 8, dtype=torch.double, generator=make)
            keys, _ = cache.layers[layer].update(new, new)
            cache.narrowed(layer, query, keys, cache.visible(layer, 1))
            for row, n in enumerate((33, 50)):
                filled = [n + step + 1] * 2
                everything = [set(range(filled[0]))] * 6
                mine = quest(query[row, :, 0].numpy(), keys[row].numpy(), filled, 20, 5, 1)
                expected[row] += read_bytes(everything if layer < 2 else mine, 2, filled, 5, 8, layer >= 2)
        cache.advance(1)
    assert [cache.read_per_token(r) for r in range(2)] == [e / 2 for e in expected]
    with pytest.raises(ValueError, match="one token at a time"):
        cache.begin(torch.zeros(2, 2, dtype=torch.long))


def test_flags_say_that_nothing_is_freed(prompt_of: Callable[..., Prompt]) -> None:
    prompt = prompt_of(70)
    kept, flags = select("quest", prompt, "1")
    assert flags == {"simulated", "noop"}, "1024 tokens are all there is"
    kept, flags = select("quest:tokens=16", prompt, "1")
    assert flags == {"simulated"} and all(head == list(range(70)) for layer in kept for head in layer)


def test_a_sweep_reads_less_and_stores_everything_whatever_the_batches() -> None:
    methods = ("quest:dense_layers=0,page=4,tokens=16", "quest")
    config = SweepConfig(methods=methods, first_token=("compressed", "prefill"))
    prompts = tiny.prompt_set([40, 64, 91, 33])
    with exact_model() as model:
        together = tiny.run(model, config, prompts)[0].by_key()
        alone = tiny.run(model, config, prompts, prefill_rows=1, decode_rows=1)[0].by_key()
    assert together.keys() == alone.keys()
    answers = {(r["sample_id"], r["first_token"]): r["output_ids"] for r in together.values() if r["method"] == "full"}
    differ = 0
    for key, record in together.items():
        other = alone[key]
        assert record["output_ids"] == other["output_ids"] and record["kv_bytes"] == other["kv_bytes"]
        if record["method"] == "full":
            assert record["kv_bytes"]["read"] is None
            continue
        assert record["measured_ratio"] == 1 and "simulated" in record["flags"]
        full = answers[record["sample_id"], record["first_token"]]
        if record["method"] == "quest":
            assert record["output_ids"] == full and (record["fidelity"]["kl"] or 0) < 1e-9
        else:
            differ += record["output_ids"] != full
            assert record["n_prompt"] < 60 or (record["kv_bytes"]["read"] or 0) < record["kv_bytes"]["full"]
    assert differ, "pages left out change some answers"
