"""What `run` and `sweep` do once their options are a config: check, plan, announce, run, print the table."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

from kvcli.cli import output
from kvcli.config import SweepConfig
from kvcli.errors import Exit


def perform(config: SweepConfig, passed: dict[str, Any], *, dry_run: bool, json: bool) -> int:
    """Returns the exit code. Raises KvcliError for everything the user can mend."""
    from kvcli.engine.prepare import check

    quiet_libraries()
    request = check(config)
    _threads(config)
    output.note(f"results: {request.out}")
    from kvcli.engine.session import execute, open_session

    session = open_session(request, lambda text: None)
    _announce(session, json=json and dry_run, dry_run=dry_run)
    if dry_run:
        return Exit.DONE
    from kvcli.engine.stop import StopRequest

    with StopRequest(config.max_time) as stop, output.progress("sweep") as bar:
        outcome = execute(
            session,
            argv=["kvcli", *sys.argv[1:]],
            passed=passed,
            say=output.note,
            warn=output.warn,
            progress=lambda done, total, label: bar.update(done, total, task=label),
            stop=stop.asked,
        )
    return _finish(session, outcome, stop.reason, json)


def quiet_libraries() -> None:
    """Libraries' own bars and advice have no place between kvcli's lines."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow down whatever runs beside them


def _threads(config: SweepConfig) -> None:
    """Before torch is imported: it reads the number of threads once."""
    if config.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)


def _announce(session: Any, *, json: bool, dry_run: bool) -> None:
    """Cells, samples, sharing, time and size: to stdout for --dry-run, else to stderr."""
    facts = session.estimate()
    if json:
        from dataclasses import asdict

        output.json_result(
            {"out": str(session.folder), **asdict(facts), "cells_list": [c.describe() for c in session.wanted]}
        )
        return
    shared = facts.separate_prefill_tokens / max(1, facts.prefill_tokens)
    lines = [
        f"{facts.cells} cells, {facts.samples} prompts, {facts.records:,} records "
        f"({facts.record_bytes / 2**20:.1f} MiB)",
        f"{facts.prefill_tokens:,} tokens to prefill ({shared:.0f} times fewer than cell by cell), "
        f"up to {facts.decode_tokens:,} to decode, {facts.cache_bytes / 2**20:.0f} MiB of caches",
        f"about {output.duration(facts.seconds)} in all ({session.prepared.dtype} on {session.prepared.device})",
    ]
    if dry_run:
        output.result("\n".join(lines))
    else:
        for line in lines:
            output.note(line)


def _finish(session: Any, outcome: Any, reason: str, json: bool) -> int:
    from kvcli.analysis.load import load_run
    from kvcli.analysis.tables import summarise
    from kvcli.cli import tables

    folder = str(session.folder)
    if outcome.stopped:
        output.warn(f"stopped by {reason}; everything finished is saved")
        output.next_command(f"{shlex.join(['kvcli', *sys.argv[1:]])}     (goes on where it stopped)")
        return int(outcome.stopped)
    summary = summarise(load_run(session.folder))
    if json:
        output.json_result(tables.as_json(summary))
    else:
        output.result(tables.SummaryView(summary))
    if outcome.errors:
        output.warn(
            f"{outcome.errors} samples failed: kvcli show {folder} has the messages; the same command tries them again"
        )
    output.next_command(f"kvcli report {shlex.quote(folder)}")
    return Exit.FAILED_SAMPLES if outcome.errors else Exit.DONE
