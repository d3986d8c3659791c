"""A run as lm-evaluation-harness writes it: per variant a folder with results_TIME.json and samples_TASK_TIME.jsonl.

Names and keys follow lm-eval 0.4.13 (EleutherAI/lm-evaluation-harness, lm_eval/loggers/evaluation_tracker.py and
lm_eval/result_schema.py). One method with one size is one model there: its folder's name says both, and `config` names
them as kvcli's own model for lm-eval does (`model_args`, `config.kvcli`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kvcli.analysis.exports.shared import (
    Scored,
    Variant,
    Wanted,
    hidden,
    json_line,
    mean_of,
    metric_of,
    prompts_of,
    records_of,
    replacing,
    rows_of_tasks,
    scored,
    shares_of,
    variants,
    when,
    write_json,
)  # fmt: skip
from kvcli.analysis.reading.load import Run
from kvcli.analysis.tables.cells import rows_of_cells

FILTER = "none"
INVALID = "[invalid]"
"""What lm-eval's own filters give where they find no answer."""
_UNSAFE = re.compile(r"[\"<>:/|\\?*\[\]]+")


def write_lm_eval(run: Run, out: Path, wanted: Wanted) -> list[Path]:
    """One folder per variant under `out`. Failed samples are left out, as lm-eval has none."""
    rows_of, prompts = rows_of_cells(run), prompts_of(run)
    names = {task: np.unique(run.sample[rows]) for task, rows in rows_of_tasks(run, rows_of).items()}
    time = when(run, "updated").strftime("%Y-%m-%dT%H-%M-%S.%f")
    written: list[Path] = []
    for variant in variants(run):
        found = {task: scored(run, rows_of[code]) for task, code in variant.cells.items()}
        found = {task: cell for task, cell in found.items() if len(cell.rows)}
        if not found:
            continue
        folder = out / _UNSAFE.sub("__", _model_name(run, variant))
        hashes = {}
        for task, cell in found.items():
            path = folder / f"samples_{_UNSAFE.sub('__', task)}_{time}.jsonl"
            numbers = np.searchsorted(names[task], run.sample[cell.rows])
            records = records_of(run, cell.rows, wanted.harmful or not hidden(run, task), prompts)
            hashes[task] = _write_samples(path, zip(numbers.tolist(), records, strict=True))
            written.append(path)
        results = _results(run, variant, found, hashes, {t: len(rows_of[c]) for t, c in variant.cells.items()})
        written.append(write_json(folder / f"results_{time}.json", results))
    return written


def _model_name(run: Run, variant: Variant) -> str:
    return f"{run.model},{variant.text}"


def _results(
    run: Run, variant: Variant, found: dict[str, Scored], hashes: dict[str, str], original: dict[str, int]
) -> dict[str, Any]:
    started = when(run, "created").timestamp()
    versions = run.meta.get("provenance", {}).get("versions", {})
    cells = {task: run.cells[variant.cells[task]] for task in found}
    return {
        "results": {task: _metrics(run, task, cell) for task, cell in found.items()},
        "group_subtasks": {task: [] for task in found},
        "configs": {task: {"task": task, "num_fewshot": cells[task].shots, "repeats": 1, "should_decontaminate": False,
                           "metric_list": [{"metric": metric_of(run, cell.rows), "higher_is_better": True}],
                           "metadata": {"version": _version(run, task)}} for task, cell in found.items()},
        "versions": {task: _version(run, task) for task in found},
        "n-shot": {task: cells[task].shots or 0 for task in found},
        "higher_is_better": {task: {metric_of(run, cell.rows): True} for task, cell in found.items()},
        "n-samples": {task: {"original": original[task], "effective": len(cell.rows)} for task, cell in found.items()},
        "config": {"model": "kvcli", "model_args": f"pretrained={run.model},{variant.text}", "batch_size": None,
                   "batch_sizes": [], "device": None, "use_cache": None, "limit": run.config("limit"),
                   "bootstrap_iters": 0, "gen_kwargs": None, "model_revision": _identity(run, "revision"),
                   "model_dtype": _identity(run, "dtype"), "kvcli": _facts(run, variant, found)},
        "git_hash": ((run.meta.get("provenance") or {}).get("git") or {}).get("commit"), "date": started,
        "transformers_version": versions.get("transformers"), "lm_eval_version": None, "upper_git_hash": None,
        "task_hashes": hashes, "model_source": "kvcli", "model_name": _model_name(run, variant),
        "model_name_sanitized": _UNSAFE.sub("__", _model_name(run, variant)),
        "system_instruction": _identity(run, "system"), "system_instruction_sha": _sha(_identity(run, "system")),
        "fewshot_as_multiturn": None, "chat_template": None, "chat_template_sha": None,
    }  # fmt: skip


def _facts(run: Run, variant: Variant, found: dict[str, Scored]) -> dict[str, Any]:
    """As `config.kvcli` of kvcli's model for lm-eval, per task where tasks differ."""
    return {
        "version": run.meta.get("kvcli"), **variant.settings,
        "measured_ratio": {task: mean_of(run.measured_ratio[cell.rows]) for task, cell in found.items()},
        "outputs": {task: shares_of(run, cell.rows) for task, cell in found.items()},
        "failed": {task: cell.failed for task, cell in found.items()},
        "cells": {task: run.cells[variant.cells[task]].cell_id for task in found},
    }  # fmt: skip


def _metrics(run: Run, task: str, cell: Scored) -> dict[str, Any]:
    name = metric_of(run, cell.rows)
    metrics: dict[str, Any] = {
        "name": task, "alias": task, "sample_len": len(cell.rows), f"{name},{FILTER}": cell.mean,
        f"{name}_stderr,{FILTER}": "N/A" if cell.error is None else cell.error,
    }  # fmt: skip
    for extra, column in run.extra.items():
        mean = mean_of(column[cell.rows])
        if mean is not None and extra != name:
            metrics[f"{extra},{FILTER}"], metrics[f"{extra}_stderr,{FILTER}"] = mean, "N/A"
    return metrics


def _version(run: Run, task: str) -> Any:
    return run.task_facts(task).get("version")


def _identity(run: Run, key: str) -> Any:
    identity = run.meta.get("identity")
    return identity.get(key) if isinstance(identity, dict) else None


def _write_samples(path: Path, records: Iterable[tuple[int, dict[str, Any]]]) -> str:
    """records: with the place of the sample among all of its task, which is its number in every variant. Returns
    lm-eval's hash of the task: of all samples' hashes, one after the other."""
    digest = hashlib.sha256()
    with replacing(path) as part, part.open("wb") as file:
        for number, record in records:
            sample = _sample(number, record)
            digest.update((sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"]).encode())
            file.write(json_line(sample))
    return digest.hexdigest()


def _sample(number: int, record: dict[str, Any]) -> dict[str, Any]:
    doc = {"id": record["sample_id"], "cluster": record.get("cluster")}
    name, target = record.get("metric") or "score", "" if record.get("target") is None else str(record["target"])
    answers = _answers(record)
    scores = {name: record["score"], **{k: v for k, v in (record.get("extra") or {}).items() if k != name}}
    keys = ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash",
            "prompt_hash", "target_hash")  # fmt: skip
    return {
        "doc_id": number, "doc": doc, "target": target,
        "arguments": {f"gen_args_{i}": {"arg_0": record["prompt"] or "", "arg_1": ""} for i in range(len(answers[0]))},
        "resps": answers[0], "filtered_resps": answers[1], "filter": FILTER, "metrics": list(scores),
        "doc_hash": _sha(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _sha(record["prompt"]) or record.get("prompt_sha") or "", "target_hash": _sha(target) or "",
        **{k: v for k, v in scores.items() if k not in keys},
    }  # fmt: skip


def _answers(record: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """(resps, filtered_resps). Options have [log-likelihood, whether it is the greedy text] each; the latter was not
    measured."""
    if record.get("options"):
        pairs = [[str(value), "None"] for value in record["options"]]
        return [[pair] for pair in pairs], pairs
    output, extracted = record.get("output"), record.get("extracted")
    none = INVALID if output is not None else ""  # a text that is left out is not one without an answer
    return [[output or ""]], [none if extracted is None else str(extracted)]


def _sha(text: Any) -> str | None:
    return hashlib.sha256(str(text).encode("utf-8", "backslashreplace")).hexdigest() if text is not None else None
