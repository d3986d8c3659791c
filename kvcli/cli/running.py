"""What `run` and `sweep` do once their options are a config: check, plan, announce, run, print the table."""

from __future__ import annotations

import dataclasses
import os
import shlex
from contextlib import nullcontext
from typing import Any

from kvcli.cli import output
from kvcli.config import SweepConfig
from kvcli.errors import Exit, KvcliError


def one_cell(config: SweepConfig) -> SweepConfig:
    """The config of `run`: one method, one ratio or budget, one task. Raises KvcliError for more or fewer."""
    from kvcli.evals.loader import find_tasks
    from kvcli.grammar import parse_ratios
    from kvcli.methods.catalog import build, expand
    from kvcli.weights.spec import canonical, parse_weights

    methods = [str(m) for m in expand(config.methods or ("full",))]
    sizes = [str(r) for r in parse_ratios(config.ratios)] + [str(b) for b in config.budgets]
    tasks = [task.name for task in find_tasks(config.tasks)]
    weights = [canonical(value) for value in parse_weights(config.weights)]
    for name, found in (
        ("method", methods), ("ratio or budget", sizes), ("task", tasks), ("kind of weights", weights),
    ):  # fmt: skip
        if len(found) > 1:
            fix = f"kvcli sweep, or one of {', '.join(found[:4])}"
            raise KvcliError(f"run takes one {name}", given=", ".join(found), fix=fix)
    if sizes and methods == ["full"] and not config.methods:
        fix = f"--method snapkv --ratio {sizes[0]}"
        raise KvcliError("run needs --method with a ratio or budget", given=sizes[0], fix=fix)
    sized = build(methods[0]).domain.kind == "continuous"
    if sizes and methods != ["full"] and not sized:
        what = f"{methods[0]} takes no ratio or budget: its own settings decide what it keeps"
        raise KvcliError(what, given=sizes[0], fix=f"--method {methods[0]} alone")
    if not sizes and methods != ["full"] and sized:
        fix = f"--method {methods[0]} --ratio 0.2"
        raise KvcliError("run needs --ratio or --budget", given=f"--method {methods[0]}", fix=fix)
    return dataclasses.replace(config, methods=tuple(methods))


def perform(config: SweepConfig, passed: dict[str, Any], *, dry_run: bool, json: bool) -> int:
    """Returns the exit code. Raises KvcliError for everything the user can mend."""
    from kvcli import sandbox
    from kvcli.engine.checking import check
    from kvcli.engine.stop import StopRequest

    stop = StopRequest(config.max_time, say=output.note)
    with nullcontext() if dry_run else stop:  # a dry run has nothing to save: signals end it as they end any program
        quiet_libraries()
        sandbox.configure(unsafe=config.unsafe_exec, warn=output.warn)
        request = check(config)
        _threads(config)
        output.note(f"results: {request.out}")
        from kvcli.engine.session import execute, open_session

        session = open_session(request, lambda text: None, writing=not dry_run)
        _remark(session, passed)
        _announce(session, json=json and dry_run, dry_run=dry_run)
        if dry_run:
            return Exit.DONE
        with output.progress("sweep") as bar:
            outcome = execute(
                session,
                argv=typed(),
                passed=passed,
                say=output.note,
                warn=output.warn,
                progress=lambda done, total, label: bar.update(done, total, task=label),
                stop=stop.asked,
            )
    return _finish(session, outcome, stop.reason, json)


def _remark(session: Any, passed: dict[str, Any]) -> None:
    """What will not be as typed, before anything runs."""
    from kvcli.cli import remarks

    prepared, config = session.prepared, session.prepared.request.config
    large = remarks.larger_than_prompts(config, prepared.prompt_sets.values())
    for warning in [*prepared.warnings, *remarks.without_ratio(config, passed), *large]:
        output.warn(warning)
    for note in remarks.floors(config):
        output.note(note)


def typed() -> list[str]:
    """The command line this process was started with."""
    from kvcli.cli import app

    return ["kvcli", *app.TYPED]


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
            {
                "out": str(session.folder),
                **asdict(facts),
                "peak_bytes": facts.memory.peak,
                "cells_list": [c.describe() for c in session.wanted],
            }
        )
        return
    cells = output.count(facts.cells, "cell")
    lines = [f"{cells}: nothing left to do"]
    if facts.records:
        shared = facts.separate_prefill_tokens / max(1, facts.prefill_tokens)
        lines = [
            f"{cells}, {output.count(facts.samples, 'prompt')}, {output.count(facts.records, 'record')} to come "
            f"({facts.record_bytes / 2**20:.1f} MiB)",
            f"{facts.prefill_tokens:,} tokens to prefill"
            + (f" ({shared:.0f} times fewer than cell by cell)" if shared >= 1.5 else "")
            + f", up to {facts.decode_tokens:,} to decode, about {output.size(facts.memory.peak)} of memory",
            f"about {output.duration(facts.seconds)}{_pruning(facts)} "
            f"({session.prepared.dtype} on {session.prepared.device})",
        ]
    if dry_run and facts.records:
        lines[-1:-1] = _details(facts)
    if dry_run:
        output.result("\n".join(lines))
    else:
        for line in lines:
            output.note(line)


_KINDS = {"kept": "caches that only grow", "stored": "caches stored in other forms"}
"""Rows of one kind decode together."""
_SHARING = {
    1: "one prefill for all of them",
    2: "one prefill for all of them, and an extra pass per prompt",
    3: "a prefill of its own per cell",
}


def _weights(text: str) -> str:
    """What tells a group of pruned weights from the dense ones."""
    return "" if text == "dense" else f", {text}"


def _pruning(facts: Any) -> str:
    """What the time does not hold, where weights are pruned first."""
    return " and the pruning" if any(_weights(g.weights) for g in facts.groups) else ""


def _prompts(group: Any) -> str:
    """'8 shots, seed 1, order 2, agnostic': what is not the usual."""
    parts = [output.count(group.shots, "shot")]
    parts += [f"{name} {value}" for name, value in (("seed", group.shot_seed), ("order", group.shot_order)) if value]
    return ", ".join([*parts, *([group.query] if group.query != "aware" else [])])


def _details(facts: Any) -> list[str]:
    """Prefill groups, storage kinds and memory, for --dry-run."""
    lines = ["prefill groups"]
    for g in facts.groups:
        cells = f"{output.count(g.cells, 'cell')} x {output.count(g.prompts, 'prompt')}"
        lines.append(
            f"  {g.task}, {_prompts(g)}{_weights(g.weights)}: {cells}, "
            f"{_SHARING[g.sharing]}: {g.tokens:,} tokens instead of {g.tokens_alone:,}"
        )
    lines.append("storage kinds")
    for kind in facts.storage:
        what = _KINDS.get(kind.kind, f"{kind.kind} by itself, for what it does while generating")
        lines.append(f"  {what}: {output.count(kind.cells, 'cell')}, {output.count(kind.rows, 'row')}")
    parts = {"weights": facts.memory.weights, "prompts": facts.memory.prompts, "compressed caches": facts.memory.decode,
             "beside the pairs": facts.memory.figures, "comparison": facts.memory.comparison,
             "activations": facts.memory.activations}  # fmt: skip
    lines.append("memory at the peak: " + ", ".join(f"{name} {output.size(n)}" for name, n in parts.items()))
    return lines


def _finish(session: Any, outcome: Any, reason: str, json: bool) -> int:
    from kvcli.analysis.reading.load import load_run
    from kvcli.analysis.tables.build import summarise
    from kvcli.cli import remarks, tables
    from kvcli.cli.following import next_in

    folder = str(session.folder)
    if outcome.stopped:
        output.warn(f"stopped by {reason}; everything finished is saved")
        output.next_command(f"{shlex.join(typed())}     (goes on where it stopped)")
        return int(outcome.stopped)
    run = load_run(session.folder)
    wanted = {cell.id for cell in session.wanted}
    summary = summarise(run, wanted)
    if json:
        output.json_result(tables.as_json(summary))
    else:
        output.result(tables.SummaryView(summary))
    for note in remarks.idle(summary):
        output.note(note)
    others = sum(cell.cell_id not in wanted and cell.method != "full" for cell in run.cells)
    if others:
        output.note(f"{folder} holds {output.count(others, 'more cell')} of earlier commands")
    if outcome.errors:
        output.warn(f"{output.count(outcome.errors, 'sample')} failed; the same command tries again")
    for message, count in outcome.messages.most_common(5):
        output.note(f"  {count} x {message}")
    next_in(session.folder, f"kvcli show {shlex.quote(folder)}")
    return Exit.FAILED_SAMPLES if outcome.errors else Exit.DONE
