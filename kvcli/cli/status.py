"""kvcli status: how far a result folder is. Reads the folder only, so it works while a sweep writes to it."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcli.cli import output
from kvcli.results import store


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A result folder, its name or a unique beginning of it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show how far a result folder is.

    Examples:
      kvcli status runs/demo
      kvcli status runs/demo --json
    """
    facts = status(store.find_run(run))
    output.json_result(facts) if as_json else _print(facts)


def status(folder: Path) -> dict[str, Any]:
    """State, writers, finished and planned records in all and per task, and the command that goes on."""
    run = store.read_run(folder)
    records = store.read_records(folder, ("task",))
    planned = _planned(run, records)
    tasks = [_task(name, run, records, planned) for name in _task_names(run, records)]
    done, errors = (sum(task[what] for task in tasks) for what in ("done", "errors"))
    writers = store.writers(folder)
    state = run.get("status", "unknown")
    return {
        "folder": str(folder), "status": "interrupted" if state == "running" and not writers else state,
        "writers": writers, "model": run.get("config", {}).get("model"), "updated": run.get("updated"),
        "done": done, "errors": errors, "planned": sum(planned.values()), "tasks": tasks, "resume": _resume(run),
    }  # fmt: skip


def _planned(run: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, int]:
    """Samples asked for per cell: the limit of its generation, at most what the task has."""
    seen = Counter(record["cell_id"] for record in records)
    cells = run.get("cells", {})
    most: Counter[str] = Counter()
    for cell, count in seen.items():
        task = cells.get(cell, {}).get("task", "")
        most[task] = max(most[task], count)
    planned: dict[str, int] = {cell: count for cell, count in seen.items() if cell in cells}
    for generation in run.get("generations", []):
        limit = generation.get("grid", {}).get("limit")
        for cell in generation.get("cells", []):
            task = cells.get(cell, {}).get("task", "")
            known = run.get("tasks", {}).get(task, {}).get("samples")
            has = (limit or most[task]) if known is None else known
            planned[cell] = max(planned.get(cell, 0), min(has, limit or has))
    return planned


def _task_names(run: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys([*run.get("tasks", {}), *(str(record["task"]) for record in records)]))


def _task(name: str, run: dict[str, Any], records: list[dict[str, Any]], planned: dict[str, int]) -> dict[str, Any]:
    cells = [cell for cell, facts in run.get("cells", {}).items() if facts.get("task") == name]
    states = Counter(record["status"] for record in records if record["task"] == name)
    return {
        "task": name, "cells": len(cells), "done": states["ok"], "errors": states["error"],
        "planned": sum(planned.get(cell, 0) for cell in cells),
    }  # fmt: skip


def _resume(run: dict[str, Any]) -> str | None:
    argv = run.get("argv") or []
    if argv and Path(str(argv[0])).name in ("kvcli", "__main__.py"):
        argv = argv[1:]
    return shlex.join(["kvcli", *map(str, argv)]) if argv else None


def _print(facts: dict[str, Any]) -> None:
    planned = facts["planned"]
    share = f" ({100 * facts['done'] // planned} %)" if planned else ""
    lines = [
        f"{facts['folder']}: {facts['status']}, model {facts['model']}, updated {facts['updated']}",
        f"{facts['done']} of {planned} records{share}" + (f", {facts['errors']} failed" if facts["errors"] else ""),
        *(f"written by {writer}" for writer in facts["writers"]),
    ]
    output.result("\n".join(lines))
    headers = ("task", "cells", "done", "planned", "failed")
    rows = [(t["task"], t["cells"], t["done"], t["planned"], t["errors"]) for t in facts["tasks"]]
    output.result(output.table(headers, rows))
    if facts["done"] < planned and not facts["writers"] and facts["resume"]:
        output.next_command(f"{facts['resume']}     (goes on where it stopped)")
    else:
        output.next_command(f"kvcli report {facts['folder']}")
