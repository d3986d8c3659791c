"""Long prompts are read in chunks, each behind the ones before it: exactly what one pass gives. And long answers under
a decode budget hold a cache that does not grow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.attention.capture import Dense, Needs
from kvcli.config import SweepConfig
from kvcli.engine import prefilling
from kvcli.engine.pool import PoolCache
from kvcli.engine.prefixes import question_start
from kvcli.engine.runner import Options
from kvcli.models.wrapper import Model
from tests.engine import tiny
from tests.engine.asks import exact_model, of_length, sweep
from tests.engine.test_prefixes import behind

NEEDS = Needs(frozenset({"all", "question"}), 24)
CLOSE = {"atol": 1e-10, "rtol": 0.0}


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with exact_model() as model:
        yield model


def assert_same(a: Dense, b: Dense) -> None:
    """Keys, values, column sums of all and of the question's queries, the window's queries."""
    assert a.n == b.n
    for name in ("keys", "values", "window_queries"):
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            torch.testing.assert_close(x, y, **CLOSE)
    assert a.column_sums.keys() == b.column_sums.keys()
    for name, sums in a.column_sums.items():
        for x, y in zip(sums, b.column_sums[name], strict=True):
            torch.testing.assert_close(x, y, **CLOSE)


@pytest.mark.parametrize("attn", ["blockwise", "sdpa", "reference"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 99, 100, 5000])
def test_a_prompt_in_chunks_equals_one_pass(
    exact: Model, monkeypatch: pytest.MonkeyPatch, chunk: int, attn: str
) -> None:
    """Chunks shorter than the window, a border inside the question, one token left over."""
    monkeypatch.setattr(exact, "attn", attn)
    prompt = tiny.prompt(100, 3)
    question = question_start(prompt.regions)
    whole = exact.prefill([prompt.ids], NEEDS, [question])
    calls: list[int] = []
    once = exact.prefill
    monkeypatch.setattr(exact, "prefill", lambda ids, *a: calls.append(len(ids[0])) or once(ids, *a))
    dense, last = exact.prefill_one(prompt.ids, NEEDS, question, chunk=chunk)
    assert sum(calls) == 100 and max(calls) <= chunk and len(calls) == -(-100 // chunk)
    assert_same(dense, whole.dense(0))
    torch.testing.assert_close(last.logits, whole.logits, atol=1e-5, rtol=0)  # kept in float32
    assert last.capture.scaling == whole.capture.scaling
    total = sum(float(x.sum()) for x in dense.column_sums["all"])
    assert total == pytest.approx(100 * exact.shapes.heads * 3)  # every query's attention adds up to one


@pytest.mark.parametrize("chunk", [7, 16, 64])
@pytest.mark.parametrize("block", [20, 50])
def test_a_prompt_in_chunks_behind_a_shared_prefix_equals_one_pass(exact: Model, chunk: int, block: int) -> None:
    head = tiny.prompt(block, 9).ids
    prompt = behind(head, 80, 2)
    question = question_start(prompt.regions)
    whole = exact.prefill([prompt.ids], NEEDS, [question])
    prefix, _ = exact.prefill_one(head, NEEDS, block, chunk=chunk)
    held = [x.clone() for x in (*prefix.keys, *prefix.column_sums["all"])]
    dense, last = exact.prefill_one(prompt.ids[block:], NEEDS, question - block, prefix, chunk=chunk)
    assert_same(dense, whole.dense(0))
    torch.testing.assert_close(last.logits, whole.logits, atol=1e-5, rtol=0)
    for before, after in zip(held, (*prefix.keys, *prefix.column_sums["all"]), strict=True):
        assert torch.equal(before, after)  # other prompts go on from it


def test_without_statistics_nothing_is_kept(exact: Model) -> None:
    dense, _ = exact.prefill_one(tiny.prompt(60, 1).ids, Needs(), 50, chunk=16)
    assert (dense.n, dense.column_sums, dense.window_queries) == (60, {}, [])


def test_a_sweep_in_chunks_gives_the_records_of_one_in_whole_passes(
    exact: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts alone, beside each other, behind a shared block; all methods' statistics at once."""
    block = tiny.prompt(70, 1).ids
    prompts = tiny.prompt_set([9] * 6)
    prompts.prompts = [behind(block, 8 + 5 * i, i) if i % 3 else tiny.prompt(40 + 31 * i, i) for i in range(6)]
    config = SweepConfig(
        methods=("snapkv", "pyramidkv", "h2o", "shotkv:queries=question", "kvzip", "scissorhands"), ratios=("0.3",),
        first_token=("compressed", "prefill"), decode_ratios=("off", "0.5"),
    )  # fmt: skip
    options = Options(16, keep_maps=99)
    truth, outcome = sweep(exact, config, prompts, options)
    assert outcome.errors == 0
    longest = 0
    once = exact.prefill

    def counted(ids: list[list[int]], *args: Any) -> Any:
        nonlocal longest
        longest = max(longest, len(ids) * max(map(len, ids)))
        return once(ids, *args)

    monkeypatch.setattr(exact, "prefill", counted)
    for chunk in (7, 33, 64):
        monkeypatch.setattr(prefilling, "CHUNK", chunk)
        longest = 0
        found, _ = sweep(exact, config, prompts, options)
        assert longest <= chunk
        assert found.maps == truth.maps
        assert {k: tiny.same(r) for k, r in found.by_key().items()} == {
            k: tiny.same(r) for k, r in truth.by_key().items()
        }


# --- long answers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """After each step: bytes of the cache's tensors, of its workspace, and the most pairs a head of any row holds."""
    seen: list[tuple[int, int, int]] = []
    advance = PoolCache.advance

    def watched(self: PoolCache, new: int) -> None:
        advance(self, new)
        pairs = max(int((layer.slots.position >= 0).sum(-1).max()) for layer in self.layers)
        states = sum(x.nbytes for layer in self.layers for x in layer.slots.state.values())
        seen.append((self.nbytes() + states, self.memory.nbytes(), pairs))

    monkeypatch.setattr(PoolCache, "advance", watched)
    return seen


AXES = {
    "unified, size": ("h2o", {"decode_budgets": (12,)}),
    "separate, size": ("scope:recent=4", {"decode_budgets": (12,)}),
    "unified, fixed": ("streaming_llm", {"cap": "fixed"}),
    "every eighth": ("tova", {"decode_budgets": (12,), "decode_interval": 8}),
    "history": ("scissorhands:history=16,recent=4", {"decode_budgets": (12,)}),
}


@pytest.mark.parametrize("axis", AXES)
def test_the_cache_of_a_long_answer_does_not_grow(held: list[tuple[int, int, int]], axis: str) -> None:
    """Its tensors after 40 generated tokens are those after 400."""
    method, settings = AXES[axis]
    model = tiny.tiny_llama()
    config = SweepConfig(methods=(method,), ratios=("0.5",), full=False, **settings)
    ends = {}
    for new in (100, 400):
        held.clear()
        sink, outcome = sweep(model, config, of_length(tiny.prompt_set([50, 41]), new), Options(8, ignore_eos=True))
        assert (outcome.errors, len(held)) == (0, new)
        assert {r["n_new"] for r in sink.records} == {new}
        assert {sizes for sizes, _, _ in held} == {held[0][0]}
        assert {memory for _, memory, _ in held} == {held[0][1]}
        most = 25 + (0 if "fixed" in axis else 12) + settings.get("decode_interval", 1)
        assert max(pairs for _, _, pairs in held) <= most
        assert max(pairs for _, _, pairs in held[50:60]) == max(pairs for _, _, pairs in held[-20:])
        ends[new] = held[0][0], [r["kv_bytes"]["end"] for r in sink.records], [r["alloc_bytes"] for r in sink.records]
    assert ends[100][0] == ends[400][0]
    assert ends[100][2] == ends[400][2]
    if "decode_interval" not in settings:  # else both end a few tokens after an eviction
        assert ends[100][1] == ends[400][1]


def test_without_a_decode_phase_it_does_grow() -> None:
    """The control."""
    model, sizes = tiny.tiny_llama(), []
    for new in (50, 200):
        sink, _ = sweep(
            model, SweepConfig(methods=("h2o",), ratios=("0.5",), full=False), of_length(tiny.prompt_set([50]), new),
            Options(8, ignore_eos=True),
        )  # fmt: skip
        sizes.append((sink.records[0]["kv_bytes"]["end"], sink.records[0]["alloc_bytes"]))
    assert sizes[1][0] > 2.5 * sizes[0][0] and sizes[1][1] > 2 * sizes[0][1]


@pytest.mark.slow
def test_two_thousand_tokens_under_a_decode_budget(
    kvcli: Any, tmp_path: Path, held: list[tuple[int, int, int]]
) -> None:
    """A model of 4,096 positions through the command line: the bytes at 600 and at 2,000 tokens are the same."""
    from kvcli.models.source import TESTBED_FOLDER

    config = json.loads((TESTBED_FOLDER / "config.json").read_text())
    folder = tmp_path / "model"
    folder.mkdir()
    for file in TESTBED_FOLDER.glob("*.json"):
        (folder / file.name).write_text(file.read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    size = "layers=2,hidden=32,heads=2,kv_heads=1,vocab=auto,positions=4096"
    ends, sizes = {}, {}
    for new in (600, 2000):
        held.clear()
        out = tmp_path / str(new)
        done = kvcli(
            "sweep", "--model", f"random:{folder}:{size}", "--task", "tb_recall", "--limit", 1, "--method",
            "h2o,shotkv", "--ratio", "0.5", "--decode-budget", 256, "--ignore-eos", "--no-fidelity",
            "--no-full", "--max-new-tokens", new, "--out", out,
        )  # fmt: skip
        assert done.code == 0, done.err
        rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert len(rows) == 2 and {r["n_new"] for r in rows} == {new}
        for row in rows:
            pair = row["kv_bytes"]["full"] // row["n_prompt"]
            assert row["kv_bytes"]["end"] == row["kv_bytes"]["prefill"] + 256 * pair, row["method"]
        ends[new] = {(r["method"], r["sample_id"]): (r["kv_bytes"]["end"], r["alloc_bytes"]) for r in rows}
        sizes[new] = {size for size, _, _ in held}
        assert len(held) == 2 * new
    assert ends[600] == ends[2000]
    assert sizes[600] == sizes[2000]
    assert len(sizes[600]) == 2  # one size per method from the first step to the last


def test_an_answer_longer_than_the_model_takes_is_refused(kvcli: Any, tmp_path: Path) -> None:
    done = kvcli(
        "sweep", "--task", "tb_recall", "--method", "h2o", "--ratio", "0.5", "--decode-budget", 8, "--max-new-tokens",
        2000, "--limit", 1, "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 2 and "does not fit the model" in done.err
