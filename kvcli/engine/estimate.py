"""What a plan will cost, before it starts: tokens, memory, time and record size, from sizes alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from kvcli.engine.plan import Plan, padded_share
from kvcli.engine.prepare import PromptSet

RECORD_BYTES = 1500
"""A record without its output; measured on the testbed."""
TOKEN_BYTES = 12
"""Text and id of one generated token."""
RECORD_SECONDS = 3e-3
"""Selection, scoring and writing of one record, an order of magnitude."""
STEP_OVERHEAD = 4e-4
"""Seconds per layer and forward pass that no batch size avoids (kernel launches and Python), an order of magnitude."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, from its config."""

    layers: int
    kv_elements: int
    """Elements of one token's KV pairs over all layers."""
    parameters: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        per_layer = config.hidden_size * dim * 2 * (heads + kv_heads) + 3 * config.hidden_size * inner
        layers = config.num_hidden_layers
        parameters = layers * per_layer + config.vocab_size * config.hidden_size
        return cls(layers, layers * kv_heads * dim * 2, parameters)


def decode_rows(config: Any, itemsize: int, longest: int, memory: int, most: int) -> int:
    """Rows per decode batch so that their caches stay within `memory` bytes; at least 1, at most `most`."""
    row = Sizes.of(config).kv_elements * itemsize * longest
    return int(max(1, min(most, memory // max(1, row))))


@dataclass(frozen=True)
class Estimate:
    cells: int
    samples: int
    records: int
    prefill_tokens: int
    decode_tokens: int
    separate_prefill_tokens: int
    """Tokens to prefill if every cell ran on its own."""
    cache_bytes: int
    record_bytes: int
    seconds: float


def estimate(
    plan: Plan, wanted: set[str], prompt_sets: dict[tuple[str, int], PromptSet], sizes: Sizes, itemsize: int, rows: int,
    length: int | None, done: set[tuple[str, str]], limit: int | None,
) -> Estimate:  # fmt: skip
    """What is still to do of the wanted cells and first `limit` samples; done: (cell, sample) pairs with a record.

    Upper bounds: every row is taken to generate its task's most tokens. length: --max-new-tokens.
    """
    records = prefill = separate = decode = steps = passes = caches = 0
    for batch in plan.batches:
        prompts = prompt_sets[batch.task, batch.shots]
        samples, members = (
            range(batch.start, min(batch.end, limit or batch.end)),
            [c for c in batch.cells if c.id in wanted],
        )
        missing = {(c.id, i) for c in members for i in samples if (c.id, prompts.samples[i].id) not in done}
        if not missing:
            continue
        tokens = {i: len(prompts.prompts[i].ids) for i in samples}
        new = length or prompts.task.max_new_tokens
        records += len(missing)
        prefill += sum(tokens.values())
        separate += sum(tokens[i] for _, i in missing)
        decode += len(missing) * new
        decodes = [d for d in batch.decode_batches(rows) if any((c.id, batch.start + i) in missing for i, c in d.rows)]
        steps += new * len(decodes)
        passes += 1
        largest = max(padded_share(d.rows) for d in decodes)
        caches = max(caches, int(largest * (max(tokens.values()) + new) * sizes.kv_elements * itemsize))
    flops = 2 * sizes.parameters * (prefill + decode)
    seconds = flops / _speed() + (steps + passes) * sizes.layers * STEP_OVERHEAD + records * RECORD_SECONDS
    return Estimate(
        cells=len(wanted), samples=sum(plan.samples.values()), records=records, prefill_tokens=prefill,
        decode_tokens=decode, separate_prefill_tokens=separate, cache_bytes=caches,
        record_bytes=records * RECORD_BYTES + decode * TOKEN_BYTES, seconds=seconds,
    )  # fmt: skip


def _speed() -> float:
    """Floating-point operations per second of this machine's matrix product, measured for a moment."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 2048 if device == "cuda" else 384
    a = torch.randn(size, size, device=device)
    float((a @ a)[0, 0])
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < 0.03:
        float((a @ a)[0, 0])
        runs += 1
    return 0.5 * 2 * size**3 * runs / (time.perf_counter() - started)
