"""What `kvcli show` lists: the tasks of a folder, and a task's samples with how many cells changed their score."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from kvcli.cli import output
from kvcli.cli.show_pick import Pick, Record, filtered, records_of
from kvcli.results import store
from kvcli.weights.spec import DENSE


def show_tasks(folder: Path, pick: Pick, as_json: bool) -> None:
    """The folder's tasks; their methods as tables order them, full first."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    records = store.read_records(folder, ("task", "method", "ratio", "weights"))
    axes = (("samples", "sample_id"), ("cells", "cell_id"), ("methods", "method"), ("weights", "weights"))
    for record in filtered(records, "task", pick, f"kvcli show {folder}"):
        facts = found.setdefault(record["task"], {name: {} for name, _ in axes})
        for name, value in axes:
            facts[name][record[value] or DENSE] = None
    order = _methods(folder)
    rows = [
        {"task": task, "samples": len(f["samples"]), "cells": len(f["cells"]),
         "methods": sorted(f["methods"], key=lambda m: order.get(m, len(order))), "weights": list(f["weights"])}
        for task, f in found.items()
    ]  # fmt: skip
    if as_json:
        output.json_result(rows)
        return
    headers = ["task", "samples", "cells", "methods"]
    headers += ["weights"] if any(row["weights"] != [DENSE] for row in rows) else []
    output.result(output.table(headers, [[_listed(row[name]) for name in headers] for row in rows]))
    if rows:
        output.next_command(f"kvcli show {folder} --task {rows[0]['task']}{pick.options()}")


def _methods(folder: Path) -> dict[str, int]:
    """Method -> its place: full, then as the last command named them, then as earlier ones did."""
    run = store.read_run(folder) if (folder / store.RUN).is_file() else {}
    asked = (run.get("config") or {}).get("methods") or ()
    cells = (str(cell.get("method")) for cell in (run.get("cells") or {}).values())
    return {name: place for place, name in enumerate(dict.fromkeys(["full", *asked, *cells]))}


def _listed(value: Any) -> Any:
    return " ".join(value) if isinstance(value, list) else value


def show_samples(folder: Path, task: str, pick: Pick, as_json: bool) -> None:
    """A task's samples: those that most cells score lower than full first, then those they score higher."""
    records = records_of(folder, task, ("score", "method", "ratio", "weights", "prompt_sha", "draw"))
    found: dict[str, list[Record]] = {}
    for record in filtered(records, "sample_id", pick, f"kvcli show {folder} --task {task}"):
        found.setdefault(record["sample_id"], []).append(record)
    samples = [_sample(folder, task, name, own) for name, own in found.items()]
    samples.sort(key=lambda s: (-s["worse"], -s["better"], not s["kept_marked"]))
    if as_json:
        output.json_result(samples)
        return
    headers = ("sample", "cells", "full", "mean score", "worse", "better", "kept tokens")
    output.result(output.table(headers, [_line(sample) for sample in samples]))
    changed = sum(bool(s["worse"] or s["better"]) for s in samples)
    of = output.count(len(samples), "sample")
    output.note(f"worse, better: cells that score lower or higher than full; changed: {changed} of {of}")
    output.next_command(f"kvcli show {folder} --task {task} --sample {samples[0]['sample']}{pick.options()}")


def _sample(folder: Path, task: str, name: str, records: list[Record]) -> dict[str, Any]:
    """Its cells against full of the same prompt and weights, of the same draw where answers were drawn."""
    scored = [record for record in records if record["score"] is not None]
    full: dict[tuple[Any, ...], list[float]] = {}
    for record in (r for r in scored if r["method"] == "full"):
        prompt, draw = (record["prompt_sha"], record["weights"]), record["draw"] or 0
        for key in (prompt, (*prompt, draw)):
            full.setdefault(key, []).append(record["score"])
    changes = []
    for record in (r for r in scored if r["method"] != "full"):
        prompt = (record["prompt_sha"], record["weights"])
        beside = full.get((*prompt, record["draw"] or 0)) or full.get(prompt)
        changes += [record["score"] - mean(beside)] if beside else []
    every = [score for (_, _, *draw), scores in full.items() if not draw for score in scores]
    return {
        "sample": name, "cells": len(records), "mean_score": _mean([r["score"] for r in scored]), "full": _mean(every),
        "worse": sum(change < 0 for change in changes), "better": sum(change > 0 for change in changes),
        "kept_marked": store.map_path(folder, task, name, "any").parent.is_dir(),
    }  # fmt: skip


def _mean(values: list[float]) -> float | None:
    return mean(values) if values else None


def _line(sample: dict[str, Any]) -> tuple[Any, ...]:
    scores = (None if sample[name] is None else round(sample[name], 3) for name in ("full", "mean_score"))
    marked = "stored" if sample["kept_marked"] else "-"
    return sample["sample"], sample["cells"], *scores, sample["worse"], sample["better"], marked
