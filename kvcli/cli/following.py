"""What a command says of the state its folder is in, and what to type next where its report may be written already."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcli.cli import output
from kvcli.results import store
from kvcli.results.planned import planned

REPORT = "report.md"


def reported(folder: Path) -> bool:
    """Whether the folder's report is newer than its records."""
    path = folder / REPORT
    written = [file.stat().st_mtime for file in store.record_files(folder)]
    return path.is_file() and bool(written) and path.stat().st_mtime >= max(written)


def state_of(folder: Path, run: Mapping[str, Any]) -> str:
    """The status in run.json; 'interrupted' where it says running and nobody writes."""
    state = str(run.get("status", "unknown"))
    return "interrupted" if state == "running" and not store.writers(folder) else state


def unfinished(folder: Path, records: int) -> str:
    """What is to be said beside the numbers of a folder whose samples are not all in; empty where they are.

    records: how many were read.
    """
    run = store.read_run(folder) if (folder / store.RUN).is_file() else {}
    state = state_of(folder, run)
    if state in ("done", "unknown"):
        return ""
    whole = sum(planned(run, {}).values())
    of = f"{records:,} of {output.count(whole, 'record')}" if whole > records else output.count(records, "record")
    go_on = "" if state == "running" else f"; kvcli status {folder} says how to go on"
    return f"{folder} is not finished ({state}): {of}{go_on}"


def next_in(folder: Path, then: str) -> None:
    """Ends a command with `kvcli report`; where that was done with these records, with `then`."""
    output.next_command(then if reported(folder) else shlex.join(["kvcli", "report", str(folder)]))
