"""What rows hold beside the shared prefill: no more than was kept, once for all that are alike, and counted."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import STORED_BYTES, Row, gathered, storages
from kvcli.config import SweepConfig
from kvcli.engine import asking, bench_rows, generate, own_prefills
from kvcli.engine.decoding import Decoding
from kvcli.engine.generate import Ask
from kvcli.engine.memory import Room
from kvcli.engine.runner import Options
from kvcli.methods import catalog
from kvcli.methods.composed import merge_of
from kvcli.models.profiles import HeadProfile, write_profile
from kvcli.models.wrapper import Model
from tests.engine import asks, test_agnostic, tiny
from tests.engine.test_estimate import run, session_of

SCORES = ((0.9, 0.8, 0.1, 0.0), (0.2, 0.3, 0.7, 0.6), (0.0, 0.05, 0.5, 0.4))
LENGTHS = [50, 21, 64, 37]
PAIR = 2 * 16 * 8
"""Bytes of a key and a value of one head in float64."""
GRID = [
    ("snapkv:window=4", {}), ("snapkv:window=4+merge", {}), ("adakv+merge", {}), ("adakv+merge+quant", {}),
    ("pyramidinfer:context=4", {}), ("pyramidinfer:context=4", {"decode_ratios": ("0.5",)}), ("STREAMING", {}),
    ("STREAMING", {"decode_ratios": ("0.5",)}), ("h2o+merge", {"decode_ratios": ("0.5",)}),
]  # fmt: skip


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with asks.exact_model() as model:
        model.name = "testbed"  # profiles belong to a model that is known
        yield model


@pytest.fixture(scope="module")
def text_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """STREAMING as duo_attention that reads the prompt through windows; other texts as they are."""
    path = tmp_path_factory.mktemp("profile") / "p.json"
    write_profile(HeadProfile(SCORES), path)
    streaming = f"duo_attention:sinks=2,recent=6,prefill=streaming,profile={path}"
    return lambda text: streaming if text == "STREAMING" else text


def real(rows: list[Ask]) -> dict[int, int]:
    """Memory behind all tensors that these rows and their choices hold for themselves, whatever they say."""
    held: dict[int, int] = {}
    shared: dict[int, int] = {}
    for ask in rows:
        row, ctx = ask.row, ask.tag.context
        figures = [x for layer in getattr(row, "state", ()) for x in layer.values()]
        held |= storages((*row.keys, *row.values, *figures, *ctx.keys, *ctx.values))
        prompt = (*ctx.keys, *ctx.values, *(x for sums in ctx.column_sums.values() for x in sums))
        shared |= {at: size for at, size in storages(prompt).items() if ctx.keys is PREFILLED[ctx.sample_id]}
    return {at: size for at, size in held.items() if at not in shared}


PREFILLED: dict[str, Any] = {}
"""Keys of every sample's shared prefill."""


@dataclasses.dataclass
class Seen:
    """At each time that rows entered a batch: their number, bytes of the cache, of the rows' own, and of these counted.
    pending: own bytes of finished rows each time one was added."""

    batches: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)
    pending: list[int] = dataclasses.field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found, refill, ask, crowded = Seen(), generate._Batch.refill, asking.Asker.ask, Decoding._crowded

    def refilled(self: Any) -> None:
        refill(self)
        if self.asks and self.cache is not None:
            tally = Room(None, None).tally()
            for one in self.asks:
                tally.add(one.row, one.room)
            own = sum(real(self.asks).values())
            found.batches.append((len(self.asks), self.cache.nbytes(), own, sum(tally.own.values())))

    def asked(self: Any, prompts: Any, sample: int, cell: Any, ready: Any, coming: Any = ()) -> Ask:
        PREFILLED[ready.context.sample_id] = ready.context.keys
        return ask(self, prompts, sample, cell, ready, coming)

    def finished(self: Decoding) -> bool:
        found.pending.append(sum(real([one for one, _ in self.pending]).values()))
        return crowded(self)

    monkeypatch.setattr(generate._Batch, "refill", refilled)
    monkeypatch.setattr(asking.Asker, "ask", asked)
    monkeypatch.setattr(Decoding, "_crowded", finished)
    return found


def swept(model: Model, text: str, options: Options, lengths: list[int] = LENGTHS, **more: Any) -> tiny.Memory:
    config = SweepConfig(methods=(text,), ratios=("0.6", "0.3"), **{"full": False, **more})
    sink, outcome = asks.sweep(model, config, asks.of_length(tiny.prompt_set(lengths), 8), options)
    assert outcome.errors == 0, outcome.messages
    return sink


@pytest.mark.parametrize(("text", "more"), GRID)
def test_what_rows_hold_is_counted(
    exact: Model, seen: Seen, text_of: Callable[[str], str], text: str, more: dict[str, Any]
) -> None:
    """Storages of real tensors, whoever shares them."""
    swept(exact, text_of(text), Options(64), **more)
    assert seen.batches
    for _, _, own, counted in seen.batches:
        assert own == counted
    assert (max(own for _, _, own, _ in seen.batches) == 0) == (text == "snapkv:window=4")


@pytest.mark.parametrize("text", ["STREAMING", "snapkv:window=4+merge", "adakv+merge"])
def test_rows_hold_no_more_than_what_was_kept(
    exact: Model, seen: Seen, text_of: Callable[[str], str], text: str
) -> None:
    """Heads that keep different numbers are not padded to the longest."""
    sink = swept(exact, text_of(text), Options(64))
    pairs = sum(r["kv_bytes"]["prefill"] for r in sink.records) // (2 * 16 * STORED_BYTES)
    assert max(own for _, _, own, _ in seen.batches) == pairs * PAIR


def test_a_prefill_through_windows_is_let_go_once_its_row_is_made(
    exact: Model, monkeypatch: pytest.MonkeyPatch, text_of: Callable[[str], str]
) -> None:
    """Its keys and values live on in no row; other tests say how much lives on in what was copied from them."""
    dense: list[Any] = []
    through, ask = asking.streaming_prefill, asking.Asker.ask

    def watched(*args: Any) -> Any:
        read = through(*args)
        dense.extend(weakref.ref(x) for x in (*read.keys, *read.values))
        return read

    def asked(self: Any, *args: Any) -> Ask:
        made = ask(self, *args)
        gc.collect()
        assert dense and all(ref() is None for ref in dense)
        assert made.tag.context.keys is args[3].context.keys
        return made

    monkeypatch.setattr(asking, "streaming_prefill", watched)
    monkeypatch.setattr(asking.Asker, "ask", asked)
    swept(exact, text_of("STREAMING"), Options(64))
    assert len(dense) == 2 * 4 * 2 * 3


@pytest.mark.parametrize(("text", "more"), GRID)
def test_a_batch_and_its_rows_stay_within_the_bytes_given(
    exact: Model, seen: Seen, text_of: Callable[[str], str], text: str, more: dict[str, Any]
) -> None:
    free = swept(exact, text_of(text), Options(64, keep_maps=9), **more)
    room = 200_000
    del seen.batches[:], seen.pending[:]
    limited = swept(exact, text_of(text), Options(64, memory=room, keep_maps=9), **more)
    assert all(cache + own <= room for rows, cache, own, _ in seen.batches if rows > 1)
    assert len(seen.batches) > 1
    alone = max((own for rows, _, own, _ in seen.batches if rows == 1), default=0)
    assert max(seen.pending) <= room + max(alone, 64 * 6 * PAIR), "one row may be beyond it"
    assert limited.maps == free.maps
    for key, record in limited.by_key().items():
        assert tiny.same(record) == tiny.same(free.by_key()[key])


def test_finished_rows_that_hold_much_are_compared_sooner(
    exact: Model, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    distances = Decoding._distances

    def watched(self: Decoding, some: list[Ask]) -> Any:
        compared.append(len(some))
        return distances(self, some)

    monkeypatch.setattr(Decoding, "_distances", watched)
    lengths = [50, 21, 64, 37, 45, 60]
    truth = swept(exact, "snapkv:window=4+merge", Options(64, fidelity=True), lengths, full=True)
    whole = max(compared)
    for text, room, sooner in (("snapkv:window=4+merge", 200_000, True), ("snapkv:window=4", 200_000, False)):
        compared.clear()
        found = swept(exact, text, Options(64, fidelity=True, memory=room), lengths, full=True)
        assert (max(compared) < whole) == sooner, compared
        assert sum(compared) == 18
        if not sooner:
            continue
        for key, record in found.by_key().items():
            a, b = tiny.same(record), tiny.same(truth.by_key()[key])
            assert a.pop("fidelity") == pytest.approx(b.pop("fidelity"), abs=2e-8)
            assert a == b


def test_a_folder_of_an_earlier_version_counts_the_cache_alone(exact: Model, seen: Seen) -> None:
    row = Row([torch.zeros(2, 9, 4)], [torch.zeros(2, 9, 4)], [torch.arange(9)], own={7: 10_000, 8: 5})
    other = dataclasses.replace(row, own={8: 5, 9: 1})
    cache = CompressedCache([row, other], 3).nbytes()
    for figures, own in ((True, 10_006), (False, 0)):
        tally = Room(cache + own, None, figures).tally()
        tally.add(row, 3)
        assert tally.fits(other, 3)
        tally.add(other, 3)
        assert tally.bytes == cache + own
        less = Room(cache + own - 1, None, figures).tally()
        less.add(row, 3)
        assert not less.fits(other, 3)


@dataclasses.dataclass
class Made:
    """Prefills through windows, and layers that were merged."""

    streaming: int = 0
    folds: int = 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    merge: Any = type(merge_of(catalog.build("snapkv+merge")))
    found, through, fold = Made(), asking.streaming_prefill, merge.fold

    def read(*args: Any) -> Any:
        found.streaming += 1
        return through(*args)

    def folded(self: Any, *args: Any) -> Any:
        found.folds += 1
        return fold(self, *args)

    monkeypatch.setattr(asking, "streaming_prefill", read)
    monkeypatch.setattr(merge, "fold", folded)
    return found


def counts(made: Made) -> tuple[int, int]:
    found = made.streaming, made.folds
    made.streaming = made.folds = 0
    return found


DRAWS: dict[str, Any] = {"temperature": 0.8, "draws": 3, "seeds": (0, 5)}


def test_draws_of_an_answer_share_what_their_rows_hold(
    exact: Model, made: Made, text_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 prompts, 2 ratios, 2 seeds of 3 draws. A merge by chance is made for each seed."""
    wanted = {"STREAMING": (8, 0), "snapkv:window=4+merge": (0, 24), "snapkv:window=4+merge:style=cam": (0, 48)}
    each = {"STREAMING": (48, 0), "snapkv:window=4+merge": (0, 144), "snapkv:window=4+merge:style=cam": (0, 144)}
    for text in wanted:
        with monkeypatch.context() as patch:
            options = Options(64, temperature=0.8, keep_maps=9)
            shared = swept(exact, text_of(text), options, **DRAWS)
            assert counts(made) == wanted[text], text
            patch.setattr(own_prefills, "MOST_BYTES", 0)
            alone = swept(exact, text_of(text), options, **DRAWS)
            assert counts(made) == each[text]
        assert shared.maps == alone.maps
        assert {k: tiny.same(r) for k, r in shared.by_key().items()} == {
            k: tiny.same(r) for k, r in alone.by_key().items()
        }


@pytest.mark.parametrize(("text", "once"), [("STREAMING", (2, 0)), ("snapkv:window=4+merge", (0, 6))])
def test_questions_about_one_context_share_what_their_rows_hold(
    exact: Model, made: Made, text_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, text: str,
    once: tuple[int, int],
) -> None:  # fmt: skip
    config = SweepConfig(methods=(text_of(text),), ratios=("0.4", "0.7"), query=("agnostic",), full=False)
    prompts = test_agnostic.same_context(4)
    shared, _ = test_agnostic.run(exact, config, prompts)
    assert counts(made) == once
    monkeypatch.setattr(own_prefills, "MOST_BYTES", 0)
    alone, _ = test_agnostic.run(exact, config, prompts)
    assert counts(made) == (4 * once[0], 4 * once[1])
    assert shared.maps == alone.maps
    for key, record in shared.by_key().items():
        a, b = tiny.same(record), tiny.same(alone.by_key()[key])
        assert a.pop("options", None) == pytest.approx(b.pop("options", None), abs=1e-7)
        assert a == b


def test_what_waits_to_be_shared_is_bounded(
    exact: Model, made: Made, text_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, formed = [], own_prefills.OwnPrefills.formed

    def watched(self: own_prefills.OwnPrefills, *args: Any) -> Any:
        done = formed(self, *args)
        waiting = [x for one in self._formed.values() for x in (*one.pairs[0], *one.pairs[1])]
        held.append(sum(storages(waiting).values()))
        return done

    most = 64 * 6 * PAIR
    monkeypatch.setattr(own_prefills, "MOST_BYTES", most)
    monkeypatch.setattr(own_prefills.OwnPrefills, "formed", watched)
    swept(exact, text_of("STREAMING"), Options(64, temperature=0.8), **DRAWS)
    assert 0 < max(held) <= most
    assert held[-1] == 0, "nothing waits behind the last row"
    assert 8 < made.streaming < 48


def test_kept_pairs_in_memory_of_their_own_make_the_same_cache() -> None:
    """Of every form; heads of different lengths take what they keep and no more, and so does a copy of such a row."""
    x = torch.randn(3, 40, 8)
    ragged = [torch.tensor([0, 3, 39]), torch.tensor([39]), torch.arange(5, 22)]
    even = [torch.tensor([1, 39]), torch.tensor([0, 39]), torch.tensor([7, 8])]
    for form, pairs in ((ragged, 21), (even, 6), (torch.stack(even), 6), (torch.tensor([2, 4, 39]), 9)):
        dense = Row([x], [x + 1], [form])
        (keys, places), (values, _) = gathered(x, form), gathered(x + 1, form)
        small = Row([keys], [values], [places])
        assert small.lengths(0) == dense.lengths(0) or not isinstance(form, list)
        assert sum(storages((keys, values)).values()) == 2 * pairs * 8 * 4
        held = bench_rows.Held(small, torch.tensor([0]), 40, 0, frozenset()).clone()
        copied = storages((*held.row.keys, *held.row.values))
        assert sum(copied.values()) == 2 * pairs * 8 * 4 and not copied.keys() & storages((keys, values)).keys()
        caches = [CompressedCache([row], 2).layers[0] for row in (dense, small, held.row)]
        for layer in caches[1:]:
            for head, places in enumerate(form if isinstance(form, list) else [form[..., :]] * 3):
                count = places.shape[-1]
                assert torch.equal(layer._keys[0, head, :count], caches[0]._keys[0, head, :count])
                assert torch.equal(layer._values[0, head, :count], caches[0]._values[0, head, :count])


@pytest.mark.parametrize("method", ["snapkv+merge", "pyramidinfer", "snapkv"])
@pytest.mark.parametrize("memory", [None, "2M"])
def test_what_rows_hold_is_said_beforehand(tmp_path: Path, seen: Seen, method: str, memory: str | None) -> None:
    """--dry-run: caches of a batch with what its rows, and those that wait for their comparison, hold."""
    settings: dict[str, Any] = {"methods": (method,), "ratios": ("0.6",), "limit": 12, "memory": memory, "full": False}
    session = session_of(tmp_path / "run", **settings)
    facts = session.estimate()
    run(session)
    held = max(cache + own for _, cache, own, _ in seen.batches) + max(seen.pending)
    assert 0.5 * held <= facts.memory.decode <= 2 * held, facts.memory.decode / held
