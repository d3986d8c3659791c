"""What bench generates, keeps and counts for a method is what a sweep does: the same rows, caches and bytes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from kvcli.config import SweepConfig
from kvcli.engine import bench_pass
from kvcli.engine.bench import Job
from kvcli.engine.bench_pass import Measured, Pass
from kvcli.engine.cells import decode_settings
from kvcli.engine.meter import NoMemory
from kvcli.engine.prompts import PromptSet
from kvcli.engine.runner import Options
from kvcli.evals.spec import Sample
from kvcli.methods import catalog
from kvcli.models.prompt import Prompt
from kvcli.models.wrapper import Model
from kvcli.spans import Segment
from kvcli.testbed import vocabulary as V
from tests.engine import asks, tiny
from tests.engine.asks import exact_model

N, NEW, ROWS = 120, 12, 2
PROFILED = {"duo_attention", "headkv"}  # they ask for a profile of the model's heads
ALONE = [m for m in catalog.usable() if m not in PROFILED and catalog.find(m).kind != "merge"]
OTHERS = [
    "kivi:bits=4,group=8,residual=8", "quant:dtype=int8", "snapkv:window=8+kivi:bits=4", "adakv+kivi", "h2o+merge",
    "adakv+merge", "snapkv+merge+quant", "pyramidkv+lowrank", "snapkv+think", "streaming_llm+minicache", "kvzip+kivi",
    "quest:tokens=16,page=4,least=1,dense_layers=1", "streaming_llm:rerotate=true",
]  # fmt: skip

pytestmark = pytest.mark.slow  # about a second for each method


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with exact_model() as made:
        yield made


def ratio_of(method: str) -> str | None:
    built = catalog.build(method)
    if built.domain.kind != "continuous":
        return "1" if method == "full" else None
    return "0.7" if built.kind == "in-prefill" else "0.3"


def measured(model: Model, method: str, decode: dict[str, Any] | None = None) -> Pass:
    job = Job(model="tiny", method=method, ratio=ratio_of(method), batches=(ROWS,), prompt_tokens=N, new_tokens=NEW,
              repeats=1, decode=decode)  # fmt: skip
    return Measured(job, model, NoMemory()).once(ROWS, NEW)


def prompts(model: Model) -> PromptSet:
    """Bench's own prompts, as a task would have them."""
    found = []
    for row in range(ROWS):
        ids = bench_pass.prompt(N, model.hf.config.vocab_size, model.hf.config.bos_token_id, 0, row)
        words = [V.WORDS[i] for i in ids]
        ends = [sum(map(len, words[: i + 1])) + i for i in range(N)]
        found.append(Prompt(ids, bench_pass.regions(N), " ".join(words), ends, f"sha-{row}"))
    samples = [Sample(f"bench-{row}", (Segment("x", "question"),), "") for row in range(ROWS)]
    return PromptSet(tiny.TASK, tiny.KEY, samples, found)


def swept(model: Model, method: str, **asked: Any) -> list[dict[str, Any]]:
    """The records of a sweep that generates as many tokens."""
    ratio = ratio_of(method)
    config = SweepConfig(
        model="testbed", methods=(method,), ratios=(ratio or "0.3",), first_token=("prefill",), full=False,
        **asked,
    )  # fmt: skip
    options = Options(64, max_new_tokens=NEW + 1, ignore_eos=True)
    memory, _ = asks.sweep(model, config, prompts(model), options)
    assert {r["status"] for r in memory.records} == {"ok"}, [r["error"] for r in memory.records]
    return sorted(memory.records, key=lambda r: str(r["sample_id"]))


def compare(done: Pass, records: list[dict[str, Any]]) -> None:
    assert done.tokens == [r["output_ids"] for r in records]
    sizes = [r["kv_bytes"] for r in records]
    assert done.payload == statistics.mean(s["prefill"] for s in sizes)
    assert done.end == statistics.mean(s["end"] for s in sizes)
    assert done.flags == frozenset(flag for r in records for flag in r["flags"])
    reads = [s["read"] for s in sizes]
    if done.read is None:
        assert reads == [None] * ROWS
    else:
        assert done.read == pytest.approx(statistics.mean(reads), abs=1)


@pytest.mark.parametrize("method", [*ALONE, *OTHERS])
def test_bench_measures_what_a_sweep_generates(model: Model, method: str) -> None:
    compare(measured(model, method), swept(model, method))


DECODING = [
    ("h2o", {"decode_ratios": ("0.5",)}),
    ("h2o", {"cap": "fixed"}),
    ("h2o+merge", {"decode_ratios": ("0.5",), "decode_interval": 3}),
    ("streaming_llm", {"decode_ratios": ("same",)}),
    ("tova", {"decode_budgets": (3,)}),
    ("shotkv", {"decode_ratios": ("0.5",)}),
    ("scope", {"decode_budgets": (4,)}),
    ("pyramidinfer", {"decode_ratios": ("0.2",)}),
]


@pytest.mark.parametrize("method, asked", DECODING, ids=[f"{m} {a}" for m, a in DECODING])
def test_it_does_while_generated_tokens_leave_too(model: Model, method: str, asked: dict[str, Any]) -> None:
    (decode,) = decode_settings(SweepConfig(**asked), catalog.build(method), ratio_of(method))
    assert decode is not None
    done, records = measured(model, method, decode), swept(model, method, **asked)
    compare(done, records)
    assert done.end < done.payload + NEW * 3 * 2 * 32 * 2, "nothing left while generating: nothing was compared"
