"""What rows that evict while generating hold beside their pairs is what the planner and --dry-run count."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import Row
from kvcli.cache.workspace import Workspace
from kvcli.config import SweepConfig
from kvcli.engine.comparing import Comparer
from kvcli.engine.estimate import Sizes
from kvcli.engine.memory import Room, Tally
from kvcli.engine.peak import Peak
from kvcli.engine.pool import PoolCache
from kvcli.engine.pool_rows import Cap, PoolRow
from kvcli.engine.runner import Options
from kvcli.methods import catalog
from kvcli.models.profiles import HeadProfile, write_profile
from tests.engine import tiny
from tests.engine.asks import of_length, sweep
from tests.engine.test_estimate import run, session_of

DECODING = [name for name in catalog.own_names() if catalog.find(name).decoding]
SCORES = ((0.9, 0.8, 0.1, 0.0), (0.2, 0.3, 0.7, 0.6), (0.0, 0.05, 0.5, 0.4))
ONCE = ("facts", "beyond")
"""A few numbers per head of a row, whatever it holds."""


@dataclasses.dataclass
class Built:
    """Every batch that evicts: its rows with their room, and the cache made of them."""

    batches: list[tuple[PoolCache, Sequence[PoolRow], Sequence[int]]] = dataclasses.field(default_factory=list)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    seen, init = Built(), PoolCache.__init__

    def watched(self: PoolCache, method: Any, heads: int, rows: Any, room: Any, memory: Workspace) -> None:
        init(self, method, heads, rows, room, memory)
        seen.batches.append((self, rows, room))

    monkeypatch.setattr(PoolCache, "__init__", watched)
    return seen


@pytest.fixture(scope="module", params=[torch.float32, torch.float64])
def model(request: pytest.FixtureRequest) -> Any:
    made = tiny.tiny_llama(request.param)
    made.name = "testbed"
    return made


def text_of(name: str, folder: Path) -> str:
    if name != "duo_attention":
        return name
    write_profile(HeadProfile(SCORES), folder / "p.json")
    return f"duo_attention:sinks=2,recent=6,profile={folder / 'p.json'}"


def storage(cache: PoolCache) -> int:
    """Bytes of all tensors of a cache, however they are named, but for its clock."""
    found: dict[int, int] = {}

    def walk(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.nbytes if x._is_view() else x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            for value in x.values():
                walk(value)

    total = 0
    for layer in cache.layers:
        found.clear()
        for name, value in vars(layer.slots).items():
            if name not in ONCE:
                walk(value)
        total += sum(found.values()) + layer._keys.nbytes + layer._values.nbytes
    return total


def tallied(rows: Sequence[Row], rooms: Sequence[int], figures: bool = True) -> int:
    """Bytes that a batch is counted to hold: the smallest room it fits."""
    tally: Tally = Room(None, None, figures).tally()
    for row, room in zip(rows, rooms, strict=True):
        tally.add(row, room)
    return tally.rows * sum(slots * slot + once for slots, slot, once in tally.layers)


@pytest.mark.parametrize("name", DECODING)
def test_a_batch_holds_what_it_is_counted_to_hold(model: Any, built: Built, tmp_path: Path, name: str) -> None:
    """Every method that compresses generated tokens: real tensors, the tally, and what is said beforehand."""
    text, prompts = text_of(name, tmp_path), of_length(tiny.prompt_set([50, 21, 64, 37]), 12)
    config = SweepConfig(methods=(text,), ratios=("0.6",), decode_ratios=("0.5",), full=False)
    plan = tiny.plan_of(config, prompts)
    (cell,) = plan.cells.values()
    sink, outcome = sweep(model, config, prompts, Options(8, ignore_eos=True), plan=plan)
    assert (len(sink.records), outcome.errors) == (4, 0)
    assert built.batches
    for cache, rows, rooms in built.batches:
        assert cache.nbytes() == tallied(rows, rooms) == storage(cache)
        sizes = Sizes.of(model.hf.config)
        peak = Peak(sizes, model.dtype.itemsize, 1 << 30, {text: catalog.build(text)}, False)
        for row in rows:
            assert peak.beside(cell, row.n) == sum(row.beside(layer)[0] for layer in range(row.layers))
            assert peak.beside(cell, row.n) >= 3 * 2 * 8


def test_what_is_beside_the_pairs_by_hand(model: Any, built: Built, tmp_path: Path) -> None:
    """8 bytes of position for each of 2 KV heads; figures of 4 query heads, or of 2 KV heads, or of one ring."""
    exact = model.dtype.itemsize
    wanted = {
        "streaming_llm": 0, "tova": 0, "h2o": 4 * exact, "rkv:window=8": 4 * 8 * exact,
        "scissorhands:history=20": 2 * (3 + 4), "fastgen": 2 * (1 + exact), "pyramidinfer:context=8": 13 * exact,
    }  # fmt: skip
    prompts = of_length(tiny.prompt_set([64]), 4)
    for text, figures in wanted.items():
        built.batches.clear()
        sweep(
            model,
            SweepConfig(methods=(text,), ratios=("0.8",), decode_ratios=("0.5",), full=False),
            prompts,
            Options(8),
        )
        ((cache, rows, _),) = built.batches
        assert rows[0].beside(1) == (2 * 8 + figures, figures), text
        slots = cache.layers[1].slots.slots
        assert cache.layers[1].slots.nbytes() == slots * (16 + figures) + figures


def ring_row(kept: int, width: int, n: int = 40) -> PoolRow:
    """Whose figures are as wide as `width` voters."""
    pairs = [torch.randn(2, n, 8)] * 2
    state = [{"recent": torch.rand(1, n, width)}] * 2
    cap = Cap(False, Decimal(kept), size=4)
    facts = [{"recent": torch.full((2,), width)}] * 2
    return PoolRow(pairs, pairs, [torch.arange(n - kept, n)] * 2, None, n, cap, state, facts=facts)


def test_figures_are_padded_to_the_widest_of_the_batch() -> None:
    """The widest ring need not be that of the longest row."""
    method = catalog.build("pyramidinfer")
    rows = [ring_row(20, 3), ring_row(6, 17), ring_row(11, 5)]
    rooms = [4, 30, 9]
    cache = PoolCache(method, 4, rows, rooms, Workspace())
    assert cache.nbytes() == storage(cache) == tallied(rows, rooms)
    cache.reform([1], [rows[2]], [9])
    assert cache.nbytes() == storage(cache) == tallied([rows[1], rows[2]], [30, 9])


def test_figures_leave_room_for_fewer_rows() -> None:
    rows, rooms = [ring_row(20, 16)] * 8, [4] * 8
    pairs = CompressedCache([Row(r.keys, r.values, r.kept) for r in rows[:1]], [5]).nbytes()

    def fitting(room: Room) -> int:
        tally = room.tally()
        while tally.rows < 8 and tally.fits(rows[0], 4):
            tally.add(rows[0], 4)
        return tally.rows

    assert fitting(Room(8 * pairs, None, figures=False)) == 8
    counted = fitting(Room(8 * pairs))
    assert tallied(rows[:counted], rooms[:counted]) <= 8 * pairs < tallied(rows[: counted + 1], rooms[: counted + 1])
    assert 1 < counted < 6


@pytest.mark.parametrize("figures", [True, False])
def test_batches_of_a_sweep_stay_within_their_bytes(model: Any, monkeypatch: pytest.MonkeyPatch, figures: bool) -> None:
    """A folder of an earlier version goes on with the batches it had: their pairs alone stay within."""
    held: list[tuple[int, int, int]] = []
    advance = PoolCache.advance

    def watched(self: PoolCache, new: int) -> None:
        advance(self, new)
        rows = len(self.layers[0].slots.most)
        held.append((rows, CompressedCache.nbytes(self), self.nbytes()))

    monkeypatch.setattr(PoolCache, "advance", watched)
    config = SweepConfig(methods=("rkv:window=8",), ratios=("0.3", "0.6"), decode_ratios=("0.5",), full=False)
    prompts = of_length(tiny.prompt_set([50, 21, 64, 37, 45]), 12)
    room = 100_000 * (model.dtype.itemsize // 4)
    options = Options(8, ignore_eos=True, memory=room, figures=figures)
    sink, outcome = sweep(model, config, prompts, options, prefill_rows=8)
    assert (len(sink.records), outcome.errors, outcome.halved) == (10, 0, [])
    together = [(pairs, whole) for rows, pairs, whole in held if rows > 1]
    assert max(pairs for pairs, _ in together) <= room
    assert (max(whole for _, whole in together) <= room) == figures


def test_a_folder_of_an_earlier_version_keeps_its_batches(tmp_path: Path) -> None:
    """`figures` is not in its run.json: pairs alone are counted, with the bytes it has, until --memory is given."""
    folder, settings = tmp_path / "run", {"methods": ("h2o",), "limit": 3, "memory": "1M"}
    first = session_of(folder, **settings)
    assert first.figures and first.run["batching"]["figures"]
    run(first)
    file = folder / "run.json"
    written = json.loads(file.read_text())
    del written["batching"]["figures"]
    file.write_text(json.dumps(written))
    del settings["memory"]
    for _ in range(2):
        again = session_of(folder, **{**settings, "limit": 5})
        assert not again.figures
        assert again.run["batching"] == {**written["batching"], "figures": False}
        assert again.plan.batches[: len(first.plan.batches)] == first.plan.batches
        run(again)
    assert session_of(folder, **settings, memory="1M").figures


@dataclasses.dataclass
class Seen:
    figures: int = 0
    comparison: int = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The most that pools held beside the pairs, and that the comparison held: its workspace, full's predictions."""
    found = Seen()
    advance, distances = CompressedCache.advance, Comparer.distances

    def advanced(self: CompressedCache, new: int) -> None:
        advance(self, new)
        if isinstance(self, PoolCache):
            found.figures = max(found.figures, sum(layer.slots.nbytes() for layer in self.layers))

    def compared(self: Comparer, *args: Any) -> Any:
        out = distances(self, *args)
        predictions = sum(r.logits.nbytes for r in self._references.values())
        found.comparison = max(found.comparison, self.memory.nbytes() + predictions)
        return out

    monkeypatch.setattr(CompressedCache, "advance", advanced)
    monkeypatch.setattr(Comparer, "distances", compared)
    return found


GRIDS: dict[str, dict[str, Any]] = {
    "scissorhands": {"methods": ("scissorhands",), "ratios": ("0.5",), "limit": 24},
    "rkv": {"methods": ("rkv",), "ratios": ("0.6",), "limit": 6, "max_new_tokens": 20, "ignore_eos": True},
    "pyramidinfer": {"methods": ("pyramidinfer",), "ratios": ("0.6",), "limit": 12},
    "few rows": {"methods": ("tova",), "ratios": ("0.5",), "limit": 9, "max_new_tokens": 40, "ignore_eos": True,
                 "decode_batch": 4},
    "little memory": {"methods": ("h2o", "snapkv"), "ratios": ("0.2", "0.5"), "limit": 24, "memory": "4M"},
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_said_beforehand_within_a_factor_of_two(tmp_path: Path, seen: Seen, name: str) -> None:
    session = session_of(tmp_path / "run", fidelity=True, decode_ratios=("0.5",), **GRIDS[name])
    facts = session.estimate().memory
    run(session)
    assert 0.5 * seen.figures <= facts.figures <= 2 * seen.figures
    assert 0.5 * seen.comparison <= facts.comparison <= 2.5 * seen.comparison, facts.comparison / seen.comparison
    assert facts.peak == sum(v for v in dataclasses.asdict(facts).values())


def test_nothing_is_compared_without_full_or_when_not_asked(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"methods": ("h2o",), "ratios": ("0.5",)}
    assert session_of(tmp_path / "a", fidelity=True, **settings).estimate().memory.comparison > 0
    assert session_of(tmp_path / "b", fidelity=True, full=False, **settings).estimate().memory.comparison == 0
    assert session_of(tmp_path / "c", fidelity=False, **settings).estimate().memory.comparison == 0


def test_a_method_whose_figures_cannot_be_asked_beforehand_is_counted_by_its_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(self: Any, ctx: Any, layer: int) -> Any:
        raise ValueError("no such pass")

    monkeypatch.setattr(type(catalog.build("h2o")), "decode_start", refuses)
    config = SweepConfig(methods=("h2o",), ratios=("0.5",), decode_ratios=("0.5",), full=False)
    (cell,) = tiny.plan_of(config, tiny.prompt_set([30])).cells.values()
    sizes = Sizes.of(tiny.tiny_llama().hf.config)
    assert Peak(sizes, 4, 1 << 20, {"h2o": catalog.build("h2o")}, False).beside(cell, 30) == 3 * 2 * 8
