"""Rows stored in other forms: decoding through a form is decoding over what the form reads back, whoever decodes beside
it; a form that changes nothing changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvcli.attention.capture import Needs
from kvcli.cache.kv_cache import CompressedCache
from kvcli.cache.rows import Row, payload_bytes
from kvcli.cache.stored import StoredCache, StoredRow
from kvcli.cache.workspace import Workspace
from kvcli.config import SweepConfig
from kvcli.engine.asking import stored_layers
from kvcli.engine.generate import Ask, Generated, StopRules, generate
from kvcli.engine.memory import Room
from kvcli.engine.runner import Options
from kvcli.methods._stores import Whole
from kvcli.methods.base import Block, Stored, Transform
from kvcli.methods.context import Context
from kvcli.models.wrapper import Model
from tests.engine import asks, tiny
from tests.engine.asks import Prompted, exact_model, prompted
from tests.engine.test_generate import mixed
from tests.methods import storing
from tests.oracles.kivi import kivi
from tests.oracles.quant import quant

PLUGIN = '''
from dataclasses import dataclass
from kvcli.methods._stores import Whole
from kvcli.methods.base import Transform


@dataclass(frozen=True)
class Same(Transform):
    """Pairs as they are."""

    def store(self, ctx, layers):
        return [[Whole(b.keys, b.values) for b in blocks] for blocks in layers]
'''


@dataclass(frozen=True)
class Same(Transform):
    """Pairs as they are."""

    name = "same"

    def store(self, ctx: Context, layers: Sequence[Sequence[Block]]) -> list[list[Stored]]:
        return [[Whole(b.keys, b.values) for b in blocks] for blocks in layers]


@pytest.fixture(scope="module")
def exact() -> Iterator[Model]:
    with exact_model() as model:
        yield model


@pytest.fixture(scope="module")
def prompts(exact: Model) -> list[Prompted]:
    return prompted(exact, [30, 9, 44, 17, 52, 3, 28, 61, 12, 35, 20, 48, 5, 57])


def through(transform: Transform, ask: Ask, ctx: Context | None = None) -> Ask:
    """The same row, stored."""
    row = ask.row
    context: Context = ctx or Context(
        n=row.keys[0].shape[1], heads=4, kv_heads=2, token_ids=[], regions=[], keys=list(row.keys),
        values=list(row.values), column_sums={}, window_queries=[], scaling=[], sample_id="s", seed=0,
    )  # fmt: skip
    stored = StoredRow(row.keys, row.values, row.kept, None, lambda: stored_layers(transform, context, row, row.kept))
    return Ask(stored, ask.start, ask.rules, ask.choose, ask.tag)


def prefilled(model: Model, n: int, window: int) -> tuple[Tensor, Context]:
    """Logits [V] behind a prompt, and what a method may read of it."""
    ids = tiny.prompt(n, seed=n).ids
    done = model.prefill([ids], Needs.of({f"window:{window}"}), [0])
    dense = done.dense(0)
    context = Context(
        n=n, heads=4, kv_heads=2, token_ids=ids, regions=[], keys=dense.keys, values=dense.values, column_sums={},
        window_queries=dense.window_queries, scaling=done.capture.scaling, sample_id="s", seed=0, rope=model.rope,
    )  # fmt: skip
    return done.logits[0], context


def answers(found: list[tuple[Ask, Generated]]) -> dict[object, list[int]]:
    return {ask.tag: output.ids for ask, output in found}


@pytest.fixture(scope="module")
def plain(exact: Model, prompts: list[Prompted]) -> dict[object, list[int]]:
    return answers(list(generate(exact, mixed(prompts))))


@pytest.mark.parametrize("room", [None, 1, 3, 8])
@pytest.mark.parametrize("steady", [False, True])
def test_a_form_that_changes_nothing_gives_the_tokens_of_plain_rows(
    exact: Model, prompts: list[Prompted], plain: dict[object, list[int]], room: int | None, steady: bool
) -> None:
    """All forms of kept sets, both first-token modes, rows that leave and enter."""
    memory = Workspace()
    for seed in range(2):
        some = [through(Same(), ask) for ask in mixed(prompts)]
        random.Random(seed).shuffle(some)
        found = list(
            generate(exact, some, room=Room(None, room), memory=memory, build=StoredCache, steady=steady)
        )  # fmt: skip
        assert answers(found) == plain
        for ask, output in found:
            fed = len(output.ids) - (ask.start.given is not None)
            new = max(0, fed) * 3 * 2 * 32 * 2 if fed else 0
            if fed:
                assert output.payload == payload_bytes(ask.row.kept, [(2, 32)] * 3) + new


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_its_logits_are_those_of_plain_rows_bit_for_bit(kv_heads: int) -> None:
    with exact_model(kv_heads=kv_heads) as model:
        found = prompted(model, [40, 40, 40])
        rows = [one.ask(8, given=5).row for one in found]
        context = Context(
            n=40, heads=4, kv_heads=kv_heads, token_ids=[], regions=[], keys=[], values=[], column_sums={},
            window_queries=[], scaling=[], sample_id="s", seed=0,
        )  # fmt: skip

        def stored(row: Row) -> StoredRow:
            return StoredRow(
                row.keys, row.values, row.kept, None, lambda: stored_layers(Same(), context, row, row.kept)
            )

        one, two = CompressedCache(rows, 8), StoredCache([stored(r) for r in rows], 8)
        for i in range(8):
            tokens, places = torch.tensor([[7 + i], [9], [11 * i + 1]]), torch.full((3, 1), 40 + i)
            assert torch.equal(model.step(tokens, places, one), model.step(tokens, places, two))
        for layer in range(3):
            ((_, store),) = two._row_stores[1][layer]
            keys, values = store.dense()
            assert torch.equal(keys, one.layers[layer]._keys[1, :, :48])
            assert torch.equal(values, one.layers[layer]._values[1, :, :48])


Read = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class Reading(DynamicLayer):
    """A layer of transformers' own cache that gives attention what `read` makes of all pairs so far."""

    def __init__(self, number: int, keys: Tensor, values: Tensor, read: Read) -> None:
        super().__init__()
        self.number, self.read = number, read
        super().update(keys[None], values[None])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        new_keys, new_values = self.read(self.number, keys[0], values[0])
        return new_keys[None], new_values[None]


def truth(model: Model, ctx: Context, end: int, read: Read, fed: list[int]) -> Tensor:
    """[fed, V] logits of the unmodified model, token by token, over the first `end` prompt pairs and the new ones, all
    as `read` gives them."""
    cache = DynamicCache()
    cache.layers = [Reading(i, ctx.keys[i][:, :end], ctx.values[i][:, :end], read) for i in range(ctx.layers)]
    model.hf.set_attn_implementation("sdpa")
    out = []
    with torch.no_grad():
        for i, token in enumerate(fed):
            done = model.hf(torch.tensor([[token]]), position_ids=torch.tensor([[end + i]]), past_key_values=cache)
            out.append(done.logits[0, -1])
    return torch.stack(out)


def oracle(text: str) -> Read:
    """What a form reads, from its oracle, however many pairs there are."""
    name, _, rest = text.partition(":")
    settings = {k: int(v) if v.isdigit() else v for k, v in (s.split("=") for s in rest.split(",") if s)}

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        each = [
            (kivi if name == "kivi" else quant)(k.numpy(), v.numpy(), **settings)[:2]  # type: ignore[operator]
            for k, v in zip(keys, values, strict=True)
        ]
        return torch.stack([torch.tensor(k) for k, _ in each]), torch.stack([torch.tensor(v) for _, v in each])

    return read


def prompt_only(layers: list[tuple[Tensor, Tensor]]) -> Read:
    """The prompt's pairs as a store read them, new ones as they are."""

    def read(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        k, v = layers[layer]
        return torch.cat([k, keys[:, k.shape[1] :]], 1), torch.cat([v, values[:, v.shape[1] :]], 1)

    return read


FORMS = [
    "kivi", "kivi:bits=4,group=8,residual=8", "quant:dtype=int8", "quant:dtype=int4", "think:window=9", "lowrank",
    "minicache",
]  # fmt: skip


@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
@pytest.mark.parametrize("text", FORMS)
def test_decoding_through_a_form_is_decoding_over_what_it_reads(exact: Model, text: str, first_token: str) -> None:
    """The equality of transforms, float64: against transformers' own attention over the oracle's keys and values, and
    teacher-forced over 40 tokens, so that generated pairs are quantised too."""
    transform = storing.transform(text)
    n, new = 70, 40
    logits, ctx = prefilled(exact, n, 32)
    end = n - 1 if first_token == "compressed" else n
    fed = [ctx.token_ids[-1] if end < n else int(logits.argmax()), *(7 * i % 200 + 4 for i in range(new - 1))]
    positions = [torch.arange(end)] * ctx.layers
    row = Row(ctx.keys, ctx.values, positions)
    made = stored_layers(transform, ctx, row, positions)
    if text.startswith(("kivi", "quant")):
        read = oracle(text)
    else:
        read = prompt_only([blocks[0][1].dense() for blocks in made])
    cache = StoredCache([StoredRow(ctx.keys, ctx.values, positions, None, lambda: made)], new)
    found = [exact.step(torch.tensor([[t]]), torch.tensor([[end + i]]), cache)[0, 0] for i, t in enumerate(fed)]
    wanted = truth(exact, ctx, end, read, fed)
    assert torch.allclose(torch.stack(found), wanted, rtol=0, atol=1e-9)
    whole = truth(exact, ctx, end, lambda _, k, v: (k, v), fed)
    assert (wanted - whole).abs().max() > 1e-3  # the form does change what the model says


METHODS = (
    "kivi", "quant:dtype=fp8", "think:window=8", "lowrank", "minicache", "snapkv:window=4+kivi:group=8,residual=8",
    "h2o+merge+quant", "pyramidkv:window=4+lowrank", "random+merge:style=cam+think:window=8", "snapkv:window=4",
)  # fmt: skip


def test_a_shared_sweep_equals_separate_runs_in_any_batch(exact: Model) -> None:
    """Equality 3 for stored rows, with the distances that teacher forcing gives."""
    config = SweepConfig(methods=METHODS, ratios=("0.3", "0.6"), first_token=("compressed", "prefill"))
    prompts = tiny.prompt_set([50, 21, 64, 37])
    shared, outcome = asks.sweep(exact, config, prompts, Options(64, keep_maps=99, fidelity=True))
    assert outcome.errors == 0
    truth = {key: rounded(r) for key, r in shared.by_key().items()}
    for prefill_rows, decode_rows in ((1, 1), (2, 7)):
        options = Options(decode_rows, keep_maps=99, fidelity=True)
        other, _ = asks.sweep(exact, config, prompts, options, prefill_rows=prefill_rows)
        assert {key: rounded(r) for key, r in other.by_key().items()} == truth
    alone = SweepConfig(methods=("kivi",), ratios=("0.3",), first_token=("compressed",))
    sink, _ = asks.sweep(exact, alone, prompts, Options(64, keep_maps=99, fidelity=True))
    assert all(rounded(r) == truth[key] for key, r in sink.by_key().items())


def rounded(record: dict) -> dict:  # type: ignore[type-arg]
    """A record as it must repeat: float64 sums in another order differ by less than 1e-8."""
    found = tiny.same(record)
    found["fidelity"] = {k: round(v, 7) if isinstance(v, float) else v for k, v in record["fidelity"].items()}
    return found


def test_a_plugin_that_changes_nothing_has_fulls_figures(exact: Model, tmp_path: Path) -> None:
    """Through the whole engine: alone it is `full`, behind an evictor it is the evictor."""
    path = tmp_path / "same.py"
    path.write_text(PLUGIN)
    methods = (f"{path}:Same", "snapkv:window=4", f"snapkv:window=4+{path}:Same")
    config = SweepConfig(methods=methods, ratios=("0.4",), first_token=("compressed", "prefill"))
    sink, outcome = asks.sweep(exact, config, tiny.prompt_set([50, 33]), Options(64, fidelity=True))
    assert outcome.errors == 0
    by = {(r["method"], r["sample_id"], r["first_token"]): r for r in sink.records}
    same = ("output_ids", "measured_ratio", "kv_bytes", "kept", "kept_by_region", "score")
    for sample in ("s0", "s1"):
        for mode in ("compressed", "prefill"):
            for stored, own in ((methods[0], "full"), (methods[2], methods[1])):
                a, b = by[stored, sample, mode], by[own, sample, mode]
                assert {k: a[k] for k in same} == {k: b[k] for k in same}
                assert a["flags"] == (["noop"] if own == "full" else b["flags"]), "alone it saves nothing"
                assert a["fidelity"]["kl"] == pytest.approx(b["fidelity"]["kl"], abs=1e-8)
                assert a["fidelity"]["top1"] == b["fidelity"]["top1"]


def test_rows_that_left_are_not_fed_and_their_neighbours_do_not_notice(exact: Model, prompts: list[Prompted]) -> None:
    rows = [through(Same(), one.ask(4, given=5)).row for one in prompts[:3]]
    cache = StoredCache(rows, 4)
    tokens = torch.tensor([[5], [6], [7]])
    places = torch.tensor([[len(one.ids)] for one in prompts[:3]])
    exact.step(tokens, places, cache)
    sizes = [cache.payload(r) for r in range(3)]
    cache.release([1])
    exact.step(tokens, places + 1, cache)
    pair = 3 * 2 * 32 * 2
    assert [cache.payload(r) for r in range(3)] == [sizes[0] + pair, sizes[1], sizes[2] + pair]
    cache.reform([0, 2], [], [])
    assert [cache.payload(r) for r in range(2)] == [sizes[0] + pair, sizes[2] + pair]


def test_a_cache_of_stored_rows_takes_one_token_at_a_time(exact: Model, prompts: list[Prompted]) -> None:
    cache = StoredCache([through(Same(), prompts[0].ask(4)).row], 4)
    with pytest.raises(ValueError, match="one token at a time"):
        exact.step(torch.tensor([[5, 6]]), torch.tensor([[29, 30]]), cache)
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.advance(-1)


def test_bytes_held_are_the_stores_and_one_buffer_for_all_layers(exact: Model, prompts: list[Prompted]) -> None:
    row = through(Same(), prompts[2].ask(4, given=5)).row
    cache = StoredCache([row], 4)
    pairs = 3 * 2 * 44 * 32 * 8
    assert cache.nbytes() == pairs + 2 * (44 + 4) * 32 * 8
    assert cache.payload(0) == pairs // 4


def test_a_row_that_ends_at_once_or_needs_no_cache(exact: Model, prompts: list[Prompted]) -> None:
    some = [through(Same(), one.ask(StopRules(1), given=5, tag=i)) for i, one in enumerate(prompts[:2])]
    found = list(generate(exact, some, build=StoredCache))
    assert [(a.tag, g.ids, g.payload) for a, g in found] == [(0, [5], None), (1, [5], None)]
