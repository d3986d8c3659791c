"""kvcli bench: what a compression method saves in time and memory, one method per process."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcli.cli import options as o
from kvcli.cli import output
from kvcli.cli.bench_tables import BenchView, mib
from kvcli.errors import Exit

if TYPE_CHECKING:
    from kvcli.engine.bench import Plan, Sizes
    from kvcli.engine.bench_run import Outcome

_SIZE, _RUNNING = "Size", "Running"


def _own(*names: str, help: str, panel: str, metavar: str) -> Any:
    help = help.replace("[", "\\[")  # brackets are markup to typer
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False)


Preset = Annotated[
    str | None,
    _own("--preset", help="4096/4096 or 8192/4096 prompt and new tokens.", panel=_SIZE, metavar="NAME"),
]
PromptTokens = Annotated[
    int | None,
    _own("--prompt-tokens", help="Tokens per prompt [default: 4096; testbed: 512].", panel=_SIZE, metavar="N"),
]
NewTokens = Annotated[
    int | None,
    _own("--new-tokens", help="Tokens to generate [default: 256; testbed: 128].", panel=_SIZE, metavar="N"),
]
Batch = Annotated[
    str, _own("--batch", "-b", help="Rows decoded together: 1,4 or max [default: 1].", panel=_SIZE, metavar="N,N|max")
]
Repeats = Annotated[
    int, _own("--repeats", help="Timed passes per process, after a warm-up [default: 3].", panel=_SIZE, metavar="N")
]
Rounds = Annotated[
    int,
    _own(
        "--rounds", help="Rounds over all methods, each in new processes [default: 1].", panel=_SIZE, metavar="N"
    ),
]  # fmt: skip
Seed = Annotated[int, _own("--seed", help="Seed of prompts and of random methods.", panel=_SIZE, metavar="N")]
Memory = Annotated[
    str | None,
    _own(
        "--memory",
        help="What --batch max may take above the model [default: all of a GPU; on a CPU half of what is free].",
        panel=_RUNNING,
        metavar="SIZE",
    ),
]
Out = Annotated[
    str | None,
    _own("--out", "-o", help="Folder of bench.jsonl [default: runs/bench-MODEL].", panel=_RUNNING, metavar="FOLDER"),
]


def command(
    method: o.Methods = None, ratio: o.Ratios = None, strict_window: o.StrictWindow = None, preset: Preset = None,
    prompt_tokens: PromptTokens = None, new_tokens: NewTokens = None, batch: Batch = "1", repeats: Repeats = 3,
    rounds: Rounds = 1, seed: Seed = 0, decode_ratio: o.DecodeRatio = None, decode_budget: o.DecodeBudget = None,
    decode_interval: o.DecodeInterval = None, cap: o.Cap = None, model: o.Model = None, dtype: o.Dtype = None,
    device: o.Device = None, attn: o.Attn = None, trust_remote_code: o.TrustRemoteCode = None, memory: Memory = None,
    threads: o.Threads = None, out: Out = None, json: o.Json = False, dry_run: o.DryRun = False,
) -> None:  # fmt: skip
    """Measure what methods save in time and memory.

    Each method and ratio runs in a process of its own, `full` first. Every run adds its measurements to
    FOLDER/bench.jsonl.

    \b
    Examples:
      kvcli bench --method snapkv,h2o --ratio 0.2
      kvcli bench --model llama3-8b --method snapkv --ratio 0.2 --preset 4096/4096
      kvcli bench --model llama3-8b --method shotkv --ratio 0.1,0.4 --batch 1,max
      kvcli bench --model llama3-8b --method kivi,snapkv+kivi:bits=4,quest --ratio 0.3
    """
    given = {
        "methods": method, "ratios": ratio, "strict_window": strict_window, "model": model, "dtype": dtype,
        "device": device, "attn": attn, "trust_remote_code": trust_remote_code, "threads": threads, "out": out,
        "decode_ratios": o.words(decode_ratio), "decode_budgets": o.integers("--decode-budget", decode_budget, 1),
        "decode_interval": decode_interval, "cap": cap,
    }  # fmt: skip
    from kvcli.engine.bench import Sizes

    sizes = Sizes(preset, prompt_tokens, new_tokens, batch, repeats, rounds, seed, memory)
    config = o.layered({key: value for key, value in given.items() if value not in (None, [])}, None, None)
    raise typer.Exit(perform(config, sizes, dry_run=dry_run, json=json))


def perform(config: Any, sizes: Sizes, *, dry_run: bool, json: bool) -> int:
    """Returns the exit code. Raises KvcliError for everything the user can mend."""
    from kvcli.cli.running import quiet_libraries
    from kvcli.engine.bench import plan as planned
    from kvcli.engine.bench_run import run
    from kvcli.engine.stop import StopRequest

    quiet_libraries()
    plan = planned(config, sizes)
    if dry_run:
        facts = _facts(plan)
        output.json_result(facts) if json else output.result(_described(facts))
        return Exit.DONE
    if plan.left_out:
        output.warn(f"not measured, they work in a process of their own: {', '.join(plan.left_out)}")
    output.note(f"results: {plan.file}")
    with StopRequest() as stop, output.progress("bench") as bar:
        outcome = run(
            plan,
            progress=lambda done, total, label: bar.update(done, total, now=label),
            warn=output.warn,
            stop=stop.asked,
        )
    return _finish(plan, outcome, stop.reason, json)


def _facts(plan: Plan) -> dict[str, Any]:
    """What would run. Reads the model's config, no weights."""
    import torch

    from kvcli.engine.bench import target
    from kvcli.engine.estimate import Sizes as ModelSizes

    first = plan.jobs[0]
    on = target(first)
    row = ModelSizes.of(on.config).kv_elements * getattr(torch, on.dtype).itemsize
    return {
        "out": str(plan.file), "model": first.model, "dtype": on.dtype, "device": on.device,
        "prompt_tokens": first.prompt_tokens, "new_tokens": first.new_tokens, "batches": list(first.batches),
        "repeats": first.repeats, "rounds": plan.rounds, "processes": plan.rounds * len(plan.jobs),
        "measurements": plan.measurements,
        "cells": [{"method": j.method, "ratio": j.ratio, "decode": j.decode} for j in plan.jobs],
        "full_cache_bytes": row * (first.prompt_tokens + first.new_tokens),
    }  # fmt: skip


def _described(facts: dict[str, Any]) -> str:
    from kvcli.analysis.reading.names import decoding

    names = [c["method"] if c["method"] == "full" else f"{c['method']} {c['ratio'] or ''}" for c in facts["cells"]]
    decodes = [decoding(c["decode"]) for c in facts["cells"]]
    names = [f"{name.strip()} ({how})" if how else name.strip() for name, how in zip(names, decodes, strict=True)]
    return "\n".join(
        (
            f"{facts['processes']} processes: {', '.join(names)}",
            f"{facts['model']} ({facts['dtype']} on {facts['device']}), {facts['prompt_tokens']:,} prompt + "
            f"{facts['new_tokens']:,} new tokens, batch {', '.join(map(str, facts['batches']))}",
            f"{facts['measurements']} measurements of {facts['repeats']} repeats after a warm-up",
            f"a full cache takes {mib(facts['full_cache_bytes'])} MiB per row at its end",
            f"results: {facts['out']}",
        )
    )


def _finish(plan: Plan, outcome: Outcome, reason: str, json: bool) -> int:
    from kvcli.analysis.tables.bench import tables

    if outcome.stopped:
        output.warn(f"stopped by {reason}; what was measured before is saved")
        return int(outcome.stopped)
    found = tables(outcome.records)
    if json:
        output.json_result(
            {"out": str(plan.file), **_header(outcome), "tables": [dataclasses.asdict(t) for t in found]}
        )
    else:
        output.result(BenchView(_header(outcome), found))
    others = [job for job in plan.jobs if job.method != "full"]
    if others:
        methods, ratios = (
            ",".join(dict.fromkeys(filter(None, x))) for x in zip(*((j.method, j.ratio) for j in others), strict=True)
        )
        words = ["kvcli", "sweep", "--model", plan.source.text, "--method", methods]
        words += ["--ratio", ratios] if ratios else []
        words += plan.decode_words
        output.next_command(f"{shlex.join(words)}     (what the savings cost)")
    return Exit.FAILED_SAMPLES if outcome.failed else Exit.DONE


def _header(outcome: Outcome) -> dict[str, Any]:
    """What all measurements of a command have in common, from one that worked where there is one."""
    best = next((r for r in outcome.records if r["status"] == "ok"), outcome.records[0])
    names = (
        "model", "revision", "prompt_tokens", "new_tokens", "repeats", "seed", "dtype", "device", "device_name",
        "threads", "attn",
    )  # fmt: skip
    source = (best["memory"] or {}).get("source")
    return {**{name: best[name] for name in names}, "memory_source": source}
