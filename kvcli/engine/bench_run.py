"""Runs the processes of a benchmark and writes what they measure: one line of bench.jsonl per measurement."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcli.engine.bench import Job, Plan
from kvcli.engine.caches import STORAGE, storage_of
from kvcli.errors import Exit, KvcliError
from kvcli.methods import catalog
from kvcli.results import store

SCHEMA = 1
POLL_SECONDS = 0.2

FIELDS = {
    "schema": "version of this table",
    "kind": "bench",
    "shared": "false: these times belong to the method alone",
    "at": "when it was written (UTC)",
    "status": "ok | error",
    "error": "message of a failed measurement, else null",
    "model": "text of --model",
    "revision": "commit of a hub model, else hash of config and weights",
    "method": "canonical text of the method",
    "settings": "all settings of the method, defaults included",
    "method_kind": "evict | in-prefill | transform | composed | read",
    "ratio": "requested kept ratio; null for a method that takes none",
    "decode": "how generated tokens are compressed; null where they are all kept",
    "storage": "what the decode cache does with its pairs: " + "; ".join(f"{k}: {v}" for k, v in STORAGE.items()),
    "measured_ratio": "kv_bytes: kept over full",
    "flags": "what the method said of these prompts, as in samples.jsonl",
    "needs": "statistics captured in the prefill for this method",
    "first_token": "prefill: the dense prefill's logits give it",
    "batch": "rows measured",
    "batch_asked": "rows asked for: a number or max",
    "prompt_tokens": "tokens of each prompt",
    "new_tokens": "decode steps",
    "repeats": "timed passes in this process, after one warm-up pass",
    "round": "which round of processes (--rounds)",
    "seed": "seed of the prompts and of random methods",
    "strict_window": "as asked for",
    "dtype": "of weights and cache",
    "device": "of the model",
    "device_name": "name of the GPU or CPU",
    "threads": "CPU threads of torch",
    "attn": "as asked for",
    "seconds": "{name: {median, min, max, all}} over the repeats",
    "cpu_share": "CPU seconds of the process per second of its timed phases; below 1 on a CPU, others had the cores",
    "tokens_per_second": "{median, min, max, all} of the decode steps after the first, all rows together",
    "memory": "{source, idle, prefill, compress, decode, limit}: bytes; peaks of the whole process or device, null "
    "where they cannot be read",
    "kv_bytes": "{full, kept, end, read}: 16-bit bytes of one prompt's full cache, of what was kept of it (in the form "
    "in which it is stored, tables and scales included), of that and all new tokens, and read per new token where the "
    "method chooses what to read, else null; means over rows",
    "alloc_bytes": "bytes of the decode cache per row at its end: padding and room for new tokens included and, where "
    "rows go on evicting, positions and the method's figures",
    "buffer_bytes": "those of them that are one layer written out for attention to read, where storage is stored; "
    "else 0",
    "provenance": "versions, commit, hardware, cluster job",
}
"""Fields of a line of bench.jsonl; docs/bench.md says how each is measured."""


@dataclass
class Outcome:
    """records: all lines of this command, failed ones too."""

    records: list[dict[str, Any]] = field(default_factory=list)
    stopped: Exit | None = None

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [r for r in self.records if r["status"] != "ok"]


class Child:
    """A process that measures one job. Its messages are JSON lines on a pipe of their own; it ends with its parent."""

    def __init__(self, job: Job) -> None:
        read, write = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-P", "-m", "kvcli.engine.measure", str(write)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, pass_fds=(write,),
                env=_child_env(job),
            )  # fmt: skip
        finally:
            os.close(write)
        self._pipe = read
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once: `failure` says why
            self._process.stdin.write(job.to_json().encode() + b"\n")
            self._process.stdin.flush()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # no harm where it has ended
        self._process.wait()
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        os.close(self._pipe)
        self._log.close()

    def messages(self, stop: Callable[[], Any]) -> Iterator[dict[str, Any]]:
        """Everything it says until it ends or `stop()`."""
        rest = b""
        while not stop():
            if not select.select([self._pipe], [], [], POLL_SECONDS)[0]:
                continue
            chunk = os.read(self._pipe, 1 << 16)
            if not chunk:
                self._process.wait()
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (json.loads(line) for line in lines)

    def failure(self) -> str:
        """Why it ended early: a signal, or the last line it printed; empty when it ended well."""
        code = self._process.wait()
        if code == 0:
            return ""
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        if code < 0:
            killed = f"killed by {signal.Signals(-code).name}"
            why = ": probably out of memory" if -code == signal.SIGKILL else f": {last}" if last else ""
            return killed + why
        return last or f"ended with code {code}"


def _child_env(job: Job) -> dict[str, str]:
    """This process's environment, with the package it runs from and the number of threads."""
    root = str(Path(__file__).parents[2])
    old = os.environ.get("PYTHONPATH")
    threads = {"OMP_NUM_THREADS": str(job.threads)} if job.threads else {}
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{old}" if old else root, **threads}


def run(
    plan: Plan,
    *,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
    warn: Callable[[str], None] = lambda text: None,
    stop: Callable[[], Exit | None] = lambda: None,
) -> Outcome:
    """Runs every process of the plan, round after round, and appends each measurement to the plan's file as it comes.

    A process that fails leaves an error line per missing measurement, and the rest goes on. Raises KvcliError when the
    first process finds that the command itself cannot work (no such model, tokens that do not fit).
    """
    outcome = Outcome()
    for number in range(plan.rounds):
        for job in plan.jobs:
            outcome.stopped = outcome.stopped or stop()
            if outcome.stopped is None:
                _run_job(plan, job, number, outcome, progress, warn, stop)
    return outcome


def _run_job(
    plan: Plan, job: Job, number: int, outcome: Outcome, progress: Callable[[int, int, str], None],
    warn: Callable[[str], None], stop: Callable[[], Exit | None],
) -> None:  # fmt: skip
    missing = list(job.batches)
    problem: KvcliError | None = None

    def keep(record: dict[str, Any]) -> None:
        record = {**dict.fromkeys(FIELDS), **_asked(job, number), **record}
        missing.remove(record["batch_asked"])
        append(plan.file, record)
        outcome.records.append(record)
        if record["status"] != "ok":
            warn(f"{job.label}, batch {record['batch_asked']}: {record['error']}")

    progress(len(outcome.records), plan.measurements, f"{job.label}: starting")
    with Child(job) as child:
        for message in child.messages(stop):
            if "record" in message:
                keep(message["record"])
            elif "problem" in message:
                problem = KvcliError(**{**message["problem"], "code": Exit(message["problem"]["code"])})
            else:
                progress(len(outcome.records), plan.measurements, f"{job.label}: {message['progress']}")
        outcome.stopped = stop()
        if outcome.stopped is not None:
            return
        if problem is not None and not outcome.records:
            raise problem
        why = problem.what if problem is not None else child.failure()
    for batch in list(missing):
        keep({"status": "error", "error": why or "it ended without a result", "batch_asked": batch})
    progress(len(outcome.records), plan.measurements, job.label)


def _asked(job: Job, number: int) -> dict[str, Any]:
    """What a line says of the command, whatever came of it."""
    method = catalog.build(job.method)
    return {
        "schema": SCHEMA, "kind": "bench", "shared": False, "at": store.now(), "model": job.model,
        "method": job.method, "settings": method.settings(), "method_kind": method.kind,
        "ratio": None if job.ratio is None else float(job.ratio), "decode": job.decode,
        "storage": storage_of(method, job.decode), "flags": [], "needs": sorted(method.needs()),
        "first_token": "prefill",
        "prompt_tokens": job.prompt_tokens, "new_tokens": job.new_tokens, "repeats": job.repeats, "round": number,
        "seed": job.seed, "strict_window": job.strict_window, "dtype": job.dtype, "device": job.device,
        "attn": job.attn,
    }  # fmt: skip


def append(file: Path, record: dict[str, Any]) -> None:
    """One line, written whole. Raises OSError when it cannot be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = store.encode(record)
    with file.open("ab", buffering=0) as out:
        out.write(line)
        os.fsync(out.fileno())
