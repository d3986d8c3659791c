"""Tiny random models, prompts and a sink in memory for engine tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcli.config import SweepConfig
from kvcli.engine.cells import PromptKey, make_cells
from kvcli.engine.plan import Generation, Plan, make_plan
from kvcli.engine.prompts import PromptSet
from kvcli.engine.runner import Options, Outcome, Runner
from kvcli.evals.spec import Sample, Score, Task
from kvcli.models.prompt import Prompt
from kvcli.models.wrapper import Model
from kvcli.spans import Region, Segment
from kvcli.testbed import vocabulary as V
from kvcli.testbed.model import build_tokenizer


def tiny_llama(dtype: torch.dtype = torch.float32, *, layers: int = 3, heads: int = 4, kv_heads: int = 2) -> Model:
    """A random Llama over the testbed's vocabulary, with weights large enough for attention that is not flat."""
    config = LlamaConfig(
        vocab_size=len(V.WORDS), hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(7)
    return Model(LlamaForCausalLM(config).to(dtype).eval(), build_tokenizer(), name="tiny")


class AnyTask(Task):
    """A task whose prompts are made by the test; every output scores its own length."""

    def samples(self, **_: Any) -> list[Sample]:
        return []

    def score(self, sample: Sample, output: str) -> Score:
        return Score(min(1.0, len(output) / 100), output[:5] or None)


TASK = AnyTask(name="any", version="1", ability="none", metric="length", shots=3, max_new_tokens=8)


KEY = PromptKey("any", 3)


def prompt(n: int, seed: int) -> Prompt:
    """n random tokens in the regions special, system, context, three shots and question."""
    rng = random.Random(f"tiny:{n}:{seed}")
    ids = [V.ID[V.BOS]] + [rng.randrange(4, len(V.WORDS)) for _ in range(n - 1)]
    cuts = [0, 1, 1 + n // 20, *(1 + n * k // 20 for k in (5, 9, 12, 17)), n]
    kinds = [("special", -1), ("system", -1), ("context", -1), ("shot", 0), ("shot", 1), ("shot", 2), ("question", -1)]
    regions = [Region(k, a, b, i) for (k, i), a, b in zip(kinds, cuts, cuts[1:], strict=False) if b > a]
    return Prompt(ids, regions, " ".join(V.WORDS[i] for i in ids), list(range(n)), f"sha-{n}-{seed}")


def prompt_set(lengths: Sequence[int]) -> PromptSet:
    samples = [Sample(f"s{i}", (Segment("x", "question"),), "") for i in range(len(lengths))]
    return PromptSet(TASK, KEY, samples, [prompt(n, i) for i, n in enumerate(lengths)])


@dataclass
class Memory:
    """Keeps what a run writes."""

    records: list[dict[str, Any]] = field(default_factory=list)
    maps: dict[tuple[str, str], Any] = field(default_factory=dict)
    done: set[tuple[str, str]] = field(default_factory=set)

    def done_keys(self) -> set[tuple[str, str]]:
        return set(self.done)

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def add_prompt(self, entry: dict[str, Any]) -> None:
        pass

    def keep_map(self, task: str, sample_id: str, cell_id: str, kept: Any) -> None:
        self.maps[cell_id, sample_id] = kept

    def by_key(self) -> dict[tuple[str, str], dict[str, Any]]:
        return {(r["cell_id"], r["sample_id"]): r for r in self.records}


def plan_of(config: SweepConfig, prompts: PromptSet, prefill_rows: int = 4) -> Plan:
    cells = make_cells(config, [TASK], {"model": "tiny"})
    generation = Generation(tuple(c.id for c in cells), None)
    return make_plan(cells, [generation], {KEY: len(prompts.samples)}, prefill_rows)


def run(
    model: Model, config: SweepConfig, prompts: PromptSet, *, prefill_rows: int = 4, decode_rows: int = 64,
    sink: Memory | None = None, wanted: set[str] | None = None,
) -> tuple[Memory, Outcome]:  # fmt: skip
    sink = sink or Memory()
    plan = plan_of(config, prompts, prefill_rows)
    runner = Runner(model, plan, {KEY: prompts}, sink, Options(decode_rows, keep_maps=99), wanted=wanted)
    return sink, runner.run()


def same(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what batching may change: times, padding bytes, the batch's name."""
    return {k: v for k, v in record.items() if k not in ("seconds", "alloc_bytes", "batch_id")}


def exact_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the dtype it is given; transformers' own computes in float32 whatever the model's dtype."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
