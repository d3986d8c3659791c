"""A run as records of Every Eval Ever: per variant one log of all its tasks and, beside it, a line per sample.

Follows schema 0.3.0 (evaleval/every_eval_ever, every_eval_ever/schemas/eval.schema.json and
instance_level_eval.schema.json, with the rules of its validator): data/COLLECTION/DEVELOPER/MODEL/UUID.json and
UUID_samples.jsonl. What was compressed and how much stands in `evaluation_id`, `generation_config` and
`eval_library`, for the model stays the same model. UUIDs follow from `evaluation_id`: a second export replaces the
first.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from kvcli import __version__
from kvcli.analysis.exports.shared import (
    Scored,
    Variant,
    Wanted,
    axes_of,
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
)
from kvcli.analysis.reading.load import Run
from kvcli.analysis.statistics.stats import LEVEL, is_binary, score_interval
from kvcli.analysis.tables.cells import rows_of_cells

SCHEMA_VERSION = "0.3.0"
COLLECTION = "kvcli"
_UNSAFE = re.compile(r'[<>:"\\|?*/\x00-\x1f]')


def write_every_eval_ever(run: Run, out: Path, wanted: Wanted) -> list[Path]:
    """`data/...` under `out`. Failed samples are left out: a record there has a score."""
    rows_of, prompts, written = rows_of_cells(run), prompts_of(run), []
    scores = {task: run.score[rows] for task, rows in rows_of_tasks(run, rows_of).items()}
    binary = {task for task, values in scores.items() if is_binary(values[~np.isnan(values)])}
    for variant in variants(run):
        found = {task: scored(run, rows_of[code]) for task, code in variant.cells.items()}
        found = {task: cell for task, cell in found.items() if len(cell.rows)}
        if found:
            written += _write_variant(run, out, variant, found, wanted, prompts, binary)
    return written


def _write_variant(
    run: Run, out: Path, variant: Variant, found: dict[str, Scored], wanted: Wanted, prompts: dict[str, str],
    binary: set[str],
) -> list[Path]:  # fmt: skip
    """binary: tasks whose scores are 0 or 1 in all cells: a graded one may be 0 throughout one of them."""
    model = model_id(run)
    developer, name = model.split("/", 1)
    identity = f"{COLLECTION}/{model}/{run.name}/{variant.text}/{_epoch(run, 'created')}"
    stem = str(uuid.UUID(bytes=hashlib.sha256(identity.encode()).digest()[:16], version=4))
    place = "/".join(("data", COLLECTION, _UNSAFE.sub("_", developer), _UNSAFE.sub("_", name)))
    samples = out / place / f"{stem}_samples.jsonl"
    digest, count = hashlib.sha256(), 0
    with replacing(samples) as part, part.open("wb") as file:
        for task, cell in found.items():
            shown = wanted.harmful or not hidden(run, task)
            for record in records_of(run, cell.rows, shown, prompts):
                line = json_line(_sample(record, identity, model, shown))
                file.write(line)
                digest.update(line)
                count += 1
    log = _log(run, variant, found, wanted, identity, binary)
    log["detailed_evaluation_results"] = {
        "format": "jsonl", "file_path": f"{place}/{samples.name}", "hash_algorithm": "sha256",
        "checksum": digest.hexdigest(), "total_rows": count,
    }  # fmt: skip
    return [write_json(out / place / f"{stem}.json", log), samples]


def model_id(run: Run) -> str:
    """The hub id. A model without one is `local/NAME`, those that come with kvcli `kvcli/NAME`."""
    identity = run.meta.get("identity")
    name = str((identity.get("model") if isinstance(identity, dict) else None) or run.model)
    name = name.rpartition(":")[2].rstrip("/. ")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return name
    name = _UNSAFE.sub("_", name) or "model"
    return f"kvcli/{name}" if name.startswith("testbed") else f"local/{name}"


def _epoch(run: Run, key: str) -> str:
    return str(int(when(run, key).timestamp()))


def _log(
    run: Run, variant: Variant, found: dict[str, Scored], wanted: Wanted, identity: str, binary: set[str]
) -> dict[str, Any]:
    model = model_id(run)
    own = model.startswith(("kvcli/", "local/"))
    versions = run.meta.get("provenance", {}).get("versions", {})
    facts = {k: run.meta.get("identity", {}).get(k) for k in ("revision", "dtype", "template", "truncate")}
    return {
        "schema_version": SCHEMA_VERSION, "evaluation_id": identity,
        "evaluation_timestamp": _epoch(run, "updated"), "retrieved_timestamp": str(int(time.time())),
        "source_metadata": {
            "source_name": "kvcli", "source_type": "evaluation_run", "source_organization_name": wanted.organization,
            "evaluator_relationship": wanted.relationship,
        },
        "eval_library": {"name": "kvcli", "version": str(run.meta.get("kvcli") or __version__),
                         "additional_details": _strings({"variant": variant.text, **versions})},
        "model_info": {
            "name": run.model, "id": model, "developer": model.split("/", 1)[0],
            "inference_engine": {"name": "kvcli", "version": str(run.meta.get("kvcli") or __version__)},
            "additional_details": {"deployment_type": "self_deployed",
                                   "model_availability": "unknown" if own else "open_weights", **_strings(facts)},
        },
        "evaluation_results": [_result(run, task, variant.cells[task], cell, task in binary)
                               for task, cell in found.items()],
    }  # fmt: skip


def _result(run: Run, task: str, code: int, cell: Scored, binary: bool) -> dict[str, Any]:
    metric, about = metric_of(run, cell.rows), run.cells[code]
    kept = {"measured_ratio": mean_of(run.measured_ratio[cell.rows]), "failed_samples": cell.failed,
            **shares_of(run, cell.rows)}  # fmt: skip
    return {
        "evaluation_result_id": about.cell_id, "evaluation_name": task,
        "source_data": {"dataset_name": task, "source_type": "other",
                        "additional_details": _strings({"task_version": run.task_facts(task).get("version"),
                                                        "ability": about.ability})},
        "evaluation_timestamp": _epoch(run, "updated"),
        "metric_config": {
            "metric_id": metric if metric == "accuracy" else f"kvcli.{metric}", "metric_name": metric,
            "metric_unit": "proportion", "lower_is_better": False,
            "score_type": "binary" if binary else "continuous", "min_score": 0.0, "max_score": 1.0,
        },
        "score_details": {"score": cell.mean, "details": _strings(kept), "uncertainty": _uncertainty(run, cell)},
        "generation_config": {"generation_args": _generation(run, about.cell_id),
                              "additional_details": _strings(axes_of(about) | kept)},
    }  # fmt: skip


def _generation(run: Run, cell_id: str) -> dict[str, Any]:
    described = run.meta.get("cells", {}).get(cell_id, {})
    args = {"temperature": described.get("temperature"), "top_p": described.get("top_p")}
    most = described.get("max_new_tokens")
    return args | ({"max_tokens": most} if isinstance(most, int) and most > 0 else {})


def _uncertainty(run: Run, cell: Scored) -> dict[str, Any]:
    """The standard error only where samples are independent: the schema has no word for clusters."""
    values, cluster = run.score[cell.rows], run.cluster[cell.rows]
    ends, named = score_interval(values, cluster), cluster[cluster >= 0]
    found: dict[str, Any] = {"num_samples": len(values)}
    if cell.error is not None:
        found["standard_deviation"] = float(values.std(ddof=1))
        if len(np.unique(named)) == len(named):
            found["standard_error"] = {"value": cell.error, "method": "analytic"}
    if ends is not None:
        found["confidence_interval"] = {"lower": ends.low, "upper": ends.high, "confidence_level": LEVEL,
                                        "method": ends.method}  # fmt: skip
    return found


def _sample(record: dict[str, Any], identity: str, model: str, shown: bool) -> dict[str, Any]:
    prompt, target, extracted = record["prompt"], record.get("target"), record.get("extracted")
    reference = [] if target is None else [str(target)]
    hashed = json.dumps({"raw": prompt, "reference": reference}, sort_keys=True, separators=(",", ":"))
    about = {
        "prompt_sha": record.get("prompt_sha"), "cluster": record.get("cluster"), "finish": record.get("finish"),
        "measured_ratio": record.get("measured_ratio"), "flags": " ".join(record.get("flags") or ()) or None,
        "options": record.get("options"), "texts": None if shown else "left out: a harmful task",
    }  # fmt: skip
    line: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "evaluation_id": identity, "model_id": model,
        "evaluation_name": record["task"], "evaluation_result_id": record["cell_id"],
        "sample_id": str(record["sample_id"]),
        "sample_hash": None if prompt is None else hashlib.sha256(hashed.encode()).hexdigest(),
        "interaction_type": "single_turn", "input": {"raw": prompt or "", "reference": reference},
        "output": {"raw": [] if record.get("output") is None else [record["output"]]},
        "answer_attribution": [] if extracted is None else [{
            "turn_idx": 0, "source": "output.raw", "extracted_value": str(extracted),
            "extraction_method": str(record.get("metric") or "unknown"), "is_terminal": True}],
        "evaluation": {"score": record["score"], "is_correct": record["score"] == 1},
        "metadata": _strings(about),
    }  # fmt: skip
    tokens = record.get("n_prompt"), record.get("n_new")
    if None not in tokens:
        line["token_usage"] = {"input_tokens": tokens[0], "output_tokens": tokens[1], "total_tokens": sum(tokens)}
    return line


def _strings(values: dict[str, Any]) -> dict[str, str]:
    """Values as the schema's additional details take them; those that are None left out."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items() if v is not None}
