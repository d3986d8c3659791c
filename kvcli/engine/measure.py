"""Times and memory of one method in this process: what `bench` starts for each method and ratio.

python -m kvcli.engine.measure FD < job      reads one line (bench.Job as JSON), writes JSON lines to the descriptor
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from kvcli.engine.bench import MAX, Job, Target, target
from kvcli.engine.bench_pass import Measured, Pass
from kvcli.engine.memory import is_out_of_memory
from kvcli.engine.meter import memory_of
from kvcli.engine.needs import PASSES, require
from kvcli.errors import KvcliError
from kvcli.methods import catalog
from kvcli.models import loader
from kvcli.models.wrapper import Model

T = TypeVar("T")

WARM_STEPS, PROBE_STEPS = 8, 2
MOST_ROWS = 4096
"""`--batch max` looks no further."""
SAVED_DIGITS = 9


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch that fits: doubling, then bisection. 0 when one row does not; whatever fits, fewer rows fit."""
    good, bad = 0, 1
    while fits(bad):
        good = bad
        if good == most:
            return good
        bad = min(2 * bad, most)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory left; cuBLAS says it in its own way."""
    return is_out_of_memory(error) or (isinstance(error, RuntimeError) and "ALLOC_FAILED" in str(error))


def attempt(run: Callable[[], T], settle: Callable[[], None]) -> T | None:
    """What `run` gives; None when memory ran out, with all that it held freed."""
    try:
        return run()
    except (RuntimeError, MemoryError) as e:
        if not ran_out(e):
            raise
    settle()  # outside the handler: the error's traceback holds the tensors
    return None


@dataclass(frozen=True)
class Runs:
    """The passes of one batch size: those that count for times and those that count for memory."""

    timed: list[Pass]
    weighed: list[Pass]

    def within(self, limit: int | None) -> bool:
        """Whether no more than `limit` bytes above the loaded model were needed."""
        return limit is None or all(p.above_idle is not None and p.above_idle <= limit for p in self.weighed)


def passes(measured: Measured, batch: int, limit: int | None, say: Callable[[str], None]) -> Runs | None:
    """One pass that warms up (and tells the memory where the timed ones cannot), then the timed repeats.

    None where more than `limit` bytes above the loaded model were needed.
    """
    job, weighed = measured.job, measured.memory.retains
    say(f"batch {batch}: warm-up")
    warm = measured.once(batch, min(job.new_tokens, WARM_STEPS), weigh=weighed)
    if weighed and not Runs([], [warm]).within(limit):
        return None
    timed = []
    for i in range(job.repeats):
        say(f"batch {batch}: repeat {i + 1} of {job.repeats}")
        timed.append(measured.once(batch, job.new_tokens))
    runs = Runs(timed, [warm] if weighed else timed)
    return runs if runs.within(limit) else None


def largest_passes(measured: Measured, limit: int | None, say: Callable[[str], None]) -> Runs | None:
    """The passes of the largest batch with which a whole measurement runs; None when not even one row fits."""
    settle = measured.memory.settle
    steps = min(measured.job.new_tokens, PROBE_STEPS)

    def fits(batch: int) -> bool:
        say(f"does a batch of {batch} fit?")
        done = attempt(lambda: measured.once(batch, steps, weigh=True, clones=True), settle)
        return done is not None and Runs([], [done]).within(limit)

    bound = largest(fits, MOST_ROWS)  # copies of one row need a little less than rows of their own
    return shrinking(lambda batch: attempt(lambda: passes(measured, batch, limit, say), settle), bound)


def shrinking(measure: Callable[[int], T | None], batch: int) -> T | None:
    """What the first of `batch`, then ever fewer rows, gives; None when none gives anything."""
    while batch:
        done = measure(batch)
        if done is not None:
            return done
        batch -= max(1, batch // 32)
    return None


def summary(values: Sequence[float]) -> dict[str, Any]:
    """median, min, max and all of a figure's repeats."""
    rounded = [round(v, SAVED_DIGITS) for v in values]
    return {"median": statistics.median(rounded), "min": min(rounded), "max": max(rounded), "all": rounded}


def figures(measured: Measured, runs: Runs, limit: int | None) -> dict[str, Any]:
    """The measured part of a line of bench.jsonl."""
    done = runs.timed
    by_name = [p.figures() for p in done]
    payload = statistics.mean(p.payload for p in done)
    reads = [p.read for p in done if p.read is not None]
    full = measured.full_bytes
    kv = {"full": full, "kept": round(payload), "end": round(statistics.mean(p.end for p in done)),
          "read": round(statistics.mean(reads)) if reads else None}  # fmt: skip
    return {
        "status": "ok", "batch": done[0].batch, "flags": sorted(frozenset().union(*(p.flags for p in done))),
        "seconds": {name: summary([f[name] for f in by_name]) for name in by_name[0]},
        "tokens_per_second": summary([p.rate for p in done]),
        "cpu_share": round(statistics.median(p.cpu_share for p in done), 3),
        "memory": {"source": measured.memory.source, **_memory(runs.weighed), "limit": limit},
        "kv_bytes": kv, "measured_ratio": round(payload / full, 6),
        "alloc_bytes": done[0].alloc, "buffer_bytes": done[0].buffer,
    }  # fmt: skip


def _memory(done: Sequence[Pass]) -> dict[str, int | None]:
    """Bytes, medians over the passes; `compress` is selecting and building."""
    if done[0].idle is None:
        return dict.fromkeys(("idle", "prefill", "compress", "decode"))

    def median(*names: str) -> int:
        return int(statistics.median(max(p.peaks[name] for name in names) for p in done))

    idle = int(statistics.median(p.idle for p in done if p.idle is not None))
    return {
        "idle": idle,
        "prefill": median("prefill"),
        "compress": median("select", "build"),
        "decode": median("decode"),
    }


def facts(job: Job, on: Target) -> dict[str, Any]:
    """What runs here, for the record."""
    from kvcli.models.source import fingerprint
    from kvcli.results import provenance

    collected = provenance.collect()
    device = torch.device(on.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else collected["hardware"]["cpu"]
    commit = getattr(on.config, "_commit_hash", None) if on.source.kind == "hub" else None
    return {
        "revision": commit or fingerprint(on.source)["revision"], "dtype": on.dtype, "device": on.device,
        "device_name": name, "threads": torch.get_num_threads(), "provenance": collected,
    }  # fmt: skip


def measure(job: Job, emit: Callable[[dict[str, Any]], None]) -> None:
    """Loads the job's model and measures each batch size. Emits {"progress": text} and {"record": fields}.

    Raises KvcliError for a model or a device that cannot be used, for one that lacks what the method needs, and for
    tokens that do not fit.
    """

    def say(text: str) -> None:
        emit({"progress": text})

    on = target(job)
    say(f"loading ({on.dtype}, {on.device})")
    _set_threads(job, on)
    hf = loader.load_weights(on.config, on.source, on.dtype, on.device, trust_remote_code=job.trust_remote_code)
    model = Model(hf, _tokenizer(job, on), name=job.model, attn=job.attn)
    require(model, {job.method: catalog.build(job.method).needs()})
    memory = memory_of(model.device)
    measured = Measured(job, model, memory)
    known = facts(job, on)
    limit = job.memory or (job.spare if model.device.type == "cpu" else None)
    say("warm-up")  # what the very first pass allocates for good is no batch's fault
    steps = job.new_tokens if measured.storage == "stored" else PROBE_STEPS  # a whole pass shows how far a form grows
    attempt(lambda: measured.once(1, steps), memory.settle)
    for asked in job.batches:
        emit({"record": {**known, "batch_asked": asked, **_measured(measured, asked, limit, say)}})


def _measured(measured: Measured, asked: int | str, limit: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """One batch size: its figures, or why there are none."""
    if asked == MAX:
        return _largest(measured, limit, say)
    runs = attempt(lambda: passes(measured, int(asked), None, say), measured.memory.settle)
    if runs is None:
        return {"status": "error", "error": f"out of memory with a batch of {asked}"}
    return figures(measured, runs, None)


def _largest(measured: Measured, limit: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    if limit is not None and measured.memory.now() is None:
        why = "the largest batch cannot be found: this machine does not tell a process's peak memory"
        return {"status": "error", "error": why}
    runs = largest_passes(measured, limit, say)
    if runs is None:
        within = f" within {limit / 2**20:,.0f} MiB" if limit is not None else ""
        return {"status": "error", "error": f"not even one row fits{within}"}
    return figures(measured, runs, limit)


def _tokenizer(job: Job, on: Target) -> Any:
    """None where nothing needs one: prompts are token ids, and answers are never read."""
    if not PASSES & catalog.build(job.method).needs():
        return None
    return loader.load_tokenizer(on.source, trust_remote_code=job.trust_remote_code)


def _set_threads(job: Job, on: Target) -> None:
    """As in a sweep: what is asked for, else one for small models."""
    from kvcli.engine.estimate import Sizes
    from kvcli.engine.session import SMALL

    if job.threads:
        torch.set_num_threads(job.threads)
    elif "OMP_NUM_THREADS" not in os.environ and Sizes.of(on.config).parameters < SMALL:
        torch.set_num_threads(1)


def _end_with_parent() -> None:
    """stdin ends when the parent does, however that came about."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main() -> int:
    job = Job.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(int(sys.argv[1]), "w") as pipe:

        def emit(message: dict[str, Any]) -> None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

        try:
            measure(job, emit)
        except KvcliError as e:
            emit({"problem": {"what": e.what, "given": e.given, "fix": e.fix, "code": int(e.code)}})
            return int(e.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
