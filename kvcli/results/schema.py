"""The record: one JSON line per cell and sample (docs/results.md). A field is null where nothing fills it yet."""

from __future__ import annotations

from typing import Any

SCHEMA = 1
FLAGS = ("noop", "over_budget", "fallback", "unreachable", "simulated")

SAVED_DIGITS = 6
"""Behind the point, of figures in records."""

FIELDS: dict[str, str] = {
    "schema": "version of this table",
    "cell_id": "hash of everything that changes results",
    "sample_id": "the task's name for the sample",
    "task": "task name",
    "ability": "what the task measures",
    "method": "canonical text of the method",
    "settings": "all settings of the method, defaults included",
    "ratio": "requested kept ratio r_p; null where --budget, --match or no ratio was asked for",
    "budget": "requested KV pairs per layer and KV head; null with --ratio",
    "match": "whose bytes it was held to, with --match bytes (a method, @ratio where it has one); else null",
    "measured_ratio": "bytes of the compressed prompt cache over bytes of the full 16-bit prompt cache",
    "kept": "mean KV pairs kept per layer and KV head",
    "first_token": "compressed | prefill | n/a",
    "query": "aware | agnostic",
    "decode": "compression while generating, {ratio | budget | cap, interval}; null = off",
    "weights": "the model's weights: dense | as --weights names them; records without it are of dense weights",
    "shots": "number of exemplars in the prompt",
    "shot_seed": "which exemplars; records without it: 0",
    "shot_order": "their order, 0 as they come; records without it: 0",
    "seed": "seed of random methods and sampling",
    "draw": "which of several sampled answers; 0 without --draws",
    "status": "ok | error",
    "error": "message of a failed sample, else null",
    "score": "0..1",
    "metric": "what score is",
    "extra": "further figures of the task's scorer, {name: number}",
    "output": "generated text",
    "output_ids": "generated token ids, an end token included",
    "extracted": "answer found in it; null = none",
    "options": "log-likelihoods of the options it was chosen from, in nats; null = generated",
    "target": "the right answer",
    "cluster": "samples that belong together in the statistics; null = each its own",
    "finish": "stop | eos | length | choice",
    "n_prompt": "prompt tokens n",
    "truncated": "tokens cut from the prompt by --truncate",
    "context": "{tokens, measured_ratio} of what stands before the question, with --query agnostic; else null",
    "n_new": "generated tokens",
    "notes": "what the method says of this sample, {name: value}",
    "flags": "list out of " + " ".join(FLAGS),
    "kv_bytes": "{full, prefill, end, read, match}: 16-bit bytes of the dense prompt cache, of its kept part, of the "
    "row at its end; read per new token where a method chooses (else null); held to with --match (else null)",
    "alloc_bytes": "bytes the engine's padded batch really held for this row",
    "kept_by_region": "{region: share kept}, mean over layers and KV heads",
    "repetition": "share of the answer's 4-grams that had come before; null below 5 tokens",
    "incoherent": "whether the answer is no text (docs/safety.md has the rules); null where options are chosen from",
    "fidelity": "{kl, top1, nll, tokens, first_divergence, identical}: against full's own output; null = not measured",
    "seconds": "{prefill, select, decode, shared}: shared=true: times of the engine, not of the method",
    "prompt_sha": "key into prompts.jsonl",
    "batch_id": "the decode batch the row was in",
}

KEY = ("cell_id", "sample_id")

LATER = frozenset({"weights", "match", "shot_seed", "shot_order", "options", "truncated", "context", "incoherent"})
"""Fields that records of the same schema may lack: they were written before the field was there."""


def check_record(record: dict[str, Any]) -> None:
    """Raises ValueError naming the missing or unknown fields of a record about to be written."""
    missing, extra = FIELDS.keys() - record.keys() - LATER, record.keys() - FIELDS.keys()
    if missing or extra:
        raise ValueError(f"record fields: missing {sorted(missing)}, unknown {sorted(extra)}")


def prompts_name(shots: int, shot_seed: int, shot_order: int) -> str:
    """'8', '8-1', '8-0-2': how run.json names the prompts of a task."""
    return f"{shots}-{shot_seed}-{shot_order}".removesuffix("-0").removesuffix("-0")
