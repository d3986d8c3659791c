"""A batch holds what it is counted to hold; where memory runs out, smaller batches give the same records."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import Row
from kvcli.cache.workspace import SPARE, Workspace
from kvcli.config import SweepConfig
from kvcli.engine import fidelity
from kvcli.engine.asking import Asker
from kvcli.engine.memory import Room, is_out_of_memory
from kvcli.engine.pool import PoolCache
from kvcli.engine.pool_rows import Cap, PoolRow
from kvcli.engine.prefilling import Prefiller
from kvcli.engine.runner import Options, Outcome
from kvcli.methods import catalog
from kvcli.models.wrapper import Model
from tests.engine import tiny
from tests.engine.asks import exact_model, of_length, sweep, watch

CONFIG = SweepConfig(
    methods=("snapkv", "pyramidkv", "h2o"), ratios=("0.3",), first_token=("compressed", "prefill"),
    decode_ratios=("off", "0.5"),
)  # fmt: skip
ROWS = 5 * 2 * (1 + 1 + 1 + 2)
OPTIONS = Options(8, keep_maps=99, fidelity=True, memory=1 << 22)


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with exact_model() as model:
        yield model


@pytest.fixture(scope="module")
def prompts() -> tiny.PromptSet:
    return of_length(tiny.prompt_set([50, 21, 64, 37, 45]), 6)


@pytest.fixture(scope="module")
def truth(exact: Model, prompts: tiny.PromptSet) -> dict[tuple[str, str], dict[str, Any]]:
    sink, outcome = sweep(exact, CONFIG, prompts, OPTIONS)
    assert (len(sink.records), outcome.errors, outcome.halved) == (ROWS, 0, [])
    return sink.by_key()


def assert_same(sink: tiny.Memory, truth: dict[tuple[str, str], dict[str, Any]]) -> None:
    """The same records; figures that are rounded to 8 digits within the last one."""
    assert len(sink.records) == len(truth)
    for key, record in sink.by_key().items():
        a, b = tiny.same(record), tiny.same(truth[key])
        assert a.pop("fidelity") == pytest.approx(b.pop("fidelity"), abs=2e-8)
        assert a == b


# --- what a batch is counted to hold ----------------------------------------------------------------------------------


def made_row(lengths: list[list[int]], n: int = 40, dim: int = 8) -> Row:
    """lengths: per layer the pairs of each of two KV heads."""
    kept = [[torch.arange(count) for count in layer] for layer in lengths]
    states = [torch.randn(2, n, dim) for _ in lengths]
    return Row(states, states, kept)


def made_pool_row(start: int, cap: Cap, interval: int, n: int = 40) -> PoolRow:
    states = [torch.randn(2, n, 8) for _ in range(2)]
    state = [{"received": torch.rand(4, n)} for _ in range(2)]
    return PoolRow(states, states, [torch.arange(n - start, n)] * 2, None, n, cap, state, interval)


def test_the_tally_of_caches_that_grow_is_their_real_size() -> None:
    shapes = [[[3, 9], [20, 1]], [[7, 7], [7, 7]], [[30, 2], [1, 1]], [[1, 1], [25, 24]]]
    rows, rooms = [made_row(s) for s in shapes], [4, 9, 1, 2]
    for count in range(1, 5):
        cache = CompressedCache(rows[:count], rooms[:count])
        tally = Room(cache.nbytes()).tally()
        for row, room in zip(rows[: count - 1], rooms, strict=False):
            tally.add(row, room)
        assert tally.fits(rows[count - 1], rooms[count - 1])
        less = Room(cache.nbytes() - 1).tally()
        for row, room in zip(rows[: count - 1], rooms, strict=False):
            less.add(row, room)
        assert not less.fits(rows[count - 1], rooms[count - 1])


def test_the_tally_of_caches_that_evict_is_their_real_size() -> None:
    h2o = catalog.build("h2o")
    caps = [
        Cap(False, Decimal(12), ratio=Decimal("0.3")), Cap(False, Decimal(20), size=4),
        Cap(False, Decimal(9), fixed=True),
        Cap(True, Decimal(15), size=6), Cap(True, Decimal(5), ratio=Decimal("0.5"), least=3),
    ]  # fmt: skip
    for separate in (False, True):
        rows = [
            made_pool_row(int(cap.prompt), cap, interval)
            for cap, interval in zip(caps, (1, 4, 2, 1, 3), strict=True)
            if cap.separate == separate
        ]
        rooms = [30, 12, 20][: len(rows)]
        cache = PoolCache(h2o, 4, rows, rooms, Workspace())
        tally = Room(cache.nbytes()).tally()
        for row, room in zip(rows[:-1], rooms, strict=False):
            tally.add(row, room)
        assert tally.fits(rows[-1], rooms[-1])
        less = Room(cache.nbytes() - 1).tally()
        for row, room in zip(rows[:-1], rooms, strict=False):
            less.add(row, room)
        assert not less.fits(rows[-1], rooms[-1])


def test_a_reformed_cache_has_the_size_that_was_tallied() -> None:
    rows = [made_row([[3, 9], [20, 1]]), made_row([[30, 30], [2, 2]]), made_row([[1, 1], [25, 25]])]
    cache = CompressedCache(rows[:2], [4, 3])
    cache.reform([0], [rows[2]], [7])
    tally = Room(cache.nbytes()).tally()
    tally.add(rows[0], 4)
    assert tally.fits(rows[2], 7)
    assert cache.nbytes() == CompressedCache([rows[0], rows[2]], [4, 7]).nbytes()
    cache.reform([1], [], [])
    assert cache.nbytes() == CompressedCache([rows[2]], [7]).nbytes()


def test_the_tally_counts_keys_and_values_of_other_widths() -> None:
    row = Row([torch.zeros(2, 10, 8)], [torch.zeros(2, 10, 24)], [torch.arange(10)])
    cache = CompressedCache([row, row], 5)
    assert cache.nbytes() == 2 * 2 * 15 * (8 + 24) * 4
    tally = Room(cache.nbytes()).tally()
    tally.add(row, 5)
    assert tally.fits(row, 5)
    assert not tally.fits(row, 6)


def test_rows_are_limited_by_number_too() -> None:
    row = made_row([[3, 3]])
    tally = Room(None, 2).tally()
    for _ in range(2):
        assert tally.fits(row, 1)
        tally.add(row, 1)
    assert not tally.fits(row, 1)
    assert Room(7, 9).halved(5) == Room(7, 2)
    assert Room(7).halved(1) == Room(7, 1)


def test_a_workspace_holds_a_little_more_than_the_largest_cache_and_one_layer() -> None:
    memory, largest = Workspace(), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        count = int(torch.randint(1, 9, (), generator=generator))
        lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
        cache = CompressedCache([made_row([[x, x]] * 4) for x in lengths], 3, memory)
        largest = max(largest, cache.nbytes())
        assert memory.nbytes() <= largest * (1 + 1 / 4) * (1 + 1 / SPARE) + 64


def test_batches_of_a_sweep_stay_within_their_bytes(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, room = watch(exact, monkeypatch), 150_000
    sink, outcome = sweep(exact, CONFIG, prompts, dataclasses.replace(OPTIONS, memory=room))
    assert outcome.halved == []
    assert_same(sink, truth)
    pair = 2 * (16 + 16) * 8
    sizes = [rows * sum(slots) * pair for rows, slots in zip(seen.rows, seen.slots, strict=True)]
    assert max(rows for rows in seen.rows) > 2
    assert max(size for size, rows in zip(sizes, seen.rows, strict=True) if rows > 1) <= room


# --- where it runs out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("deterministic", [False, True])
def test_steps_of_fewer_rows_give_the_same_records(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch, most: int,
    deterministic: bool,
) -> None:  # fmt: skip
    seen = watch(exact, monkeypatch, most)
    sink, outcome = sweep(exact, CONFIG, prompts, dataclasses.replace(OPTIONS, deterministic=deterministic))
    assert outcome.errors == 0
    assert_same(sink, truth)
    assert max(seen.rows) > most
    failed = [rows for rows in seen.rows if rows > most]
    assert len(outcome.halved) == len(failed)
    assert all("-d00" in what and "rows" in what for what in outcome.halved)


@pytest.mark.parametrize("most", [1, 3])
def test_caches_of_fewer_rows_give_the_same_records(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Building and reforming alike."""
    tensors = CompressedCache._tensors

    def limited(self: CompressedCache, number: int, like: Any, rows: int, slots: int) -> list[Tensor]:
        if rows > most and number == 1:
            raise torch.OutOfMemoryError("no memory")
        return tensors(self, number, like, rows, slots)

    monkeypatch.setattr(CompressedCache, "_tensors", limited)
    sink, outcome = sweep(exact, CONFIG, prompts, OPTIONS)
    assert outcome.errors == 0 and outcome.halved
    assert_same(sink, truth)


def test_rows_that_ended_before_a_cache_did_not_fit_are_not_lost(
    exact: Model, prompts: tiny.PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some answers end with the token the prefill gave, which needs no cache; they are answered all the same."""
    monkeypatch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset(range(0, 500, 2)))
    wanted, _ = sweep(exact, CONFIG, prompts, OPTIONS)
    ended = [r for r in wanted.records if r["n_new"] == 1 and r["first_token"] == "prefill"]
    assert 3 < len(ended) < len([r for r in wanted.records if r["first_token"] == "prefill"]) - 3
    tensors = CompressedCache._tensors

    def limited(self: CompressedCache, number: int, like: Any, rows: int, slots: int) -> list[Tensor]:
        if rows > 2:
            raise torch.OutOfMemoryError("no memory")
        return tensors(self, number, like, rows, slots)

    monkeypatch.setattr(CompressedCache, "_tensors", limited)
    sink, outcome = sweep(exact, CONFIG, prompts, OPTIONS)
    assert outcome.errors == 0 and outcome.halved
    assert_same(sink, wanted.by_key())


def test_memory_that_runs_out_while_others_generate_is_found_in_their_midst(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, at every step number in turn: rows that have ended are recorded once, the others start again."""
    seen = watch(exact, monkeypatch)
    sweep(exact, CONFIG, prompts, OPTIONS)
    steps, step = len(seen.rows), exact.step
    for at in range(0, steps, 3):
        calls = 0

        def once(*args: Any, at: int = at) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise torch.OutOfMemoryError("just now")
            return step(*args)

        monkeypatch.setattr(exact, "step", once)
        sink, outcome = sweep(exact, CONFIG, prompts, dataclasses.replace(OPTIONS, fidelity=False))
        assert outcome.errors == 0
        assert {k: {**tiny.same(r), "fidelity": None} for k, r in sink.by_key().items()} == {
            k: {**tiny.same(r), "fidelity": None} for k, r in truth.items()
        }
        assert len(outcome.halved) == (at < calls)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_prompts_are_read_in_smaller_batches(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    prefill = exact.prefill

    def limited(ids: list[list[int]], *args: Any) -> Any:
        if len(ids) > most:
            raise torch.OutOfMemoryError("no memory")
        return prefill(ids, *args)

    monkeypatch.setattr(exact, "prefill", limited)
    sink, outcome = sweep(exact, CONFIG, prompts, OPTIONS)
    assert outcome.errors == 0
    assert_same(sink, truth)
    assert outcome.halved[0] == "g0-any-s3-p00000: 4 prompts did not fit in memory together, went on in smaller batches"
    assert len(outcome.halved) == {1: 3, 2: 1, 3: 1}[most]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_predictions_are_compared_in_smaller_batches(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    distances = fidelity.distances

    def limited(model: Model, asks: list[Any], *args: Any, **kw: Any) -> Any:
        if len(asks) > most:
            raise torch.OutOfMemoryError("no memory")
        return distances(model, asks, *args, **kw)

    monkeypatch.setattr(fidelity, "distances", limited)
    sink, outcome = sweep(exact, CONFIG, prompts, OPTIONS)
    assert outcome.errors == 0 and outcome.halved
    assert_same(sink, truth)


def test_predictions_that_never_fit_are_null_and_said_so(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(fidelity, "distances", never)
    sink, outcome = sweep(exact, CONFIG, prompts, OPTIONS)
    assert outcome.errors == 0
    for key, record in sink.by_key().items():
        wanted = dict(truth[key]["fidelity"])
        if record["method"] != "full":
            wanted.update(dict.fromkeys(("kl", "top1", "nll", "tokens")))
        assert record["fidelity"] == wanted
        assert record["output_ids"] == truth[key]["output_ids"]
    assert any("stay null" in what for what in outcome.halved)


def test_a_row_whose_predictions_never_fit_leaves_the_others_their_figures(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = fidelity.distances

    def limited(model: Model, asks: list[Any], *args: Any, **kw: Any) -> Any:
        if any(ask.tag.cell.method == "h2o" and ask.tag.context.sample_id == "s2" for ask in asks):
            raise torch.OutOfMemoryError("no memory")
        return distances(model, asks, *args, **kw)

    monkeypatch.setattr(fidelity, "distances", limited)
    sink, outcome = sweep(exact, CONFIG, prompts, OPTIONS)
    assert outcome.errors == 0 and outcome.halved
    wanted = {key: dict(record) for key, record in truth.items()}
    for record in wanted.values():
        if (record["method"], record["sample_id"]) == ("h2o", "s2"):
            record["fidelity"] = {**record["fidelity"], **dict.fromkeys(("kl", "top1", "nll", "tokens"))}
    assert_same(sink, wanted)


@pytest.mark.parametrize("at", [1, 2, 9, 20])
@pytest.mark.parametrize("times", [1, 2])
def test_selections_that_do_not_fit_beside_the_batch_are_made_again(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch, at: int, times: int
) -> None:
    """A method's own tensors ran out of memory: no row may be lost."""
    ask, calls = Asker.ask, 0

    def limited(self: Asker, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if at <= calls < at + times:
            raise torch.OutOfMemoryError("no memory")
        return ask(self, *args)

    monkeypatch.setattr(Asker, "ask", limited)
    sink, outcome = sweep(exact, CONFIG, prompts, dataclasses.replace(OPTIONS, fidelity=False))
    assert len(sink.records) == ROWS
    failed = [r for r in sink.records if r["status"] == "error"]
    assert len(failed) == outcome.errors <= (times if at == 1 else 0)  # nothing is beside the first
    for record in sink.records:
        if record["status"] == "ok":
            assert record["output_ids"] == truth[record["cell_id"], record["sample_id"]]["output_ids"]


def never_fits(monkeypatch: pytest.MonkeyPatch, which: Callable[[Any, int], bool]) -> None:
    """Selections of some (cell, sample) always run out of memory."""
    ask = Asker.ask

    def limited(self: Asker, prompts: Any, sample: int, cell: Any, ready: Any, *more: Any) -> Any:
        if which(cell, int(ready.context.sample_id[1:])):
            raise torch.OutOfMemoryError("no memory at all")
        return ask(self, prompts, sample, cell, ready, *more)

    monkeypatch.setattr(Asker, "ask", limited)


def test_a_row_whose_selection_never_fits_is_its_own_error(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    never_fits(monkeypatch, lambda cell, sample: cell.method == "snapkv" and sample == 2)
    sink, outcome = sweep(exact, CONFIG, prompts, OPTIONS)
    only_these_failed(sink, outcome, truth, lambda r: r["method"] == "snapkv" and r["sample_id"] == "s2")


def only_these_failed(
    sink: tiny.Memory, outcome: Outcome, truth: dict[Any, Any], which: Callable[[dict[str, Any]], bool]
) -> None:
    assert set(sink.by_key()) == set(truth)
    failed = [r for r in sink.records if r["status"] == "error"]
    assert failed and all("no memory" in r["error"] for r in failed)
    assert {(r["cell_id"], r["sample_id"]) for r in failed} == {key for key, r in truth.items() if which(r)}
    assert outcome.errors == len(failed) == sum(outcome.messages.values())
    for key, record in sink.by_key().items():
        if record["status"] == "ok":
            a, b = tiny.same(record), tiny.same(truth[key])
            assert a.pop("fidelity") == pytest.approx(b.pop("fidelity"), abs=2e-8)
            assert a == b


def test_a_prompt_that_never_fits_is_an_error_of_all_its_cells(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Prefiller.run

    def limited(self: Prefiller, prompts: Any, batch: Any, rows: Any, names: Any) -> Any:
        if 2 in [batch.start + row for row in rows]:
            raise torch.OutOfMemoryError("no memory for this prompt")
        return run(self, prompts, batch, rows, names)

    monkeypatch.setattr(Prefiller, "run", limited)
    sink, outcome = sweep(exact, CONFIG, prompts, OPTIONS)
    only_these_failed(sink, outcome, truth, lambda r: r["sample_id"] == "s2")


def test_a_row_whose_cache_never_fits_is_its_own_error(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the full caches of the longest prompt are that long."""
    tensors = CompressedCache._tensors

    def limited(self: CompressedCache, number: int, like: Any, rows: int, slots: int) -> list[Tensor]:
        if slots > 60:
            raise torch.OutOfMemoryError("no memory")
        return tensors(self, number, like, rows, slots)

    monkeypatch.setattr(CompressedCache, "_tensors", limited)
    sink, outcome = sweep(exact, CONFIG, prompts, dataclasses.replace(OPTIONS, fidelity=False))
    nothing = dict.fromkeys(("kl", "top1", "nll", "tokens"))
    plain = {key: {**r, "fidelity": {**r["fidelity"], **nothing}} for key, r in truth.items()}
    for key, record in plain.items():
        if key[1] == "s2" and record["method"] != "full":  # nothing to be compared with
            record["fidelity"] = dict.fromkeys(record["fidelity"])
    only_these_failed(sink, outcome, plain, lambda r: r["method"] == "full" and r["sample_id"] == "s2")


def test_error_records_do_not_move_the_progress_beyond_its_end(
    exact: Model, prompts: tiny.PromptSet, truth: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, where a row that has a record already fails this time."""
    never_fits(monkeypatch, lambda cell, sample: cell.method == "snapkv" and sample == 2)
    done = {key for key, r in truth.items() if r["method"] == "snapkv"}
    told: list[tuple[int, int]] = []
    sink, outcome = sweep(
        exact, CONFIG, prompts, OPTIONS, sink=tiny.Memory(done=done), progress=lambda *x: told.append(x[:2])
    )
    assert set(sink.by_key()) == set(truth) - done
    assert outcome.errors == 0
    assert told[-1] == (ROWS, ROWS)
    assert all(a[0] <= b[0] <= ROWS for a, b in pairwise(told))


@pytest.mark.parametrize("where", ["step", "prefill"])
def test_what_did_not_fit_is_given_back_before_the_next_try(
    exact: Model, prompts: tiny.PromptSet, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The frames of the error hold the tensors of the failed attempt: while they are held, a real one fails again."""
    whole, held = getattr(exact, where), []

    def limited(first: Any, *args: Any) -> Any:
        alive = [tensor() for tensor in held]
        assert not any(tensor is not None for tensor in alive), "still there"
        if len(first) > 2:
            mine = torch.zeros(5)
            held.append(weakref.ref(mine))
            if where == "step":
                held.extend(weakref.ref(layer._keys) for layer in args[1].layers)
            raise torch.OutOfMemoryError("no memory")
        return whole(first, *args)

    monkeypatch.setattr(exact, where, limited)
    sink, outcome = sweep(exact, CONFIG, prompts, dataclasses.replace(OPTIONS, fidelity=False))
    assert (len(sink.records), outcome.errors) == (ROWS, 0)
    assert held and outcome.halved


def test_a_deterministic_batch_that_does_not_fit_goes_on_in_parts(
    exact: Model, prompts: tiny.PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a small share of a full cache: half of them are as many as the room had rows."""
    seen = watch(exact, monkeypatch, 4)
    config = SweepConfig(methods=("snapkv", "h2o"), ratios=("0.3",), full=False)

    def stop(progressed: bool) -> None:
        assert len(seen.rows) < 100, "it tries the same batch again and again"

    sink, outcome = sweep(exact, config, prompts, Options(4, deterministic=True), stop=stop)
    assert (len(sink.records), outcome.errors) == (10, 0)


# --- what running out looks like --------------------------------------------------------------------------------------


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as short:
        bytearray(1 << 60)
    assert is_out_of_memory(short.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError(1)):
        assert not is_out_of_memory(other)


# --- rows that hold more than their cap at the start ------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("axis", [{"cap": "fixed"}, {"decode_ratios": ("0.2",)}, {"decode_budgets": (2,)}])
def test_a_strict_window_above_the_budget_is_the_least_a_pool_holds(
    exact: Model, axis: dict[str, Any], interval: int
) -> None:
    """--strict-window keeps the paper's window, here 10 tokens, under a budget of 4."""
    prompts = of_length(tiny.prompt_set([50, 21]), 8)
    config = SweepConfig(
        methods=("scissorhands",), budgets=(4,), strict_window=True, decode_interval=interval, full=False, **axis
    )
    sink, outcome = sweep(exact, config, prompts, Options(8, strict_window=True, ignore_eos=True))
    assert (outcome.errors, len(sink.records)) == (0, 2)
    for record in sink.records:
        assert record["flags"] == ["over_budget"]
        assert record["kept"] == 10
        (pair,) = {record["kv_bytes"]["full"] // record["n_prompt"]}
        evicted_at = 7 - 7 % interval  # seven generated tokens are fed
        asked = 4 + {"cap": 0, "decode_ratios": round(0.2 * evicted_at), "decode_budgets": 2}[next(iter(axis))]
        assert asked < 10 and record["kv_bytes"]["end"] == pair * (10 + 7 - evicted_at)


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_generated_tokens_a_method_always_keeps_find_room(exact: Model, size: int) -> None:
    """shotkv:recent=4 keeps the newest and four more, whatever --decode-budget says; the prompt's part stays whole."""
    config = SweepConfig(methods=("shotkv:recent=4",), ratios=("0.4",), decode_budgets=(size,), full=False)
    prompts = of_length(tiny.prompt_set([50, 21, 64, 37]), 16)
    truth: dict[Any, Any] = {}
    for rows in (1, 4):
        sink, outcome = sweep(exact, config, prompts, Options(rows, ignore_eos=True), prefill_rows=rows)
        assert outcome.errors == 0
        for key, record in sink.by_key().items():
            pair = record["kv_bytes"]["full"] // record["n_prompt"]
            assert record["kv_bytes"]["end"] - record["kv_bytes"]["prefill"] == pair * max(5, size)
            assert truth.setdefault(key, tiny.same(record)) == tiny.same(record)
