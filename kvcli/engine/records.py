"""Builds the lines of samples.jsonl and prompts.jsonl."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from kvcli.cache.rows import STORED_BYTES, kept_counts, payload_bytes
from kvcli.engine.cells import Cell
from kvcli.engine.fidelity import Distance
from kvcli.engine.generate import Generated
from kvcli.engine.prompts import PromptSet
from kvcli.engine.selecting import kept_share
from kvcli.evals.coherence import incoherent
from kvcli.evals.spec import Sample
from kvcli.methods.base import Method, Selection
from kvcli.results.schema import FIELDS, SAVED_DIGITS, SCHEMA

if TYPE_CHECKING:
    from kvcli.models.prompt import Prompt


def _base(cell: Cell, prompts: PromptSet, sample: Sample, method: Method, batch: str) -> dict[str, Any]:
    record: dict[str, Any] = dict.fromkeys(FIELDS)
    record.update(
        schema=SCHEMA, cell_id=cell.id, sample_id=sample.id, task=cell.task, ability=prompts.task.ability,
        method=cell.method, settings=method.settings(), ratio=None if cell.ratio is None else float(cell.ratio),
        budget=cell.budget, first_token=cell.first_token, query=cell.query, shots=cell.shots,
        shot_seed=cell.shot_seed, shot_order=cell.shot_order, seed=cell.seed,
        draw=cell.draw, decode=cell.decode, weights=cell.weights,
        match=None if cell.match is None else str(cell.match),
        metric=prompts.task.metric, target=sample.answer, cluster=prompts.clusters[sample.id] or None, flags=[],
        batch_id=batch,
    )  # fmt: skip
    return record


def error_record(
    cell: Cell, prompts: PromptSet, sample: Sample, method: Method, error: BaseException, batch: str
) -> dict[str, Any]:
    """A sample that failed: status `error` and the message; a later run tries it again."""
    record = _base(cell, prompts, sample, method, batch)
    record.update(status="error", error=f"{type(error).__name__}: {error}")
    return record


def ok_record(
    *, cell: Cell, prompts: PromptSet, sample: Sample, prompt: Prompt, method: Method, selection: Selection,
    output: Generated, full: list[int] | None, distance: Distance | None, dims: Sequence[tuple[int, int]], n: int,
    seconds: dict[str, Any], batch: str, payload: int | None = None, matched: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A finished sample. full: output ids of `full` in the same first-token mode, for the first divergence. n: tokens
    that were compressed, all of the prompt or those before its question. payload: bytes of the pairs kept of them,
    where a transform stores them. matched: bytes they were to have."""
    record = _base(cell, prompts, sample, method, batch)
    kv_heads = dims[0][0]
    whole = len(prompt.ids)
    pair = sum(heads * width for heads, width in dims) * STORED_BYTES
    counts = [count + whole - n for layer in kept_counts(selection.kept, kv_heads) for count in layer]
    dense = whole * pair
    part = payload_bytes(selection.kept, dims) if payload is None else payload
    kept = part + (whole - n) * pair if output.prompted is None else output.prompted
    end = kept + max(0, len(output.ids) - 1) * pair
    flags = set(selection.flags)
    if output.left_out:
        flags.discard("noop")  # all of the prompt would have been read, but the answer made it longer
    if output.payload is not None:
        everything, end = end, output.payload
        if end < everything:
            flags.discard("noop")  # nothing of the prompt was evicted at first, but something was while generating
    share = [*kept_share(selection.kept, kv_heads, n).tolist(), *[1.0] * (whole - n)]
    upto = [0.0, *accumulate(share)]
    by_region: dict[str, tuple[float, int]] = {}
    for region in prompt.regions:
        total, size = by_region.get(region.label, (0.0, 0))
        by_region[region.label] = (total + upto[region.end] - upto[region.start], size + len(region))
    score = prompts.task.judged(sample, output.text, output.loglikelihoods)
    record.update(
        status="ok", score=round(score.value, SAVED_DIGITS), extracted=score.extracted, extra=score.extra,
        output=output.text, output_ids=output.ids, finish=output.finish, n_prompt=whole, n_new=len(output.ids),
        measured_ratio=round(kept / dense, SAVED_DIGITS), kept=round(sum(counts) / len(counts), 3),
        flags=sorted(flags), notes=selection.notes,
        kv_bytes={"full": dense, "prefill": kept, "end": end, "read": _whole(output.read), "match": matched},
        alloc_bytes=output.alloc, repetition=repetition(output.ids),
        incoherent=None if output.loglikelihoods else incoherent(output.text, score.extra),
        kept_by_region={k: round(t / s, 4) for k, (t, s) in by_region.items() if s},
        options=[round(v, 8) for v in output.loglikelihoods] or None,
        truncated=prompt.truncated,
        context=_context(n, part / (n * pair)) if cell.query == "agnostic" else None,
        fidelity=_fidelity(output.ids, full, distance), prompt_sha=prompt.sha,
        seconds={k: v if isinstance(v, bool) else round(v, SAVED_DIGITS) for k, v in seconds.items()},
    )  # fmt: skip
    return record


def _context(tokens: int, measured: float) -> dict[str, Any]:
    return {"tokens": tokens, "measured_ratio": round(measured, SAVED_DIGITS)}


def _whole(number: float | None) -> int | None:
    return None if number is None else round(number)


GRAM = 4


def repetition(ids: Sequence[int]) -> float | None:
    """Share of the output's 4-grams that had come before in it."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return round(1 - len(set(grams)) / len(grams), SAVED_DIGITS) if len(grams) > 1 else None


def _fidelity(ids: list[int], full: list[int] | None, distance: Distance | None) -> dict[str, Any]:
    """First token at which the output differs from full's, and the distance of the predictions."""
    result: dict[str, Any] = dict.fromkeys(("kl", "top1", "nll", "tokens", "first_divergence", "identical"))
    if distance is not None:
        figures = dataclasses.asdict(distance).items()  # NaN where the model gave NaN: a line holds none
        result.update({k: round(v, 8) + 0.0 if math.isfinite(v) else None for k, v in figures})  # no -0.0
    if full is not None:
        at = next((i for i, (a, b) in enumerate(zip(ids, full, strict=False)) if a != b), min(len(ids), len(full)))
        result["identical"] = ids == full
        result["first_divergence"] = None if ids == full else at
    return result


def prompt_entry(prompts: PromptSet, sample: Sample, prompt: Prompt, store_harmful: bool) -> dict[str, Any]:
    """One distinct prompt; the text of a harmful one only where asked for."""
    hidden = prompts.task.harmful and not store_harmful
    return {
        "sha": prompt.sha, "task": prompts.task.name, "sample_id": sample.id, "n": len(prompt.ids),
        "regions": [[r.label, r.start, r.end] for r in prompt.regions],
        **({"thinking": True} if sample.meta.get("thinking") else {}),
        "segments": sample.fingerprint,
        "text": None if hidden else prompt.text, "offsets": None if hidden else prompt.offsets,
    }  # fmt: skip
