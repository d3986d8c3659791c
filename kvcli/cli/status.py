"""kvcli status: how far a result folder is. Reads the folder only, so it works while a sweep writes to it."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcli.cli import output
from kvcli.cli.following import next_in, state_of
from kvcli.results import store
from kvcli.results.planned import planned


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
    asked = planned(run, Counter(str(record["cell_id"]) for record in records))
    tasks = [_task(name, run, records, asked) for name in _task_names(run, records)]
    done, errors = (sum(task[what] for task in tasks) for what in ("done", "errors"))
    return {
        "folder": str(folder), "status": state_of(folder, run), "writers": store.writers(folder),
        "model": run.get("config", {}).get("model"), "updated": run.get("updated"),
        "done": done, "errors": errors, "planned": sum(asked.values()), "tasks": tasks, "resume": _resume(run),
    }  # fmt: skip


def _task_names(run: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys([*run.get("tasks", {}), *(str(record["task"]) for record in records)]))


def _task(name: str, run: dict[str, Any], records: list[dict[str, Any]], asked: dict[str, int]) -> dict[str, Any]:
    cells = [cell for cell, facts in run.get("cells", {}).items() if facts.get("task") == name]
    states = Counter(record["status"] for record in records if record["task"] == name)
    return {
        "task": name, "cells": len(cells), "done": states["ok"], "errors": states["error"],
        "planned": sum(asked.get(cell, 0) for cell in cells),
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
        f"{facts['done']} of {output.count(planned, 'record')}{share}"
        + (f", {facts['errors']} failed" if facts["errors"] else ""),
        *(f"written by {writer}" for writer in facts["writers"]),
    ]
    output.result("\n".join(lines))
    headers = ("task", "cells", "done", "planned", "failed")
    rows = [(t["task"], t["cells"], t["done"], t["planned"], t["errors"]) for t in facts["tasks"]]
    output.result(output.table(headers, rows))
    if facts["done"] < planned and not facts["writers"] and facts["resume"]:
        output.next_command(f"{facts['resume']}     (goes on where it stopped)")
    else:
        next_in(Path(facts["folder"]), shlex.join(["kvcli", "show", facts["folder"]]))
