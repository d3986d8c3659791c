"""DuoAttention while generating, in float64: the full cache under masks made by where each head's window stands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvcli.config import SweepConfig
from kvcli.errors import KvcliError
from kvcli.methods.catalog import build
from kvcli.models.profiles import HeadProfile, write_profile
from kvcli.models.wrapper import Model
from tests.engine import tiny
from tests.engine.asks import watch_pools
from tests.oracles.generating import _masking

NEW, LAYERS, HEADS = 24, 3, 4
SINKS, RECENT = 2, 6
SCORES = [[0.9, 0.8, 0.1, 0.0], [0.2, 0.3, 0.7, 0.6], [0.0, 0.05, 0.5, 0.4]]
Streams = list[list[bool]]


@pytest.fixture(scope="module")
def exact() -> Iterator[Callable[[int], Model]]:
    """exact(kv_heads): a float64 model whose norms stay in float64, named as one that has a profile."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaRMSNorm, "forward", tiny.exact_norm)
    made: dict[int, Model] = {}

    def make(kv_heads: int) -> Model:
        if kv_heads not in made:
            made[kv_heads] = tiny.tiny_llama(torch.float64, kv_heads=kv_heads)
            made[kv_heads].name = "testbed"
        return made[kv_heads]

    yield make
    patch.undo()


@pytest.fixture(autouse=True)
def _no_end_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer has its full length."""
    monkeypatch.setattr("kvcli.engine.asking.end_tokens", lambda model: frozenset())


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    write_profile(HeadProfile(tuple(map(tuple, SCORES))), tmp_path / "p.json")
    return tmp_path / "p.json"


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[list[list[list[int]]]]:
    return watch_pools(monkeypatch)


def prompts_of(lengths: list[int]) -> tiny.PromptSet:
    prompts = tiny.prompt_set(lengths)
    return dataclasses.replace(prompts, task=dataclasses.replace(prompts.task, max_new_tokens=NEW))


def streams_of(kv_heads: int, retrieving: int) -> Streams:
    """Which KV heads stream when so many retrieve: those outside the largest group means."""
    group = HEADS // kv_heads
    means = [[sum(row[i : i + group]) / group for i in range(0, HEADS, group)] for row in SCORES]
    order = sorted(((layer, h) for layer in range(LAYERS) for h in range(kv_heads)), key=lambda x: -means[x[0]][x[1]])
    return [[(layer, h) not in order[:retrieving] for h in range(kv_heads)] for layer in range(LAYERS)]


def window(query: int, n: int, interval: int, sinks: int, recent: int) -> list[int]:
    """What a streaming head shows a query behind the prompt, or at its end: the window was last moved when `moved`
    generated tokens were there."""
    before = max(0, query - n)
    moved = before // interval * interval
    first = max(0, n + moved - recent)
    return [p for p in range(query + 1) if p < sinks or p >= first]


@dataclasses.dataclass
class Slid:
    tokens: list[int]
    after: list[list[list[list[int]]]]
    """Per step, layer and KV head: what is held behind the step."""


def slid(
    model: Model, ids: list[int], streams: Streams, *, interval: int, first_token: str, sinks: int, recent: int
) -> Slid:
    """Generates with the full cache, each query under the mask that belongs to its position."""
    n, kv_heads = len(ids), len(streams[0])
    tokens, after = [], []

    def seen(layer: int, head: int, query: int) -> list[int]:
        return window(query, n, interval, sinks, recent) if streams[layer][head] else list(range(query + 1))

    def left(layer: int, head: int, query: int) -> list[int]:
        """Behind the step of `query` the window has moved if that was due: as the next one sees it, without itself."""
        return [p for p in seen(layer, head, query + 1) if p <= query]

    with _masking(model.hf) as masking:

        def forward(fed: list[int], start: int) -> int:
            positions = torch.arange(start, start + len(fed))[None]
            return int(model.hf(torch.tensor([fed]), position_ids=positions, use_cache=False).logits[0, -1].argmax())

        first = forward(ids, 0)
        place = n
        if first_token == "compressed":
            masking.forget_last()
            place = n - 1
        else:
            tokens.append(first)
        masking.seen = seen
        while len(tokens) < NEW:
            tokens.append(forward([ids[-1] if place < n else tokens[-1]], place))
            after.append([[left(layer, h, place) for h in range(kv_heads)] for layer in range(LAYERS)])
            place += 1
    return Slid(tokens, after)


def text_of(profile: Path, sinks: int = SINKS, recent: int = RECENT) -> str:
    return f"duo_attention:sinks={sinks},recent={recent},profile={profile}"


@pytest.mark.parametrize("interval", [1, 3, 5])
@pytest.mark.parametrize("first_token", ["compressed", "prefill"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_streaming_heads_slide_and_retrieval_heads_keep_everything(
    exact: Callable[[int], Model], profile: Path, held: list[Any], kv_heads: int, first_token: str, interval: int
) -> None:
    model, prompts = exact(kv_heads), prompts_of([37])
    config = SweepConfig(
        methods=(text_of(profile),), ratios=("0.6",), first_token=(first_token,), full=False, decode_ratios=("same",),
        decode_interval=interval,
    )  # fmt: skip
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0
    (record,) = sink.records
    assert record["decode"] == {"rule": "own", "interval": interval}
    retrieving = record["notes"]["retrieval_heads"]
    assert 0 < retrieving < LAYERS * kv_heads
    streams = streams_of(kv_heads, retrieving)
    run = slid(
        model, prompts.prompts[0].ids, streams, interval=interval, first_token=first_token, sinks=SINKS, recent=RECENT
    )
    assert record["output_ids"] == run.tokens and len(run.tokens) == NEW
    assert held == run.after
    sizes = [
        len(head) for layer, row in zip(held[-1], streams, strict=True) for head, s in zip(layer, row, strict=True) if s
    ]
    assert set(sizes) <= set(range(SINKS + RECENT, SINKS + RECENT + interval))
    pairs = sum(len(head) for layer in held[-1] for head in layer)
    assert record["kv_bytes"]["end"] == pairs * 2 * (64 // 4) * 2


@pytest.mark.parametrize("recent", [20, 30])
def test_a_window_longer_than_the_prompt_slides_once_it_is_full(
    exact: Callable[[int], Model], profile: Path, held: list[Any], recent: int
) -> None:
    """Sinks may be generated tokens, then. Nothing slides where everything was asked for."""
    model, prompts = exact(2), prompts_of([21])
    text = text_of(profile, 25, 1) if recent == 30 else text_of(profile, SINKS, recent)
    sinks, recent = (25, 1) if recent == 30 else (SINKS, recent)
    for ratio, stream in (("0.5", True), ("1", False)):
        held.clear()
        config = SweepConfig(methods=(text,), ratios=(ratio,), full=False, decode_ratios=("0.5",))
        sink, outcome = tiny.run(model, config, prompts)
        assert outcome.errors == 0
        (record,) = sink.records
        assert record["notes"]["retrieval_heads"] == (0 if stream else 6)
        run = slid(
            model, prompts.prompts[0].ids, [[stream] * 2] * LAYERS, interval=1, first_token="compressed", sinks=sinks,
            recent=recent,
        )  # fmt: skip
        assert record["output_ids"] == run.tokens
        assert held == run.after
        assert len(held[-1][0][0]) == (sinks + recent if stream else 21 + NEW - 1)


def test_rows_of_many_prompts_and_sizes_decode_together(exact: Callable[[int], Model], profile: Path) -> None:
    model, prompts = exact(2), prompts_of([37, 50, 21])
    config = SweepConfig(
        methods=(text_of(profile),), ratios=("0.3", "0.5", "0.8"), decode_ratios=("off", "same"),
        first_token=("compressed", "prefill"), decode_interval=2,
    )  # fmt: skip
    sink, outcome = tiny.run(model, config, prompts)
    assert outcome.errors == 0
    records, cells = sink.by_key(), tiny.plan_of(config, prompts).cells
    assert len(records) == 3 * 2 * (1 + 3 * 2)
    felt = 0
    for (cell_id, sample), record in records.items():
        cell = cells[cell_id]
        if cell.method == "full" or cell.decode is None:
            continue
        streams = streams_of(2, record["notes"]["retrieval_heads"])
        ids = prompts.prompts[int(sample[1:])].ids
        run = slid(model, ids, streams, interval=2, first_token=cell.first_token, sinks=SINKS, recent=RECENT)
        assert record["output_ids"] == run.tokens, (cell.ratio, cell.first_token, sample)
        kept = {
            r["cell_id"]: r for r in sink.records
            if (r["ratio"], r["first_token"], r["sample_id"]) == (record["ratio"], cell.first_token, sample)
        }  # fmt: skip
        felt += any(r["output_ids"] != run.tokens for r in kept.values())
    assert felt > 4, "sliding on changes answers"
    for prefill_rows, decode_rows in ((1, 1), (3, 5)):
        other, _ = tiny.run(model, config, prompts, prefill_rows=prefill_rows, decode_rows=decode_rows)
        assert {k: tiny.same(r) for k, r in other.by_key().items()} == {k: tiny.same(r) for k, r in records.items()}


def test_behind_a_merge_it_goes_on_sliding(exact: Callable[[int], Model], profile: Path, held: list[Any]) -> None:
    """Which pairs leave does not depend on what is folded into the others."""
    model, prompts = exact(2), prompts_of([37])
    config = SweepConfig(methods=(f"{text_of(profile)}+merge",), ratios=("0.6",), full=False, decode_ratios=("same",))
    sink, outcome = tiny.run(model, config, prompts)
    (record,) = sink.records
    assert outcome.errors == 0
    assert record["decode"] == {"rule": "own", "interval": 1}
    streams = streams_of(2, record["notes"]["retrieval_heads"])
    run = slid(model, prompts.prompts[0].ids, streams, interval=1, first_token="compressed", sinks=SINKS, recent=RECENT)
    assert held == run.after


def test_the_note_names_the_profile_that_cells_are_told_apart_by(exact: Callable[[int], Model], profile: Path) -> None:
    model, prompts = exact(2), prompts_of([37])
    config = SweepConfig(methods=(text_of(profile),), ratios=("0.6",), full=False)
    (cell,) = tiny.plan_of(config, prompts).cells.values()
    sink, _ = tiny.run(model, config, prompts)
    assert sink.records[0]["notes"]["profile"] == cell.key["head_profile"]
    other = HeadProfile(tuple(tuple(reversed(row)) for row in SCORES))
    profile.write_text(json.dumps(other.to_dict()))
    (again,) = tiny.plan_of(config, prompts).cells.values()
    assert again.id != cell.id and again.method == cell.method


# prefill=streaming: the prompt itself is read through the windows.


def streamed(model: Model, ids: list[int], streams: Streams, interval: int | None) -> Slid:
    """As `slid`, from the first query on; the first token comes from the prompt's end. interval: None keeps all."""
    n, kv_heads, tokens = len(ids), len(streams[0]), list[int]()
    after = []

    def seen(layer: int, head: int, query: int) -> list[int]:
        if not streams[layer][head]:
            return list(range(query + 1))
        if query < n:
            return [p for p in range(query + 1) if p < SINKS or query - p < RECENT]
        if interval is None:
            return [p for p in range(query + 1) if p < SINKS or p >= n - RECENT]
        return window(query, n, interval, SINKS, RECENT)

    with _masking(model.hf) as masking:
        masking.seen = seen
        fed = ids
        while len(tokens) < NEW:
            start = 0 if fed is ids else n + len(tokens) - 1
            positions = torch.arange(start, start + len(fed))[None]
            logits = model.hf(torch.tensor([fed]), position_ids=positions, use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
            if fed is not ids:
                left = [[seen(layer, h, start + 1) for h in range(kv_heads)] for layer in range(LAYERS)]
                after.append([[[p for p in head if p <= start] for head in layer] for layer in left])
            fed = tokens[-1:]
    return Slid(tokens, after)


@pytest.mark.parametrize("decode", ["off", "same"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_prompt_read_through_the_windows(
    exact: Callable[[int], Model], profile: Path, held: list[Any], kv_heads: int, decode: str
) -> None:
    model, prompts = exact(kv_heads), prompts_of([37, 50, 8])
    text = f"{text_of(profile)},prefill=streaming"
    config = SweepConfig(
        methods=(text, text_of(profile)), ratios=("0.6",), full=False, decode_ratios=(decode,), decode_interval=2,
        first_token=("compressed", "prefill"),
    )  # fmt: skip
    sink, outcome = tiny.run(model, config, prompts, decode_rows=1)
    assert outcome.errors == 0
    mine = [r for r in sink.records if "prefill=streaming" in r["method"]]
    assert {r["first_token"] for r in mine} == {"n/a"} and len(mine) == 3 and len(sink.records) == 9
    others = {r["sample_id"]: r for r in sink.records if r not in mine and r["first_token"] == "prefill"}
    changed = 0
    for record in mine:
        ids = prompts.prompts[int(record["sample_id"][1:])].ids
        streams = streams_of(kv_heads, record["notes"]["retrieval_heads"])
        run = streamed(model, ids, streams, 2 if decode == "same" else None)
        assert record["output_ids"] == run.tokens, len(ids)
        other = others[record["sample_id"]]
        assert (record["measured_ratio"], record["kv_bytes"]) == (other["measured_ratio"], other["kv_bytes"])
        changed += record["output_ids"] != other["output_ids"]
    assert changed, "reading through a window changes answers"
    if decode == "same":
        assert all(streams_held in held for streams_held in run.after)


def test_reading_through_windows_costs_a_prefill_of_its_own_and_stands_alone(profile: Path) -> None:
    plain, windows = (build(f"{text_of(profile)}{more}") for more in ("", ",prefill=streaming"))
    assert (plain.sharing, plain.kind, plain.prefill_window()) == (1, "evict", None)
    assert (windows.sharing, windows.kind, windows.prefill_window()) == (3, "in-prefill", (SINKS, RECENT))
    assert type(plain).sharing == 1
    with pytest.raises(KvcliError, match="stands alone"):
        build(f"{text_of(profile)},prefill=streaming+kivi")
