"""What one process of bench measures: prompts, passes over a tiny model, memory, the search for the largest batch."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcli.attention.capture import Needs
from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import Row
from kvcli.cache.workspace import Workspace
from kvcli.engine import bench, bench_pass, bench_rows, measure
from kvcli.engine.bench import Job
from kvcli.engine.bench_pass import Measured, Pass
from kvcli.engine.meter import Meter, NoMemory, ProcessMemory, memory_of
from kvcli.engine.pool_rows import Cap, PoolRow
from kvcli.errors import KvcliError
from tests.engine.tiny import tiny_llama

MODEL = tiny_llama()
N = 96


def job(method: str = "snapkv", ratio: str | None = "0.3", **changes: Any) -> Job:
    given = {"batches": (1,), "prompt_tokens": N, "new_tokens": 6, "repeats": 2, **changes}
    return Job(model="tiny", method=method, ratio=ratio, **given)


def measured(method: str = "snapkv", ratio: str | None = "0.3", memory: Any = None, **changes: Any) -> Measured:
    return Measured(job(method, ratio, **changes), MODEL, memory or NoMemory())


@given(st.integers(bench.LEAST_PROMPT, 9000))
def test_regions_cover_the_prompt_with_eight_equal_shots(n):
    found = bench_pass.regions(n)
    assert [r.start for r in found] == [0, *(r.end for r in found[:-1])] and found[-1].end == n
    assert [r.kind for r in found] == ["special", "system", *["shot"] * 8, "question"]
    assert [r.index for r in found if r.kind == "shot"] == list(range(8))
    assert len({len(r) for r in found if r.kind == "shot"}) == 1 and all(len(r) for r in found)
    assert len(found[-1]) <= max(1, n // 64) + 7


def test_prompts_are_fixed_by_seed_and_row():
    one = bench_pass.prompt(50, 450, 1, seed=0, row=0)
    assert one == bench_pass.prompt(50, 450, 1, seed=0, row=0)
    assert len(one) == 50 and one[0] == 1 and all(0 <= t < 450 for t in one)
    others = [bench_pass.prompt(50, 450, None, seed=s, row=r) for s, r in ((0, 0), (0, 1), (1, 0))]
    assert others[0][1:] == one[1:] and others[0] != others[1] != others[2] != others[0]


@given(st.integers(133, 9000))
def test_a_fifth_of_a_prompt_has_room_for_a_shot(n):
    """Else shotkv at 0.2 would be measured without what it is about."""
    found = bench_pass.regions(n)
    kept = sum(len(r) for r in found if r.kind != "shot")
    assert kept + len(found[2]) <= int(0.2 * n + 0.5)


METHODS = (
    "full", "snapkv", "pyramidkv", "h2o", "shotkv", "random", "streaming_llm", "streaming_llm:rerotate=true", "adakv",
    "kivi", "quant", "think", "lowrank", "minicache", "adakv+kivi:bits=4", "h2o+merge",
    "quest:tokens=16,page=4,least=1,dense_layers=1",
)  # fmt: skip


def greedy(ids: list[int], steps: int) -> list[int]:
    """Tokens of the model's own generation with nothing evicted."""
    out = MODEL.hf.generate(
        torch.tensor([ids]), max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_full_cache_generates_what_the_model_generates(batch):
    one = measured("full", "1")
    done = one.once(batch, 6)
    for row, tokens in enumerate(done.tokens):
        ids = bench_pass.prompt(N, MODEL.hf.config.vocab_size, one.first, 0, row)
        assert tokens == greedy(ids, 7)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_batch_generate_what_they_generate_alone(method):
    """Compressed on arrival and joined, a row goes on as it does when its cache is built from the dense prefill."""
    three = measured(method).once(3, 6)
    alone = measured(method).once(1, 6)
    assert three.tokens[0] == alone.tokens[0]
    assert len({tuple(t) for t in three.tokens}) > 1, "the prompts differ"
    assert three.payload == pytest.approx(alone.payload, rel=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_that_lets_go_of_its_sources_is_the_cache_of_the_engine(method):
    def logits(make: Any) -> torch.Tensor:
        one = measured(method)
        held = one._compressed(0, 1, Meter(MODEL.device, NoMemory()))
        with torch.inference_mode():
            cache = make([held.row], one.build)
        return MODEL.step(torch.tensor([[5]]), torch.tensor([[held.end]]), cache)

    def engine(rows: list[Row], build: Any) -> CompressedCache:
        return build(rows, [2], Workspace())

    ours = logits(lambda rows, build: bench_rows.joined(rows, 2, build))
    torch.testing.assert_close(ours, logits(engine), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 2])
def test_building_a_cache_holds_no_more_than_one_layer_twice(batch, monkeypatch):
    one = measured("full", "1")
    rows = [one._compressed(i, batch, Meter(MODEL.device, NoMemory())).row for i in range(batch)]
    sources = [[weakref.ref(row.keys[layer].untyped_storage()) for row in rows] for layer in range(3)]
    swap, alive = bench_rows.Draining.swap, []

    def counting(self: Any, layer: int, like: torch.Tensor, *shapes: Any) -> Any:
        buffers = swap(self, layer, like, *shapes)
        del like
        alive.append([all(row.keys[i] is not None for row in rows) for i in range(3)])
        return buffers

    monkeypatch.setattr(bench_rows.Draining, "swap", counting)
    cache = bench_rows.joined(rows, 4)
    assert alive == [[True] * 3, [False, True, True], [False, False, True]]
    assert sources and all(k is None for row in rows for k in row.keys)
    room = sum(h * w for h, w in MODEL.shapes.dims) * (N + 4) * 4
    assert cache.nbytes() == batch * room, "buffers of exactly the size asked for"


def test_a_shrunk_row_holds_only_what_was_kept():
    ragged = [torch.tensor([0, 3, 9]), torch.tensor([9])]
    keys = torch.arange(2 * 10 * 4.0).view(2, 10, 4)
    row = Row([keys] * 3, [keys + 1] * 3, [ragged, torch.tensor([1, 9]), torch.tensor([[0, 9], [8, 9]])])
    row.keys, row.values = list(row.keys), list(row.values)
    held = bench_rows.Held(row, torch.tensor([0]), 10, 0, frozenset())
    whole = CompressedCache([Row([keys] * 3, [keys + 1] * 3, row.kept)], 2)
    held.shrink()
    assert [k.shape[1] for k in row.keys] == [4, 2, 2]  # heads of 3 and 1 pairs, one behind the other
    small = CompressedCache([row], 2)
    for a, b in zip(small.layers, whole.layers, strict=True):
        assert torch.equal(a._keys, b._keys) and torch.equal(a._values, b._values)


def test_a_transform_s_row_holds_nothing_of_the_pairs_it_was_made_of():
    """Else the memory it saves would not be free while the next prompt is read."""
    seen: list[Any] = []
    formed = Measured._formed

    def watching(self: Any, ctx: Any, *rest: Any) -> Any:
        seen.extend(weakref.ref(x) for x in (*ctx.keys, *ctx.values))
        return formed(self, ctx, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measured, "_formed", watching)
        held = measured("kivi", None)._compressed(0, 1, Meter(MODEL.device, NoMemory()))
    gc.collect()
    assert seen and all(ref() is None for ref in seen)
    assert not any(x.numel() for x in (*held.row.keys, *held.row.values))
    assert 0 < held.payload < measured().full_bytes / 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["snapkv", "kivi", "minicache", "lowrank", "quest"])
def test_copies_of_a_row_are_rows_of_their_own(method):
    one = measured(method)
    copied, real = one.once(4, 6, clones=True), one.once(2, 6)
    assert copied.tokens == [real.tokens[0]] * 3 + [one.once(4, 6).tokens[3]]
    apart = 0.01 if method == "minicache" else 0  # how many tokens it merges depends on the prompt
    assert copied.alloc == pytest.approx(real.alloc, rel=apart) and copied.end == pytest.approx(real.end, rel=apart)


@pytest.mark.parametrize("method", ["adakv", "headless", "h2o"])
def test_slots_that_hold_no_pair_yet_hold_numbers(method):
    """What is read with weight zero must not be NaN, whatever lay there before."""
    rows = [torch.arange(4), torch.arange(9)] if method == "headless" else [[torch.arange(3), torch.arange(9)]] * 2
    x = torch.ones(2, 9, 4)
    held = [Row([x], [x], [form]) for form in rows]
    if method == "h2o":
        held = [PoolRow([x], [x], [torch.arange(9)], n=9, cap=Cap(False, Decimal(9), Decimal(1)), state=[{}])] * 2
    memory = bench_rows.Draining(held, lambda: None)
    like = torch.full((1,), float("nan"))
    for made in memory.swap(0, like, (2, 2, 64, 4), (2, 2, 64, 4)):
        assert not made.any()


def test_what_a_form_still_grows_by_is_counted_in_passes_of_few_steps():
    scripted = Scripted(*[100] * 99)
    one = measured("kivi", None, memory=scripted, new_tokens=40)
    before, whole, after = one.once(2, 2), one.once(2, 40), one.once(2, 2, weigh=True)
    assert before.alloc < whole.alloc == after.alloc
    assert whole.peaks["decode"] == after.peaks["decode"] == 100 + 2 * whole.alloc
    assert (
        measured("quest", None, new_tokens=40).once(2, 2).alloc == measured("full", "1", new_tokens=40).once(2, 2).alloc
    )


def test_a_layer_written_out_is_told_from_what_is_stored():
    done = measured("kivi:bits=4,group=8,residual=8", None).once(2, 6)
    heads, width = MODEL.shapes.dims[0]
    assert done.buffer == heads * width * (N + 6) * 4
    stored = done.alloc - done.buffer
    assert 0 < stored < 0.7 * heads * width * (N + 6) * 4 * MODEL.shapes.layers
    assert measured("snapkv").once(2, 6).buffer == 0


def test_a_reader_frees_nothing_and_says_so():
    one = measured("quest:tokens=16,page=4,least=1,dense_layers=1", None)
    full, record = measured("full", "1").once(1, 6), measure._measured(one, 1, None, lambda text: None)
    assert record["flags"] == ["simulated"] and record["measured_ratio"] == 1
    assert record["alloc_bytes"] == full.alloc
    assert record["kv_bytes"]["end"] == full.end
    assert 0 < record["kv_bytes"]["read"] < 0.9 * full.end


def test_the_record_of_a_stored_form_has_its_bytes():
    record = measure._measured(measured("kivi", None), 2, None, lambda text: None)
    sizes = record["kv_bytes"]
    assert record["status"] == "ok" and sizes["read"] is None and record["buffer_bytes"] > 0
    assert 0 < sizes["kept"] < sizes["end"] < sizes["full"]
    assert record["measured_ratio"] == round(sizes["kept"] / sizes["full"], 6)


def test_a_model_that_lacks_what_a_method_needs_is_a_message(monkeypatch):
    monkeypatch.setattr(measure.loader, "load_weights", lambda *_, **__: None)
    monkeypatch.setattr(measure, "Model", lambda *_, **__: bare)
    bare = tiny_llama()
    bare.rope = None
    with pytest.raises(KvcliError, match="lowrank cannot run on tiny: it lacks rotary positions"):
        measure.measure(dataclasses.replace(job("lowrank", None), model="testbed"), lambda message: None)


@pytest.mark.parametrize("method", ["snapkv:window=8", "h2o", "shotkv:queries=question", "streaming_llm"])
def test_a_prefill_captures_what_its_method_needs_and_nothing_else(method, monkeypatch):
    asked = []
    prefill = type(MODEL).prefill
    monkeypatch.setattr(
        type(MODEL), "prefill", lambda self, ids, needs, *rest: asked.append(needs) or prefill(self, ids, needs, *rest)
    )
    one = measured(method)
    one.once(2, 2)
    assert asked == [Needs.of(one.method.needs())] * 2


def test_methods_that_prefill_or_read_on_their_own_are_measured_too():
    pruned = measured("pyramidinfer", "0.7").once(2, 2)
    assert pruned.seconds["select"] == 0 and 0.5 < pruned.payload / measured().full_bytes < 0.9
    repeated = measured("kvzip", "0.5", prompt_tokens=64).once(1, 2)
    assert repeated.payload == pytest.approx(measured(prompt_tokens=64).full_bytes * 0.5, rel=0.05)


def test_figures_of_a_pass_are_sums_of_what_was_timed():
    done = measured().once(2, 6)
    figures = done.figures()
    assert len(done.steps) == 6 and all(v > 0 for v in figures.values())
    assert figures["compress"] == done.seconds["select"] + done.seconds["build"]
    assert figures["first_token"] == figures["prefill"] + figures["compress"] + done.steps[0]
    assert figures["per_token"] == np.median(done.steps[1:])
    assert figures["per_token_p90"] == pytest.approx(np.quantile(done.steps[1:], 0.9))
    assert figures["decode"] <= done.seconds["decode"]
    assert done.rate == pytest.approx(2 * 5 / sum(done.steps[1:]))
    assert done.cpu_share > 0


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_are_numpy_s(values, share):
    assert bench_pass.quantile(sorted(values), share) == pytest.approx(np.quantile(values, share), abs=1e-9)


class Scripted:
    """A memory whose peaks are given."""

    source, retains = "scripted", False

    def __init__(self, *peaks: int) -> None:
        self.peaks, self.log = list(peaks), []

    def now(self) -> int:
        return 100

    def reset(self) -> None:
        self.log.append("reset")

    def peak(self) -> int:
        self.log.append("peak")
        return self.peaks.pop(0)

    def settle(self) -> None:
        self.log.append("settle")


def test_a_meter_adds_seconds_and_takes_the_largest_peak():
    meter = Meter(torch.device("cpu"), Scripted(7, 3, 5))
    for name in ("prefill", "prefill", "decode"):
        with meter.phase(name):
            pass
    assert meter.peaks == {"prefill": 7, "decode": 5}
    assert set(meter.seconds) == {"prefill", "decode"} and min(meter.seconds.values()) > 0
    assert meter.memory.log == ["reset", "peak"] * 3


def test_timed_passes_do_not_give_memory_back_and_passes_for_memory_do():
    scripted = Scripted(*range(1, 20))
    measured(memory=scripted).once(1, 2)
    assert "settle" not in scripted.log
    measured(memory=scripted).once(1, 2, weigh=True)
    assert scripted.log.count("settle") == 2 + 3, "before it, with each layer, before decoding"


def test_the_decode_peak_counts_a_cache_that_was_not_yet_written():
    done = measured("full", "1", memory=Scripted(*[100] * 8), new_tokens=300).once(1, 2)
    assert done.peaks["decode"] == 100 + done.alloc
    assert done.above_idle == done.alloc


def test_the_peak_of_a_process_rises_with_a_tensor_and_falls_after_it():
    memory = memory_of(torch.device("cpu"))
    if not isinstance(memory, ProcessMemory):
        pytest.skip("this system lets no process reset its peak")
    size = 64 << 20
    memory.settle()
    meter, before = Meter(torch.device("cpu"), memory), memory.now()
    with meter.phase("large"):
        large = torch.ones(size // 4)
        del large
    memory.settle()  # a tensor that found its room in the heap stays there when it is freed (`Memory.retains`)
    with meter.phase("small"):
        pass
    assert meter.peaks["large"] - before == pytest.approx(size, rel=0.1)
    assert meter.peaks["small"] - before < size / 4


def test_the_full_cache_is_not_held_twice():
    """Of 24 rows: else the largest batch of `full` would be half of what it is, and every method twice as good."""
    if not isinstance(memory_of(torch.device("cpu")), ProcessMemory):
        pytest.skip("this system lets no process reset its peak")
    one = Measured(job("full", "1", prompt_tokens=480, new_tokens=20), tiny_llama(layers=10), ProcessMemory())
    one.once(24, 2, clones=True)
    done = one.once(24, 2, weigh=True, clones=True)
    assert done.idle is not None
    assert done.peaks["build"] - done.idle < 1.4 * 24 * done.alloc


def test_a_compressed_cache_shows_in_the_decode_peak():
    """The cache of 8 rows is a few MiB here: far above what the process's own figures wobble."""
    if not isinstance(memory_of(torch.device("cpu")), ProcessMemory):
        pytest.skip("this system lets no process reset its peak")

    def decode_peak(method: str, ratio: str) -> int:
        one = measured(method, ratio, memory=ProcessMemory(), prompt_tokens=480, new_tokens=20)
        one.once(1, 2)
        done = one.once(24, 2, weigh=True, clones=True)
        assert done.idle is not None
        return done.peaks["decode"] - done.idle

    full, small = decode_peak("full", "1"), decode_peak("streaming_llm", "0.1")
    assert small < 0.4 * full


@given(st.integers(0, 300), st.integers(1, 256))
def test_the_largest_batch_is_found_in_few_tries(room, most):
    asked: list[int] = []

    def fits(batch: int) -> bool:
        asked.append(batch)
        return batch <= room

    assert measure.largest(fits, most) == min(room, most)
    assert len(asked) == len(set(asked)) <= 2 * math.log2(max(2, min(room, most))) + 3
    assert max(asked) <= max(1, min(2 * max(room, 1), most)), "never more than twice what fits"


def test_the_largest_batch_of_a_model_stays_within_the_memory_given():
    """The memory is a fake that counts the rows of the cache; the passes are real."""

    class Rows(Scripted):
        def peak(self) -> int:
            return 100 + 10 * batch

    one, said = measured("snapkv", "0.3", memory=Rows(), new_tokens=3, repeats=2), []
    once, batch = one.once, 0

    def counting(rows: int, steps: int, **how: Any) -> Pass:
        nonlocal batch
        batch = rows
        done = once(rows, steps, **how)
        done.peaks["decode"] = 100 + 10 * rows  # without the real cache's bytes
        return done

    one.once = counting  # type: ignore[method-assign]
    record = measure._measured(one, "max", 55, said.append)
    assert (record["status"], record["batch"], record["memory"]["limit"]) == ("ok", 5, 55)
    assert [s for s in said if s.startswith("does")] == [f"does a batch of {n} fit?" for n in (1, 2, 4, 8, 6, 5)]
    none = measure._measured(one, "max", 5, said.append)
    assert none == {"status": "error", "error": "not even one row fits within 0 MiB"}


@pytest.mark.slow
def test_running_out_of_memory_ends_a_batch_and_not_the_process():
    one = measured("snapkv", "0.3", new_tokens=3, repeats=1)
    once = one.once

    def limited(rows: int, steps: int, **how: Any) -> Pass:
        if rows > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return once(rows, steps, **how)

    one.once = limited  # type: ignore[method-assign]
    assert measure._measured(one, "max", None, lambda text: None)["batch"] == 5
    failed = measure._measured(one, 6, None, lambda text: None)
    assert failed == {"status": "error", "error": "out of memory with a batch of 6"}
    assert measure._measured(one, 2, None, lambda text: None)["status"] == "ok"


def test_a_batch_that_only_seemed_to_fit_gives_way_to_a_smaller_one():
    assert measure.shrinking(lambda batch: batch if batch <= 90 else None, 100) == 90
    assert measure.shrinking(lambda batch: None, 100) is None


def test_what_a_failed_try_held_is_free_again():
    seen: list[Any] = []

    def run() -> None:
        tensor = torch.zeros(10)
        seen.append(weakref.ref(tensor))
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    assert measure.attempt(run, lambda: seen.append(seen[0]() is None)) is None
    gc.collect()
    assert seen[1] is True


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def run() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        measure.attempt(run, lambda: None)
    assert measure.ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
