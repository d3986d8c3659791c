"""A kvcli sweep against kvpress run cell by cell: 8 layers, d = 512, float32, 6 methods x 4 ratios.

Workloads: (a) one 1,500-token prompt, 32 new tokens; (b) 20 questions behind a shared 1,200-token block, 32 new
tokens; (c) as (b) with 2 new tokens. kvcli runs in kvpress's conventions (kvpress_rules.py, first token from the
prefill) and the script asserts that kept sets and tokens agree. kvpress gets an environment of its own.

    python benchmarks/sweep_vs_kvpress.py [--json FILE] [--repeats 3] [--full] [--venv FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
METHODS = ("Snap", "Observed", "Streaming", "Knorm", "Pyramid", "Chunk")
KEPT = ("0.75", "0.5", "0.25", "0.1")
PINS = ("torch==2.13.0", "transformers==5.2.0", "kvpress==0.5.5")
SHAPE = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192,
         "initializer_range": 0.05, "eos_token_id": None, "bos_token_id": None}  # fmt: skip
BARS = {"a": 15.0, "b": 20.0, "c": 40.0}
QUESTIONS, BLOCK, EQUAL = 20, 1200, 20


@dataclass
class Workload:
    """Prompts, new tokens per row, and where the question of each prompt begins."""

    name: str
    prompts: list[Any]
    new: int
    question: int
    ours: list[float] = field(default_factory=list)
    theirs: list[list[float]] = field(default_factory=list)


def make_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def make_workloads() -> list[Workload]:
    import torch

    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> Any:
        return torch.randint(3, SHAPE["vocab_size"], (n,), generator=generator)

    block = ids(BLOCK)
    questions = [torch.cat([block, ids(30 + i)]) for i in range(QUESTIONS)]
    return [
        Workload("a", [ids(1500)], 32, 1400),
        Workload("b", questions, 32, BLOCK),
        Workload("c", questions, 2, BLOCK),
    ]


class Sink:
    """Keeps records and kept sets in memory."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.kept: dict[tuple[str, str], Any] = {}

    def done_keys(self) -> set[tuple[str, str]]:
        return set()

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def add_prompt(self, entry: dict[str, Any]) -> None:
        pass

    def keep_map(self, task: str, sample_id: str, cell_id: str, kept: Any) -> None:
        self.kept[cell_id, sample_id] = kept


def kvcli_sweep(
    model: Any, work: Workload, keep_maps: int, methods: Sequence[str] = METHODS, ratios: Sequence[str] = KEPT
) -> tuple[Sink, float]:
    """One sweep over a grid; the time includes everything after the model is in memory."""
    from kvcli.config import SweepConfig
    from kvcli.engine.cells import PromptKey, make_cells
    from kvcli.engine.estimate import Sizes, rows_that_fit
    from kvcli.engine.plan import MAX_DECODE_ROWS, Generation, make_plan
    from kvcli.engine.prompts import PromptSet
    from kvcli.engine.runner import Options, Runner
    from kvcli.engine.session import DEFAULT_MEMORY
    from kvcli.evals.spec import Sample, Score, Task
    from kvcli.models.prompt import Prompt
    from kvcli.spans import Region

    class Plain(Task):
        def samples(self, **_: Any) -> list[Sample]:
            return []

        def score(self, sample: Sample, output: str) -> Score:
            return Score(0.0, None)

    started = time.perf_counter()
    rules = HERE / "kvpress_rules.py"
    config = SweepConfig(
        methods=tuple(f"{rules}:{m}" for m in methods), ratios=tuple(sorted(ratios)), first_token=("prefill",),
        full=False, ignore_eos=True,
    )  # fmt: skip
    task = Plain(name="bench", version="1", ability="", metric="", shots=0, max_new_tokens=work.new)
    lists = [p.tolist() for p in work.prompts]
    prompts = [
        Prompt(
            p,
            [Region("context", 0, work.question), Region("question", work.question, len(p))],
            "",
            [0] * len(p),
            str(i),
        )
        for i, p in enumerate(lists)
    ]
    samples = [Sample(str(i), (), "") for i in range(len(lists))]
    key = PromptKey("bench", 0)
    sets = {key: PromptSet(task, key, samples, prompts)}
    cells = make_cells(config, [task], {})
    plan = make_plan(cells, [Generation(tuple(c.id for c in cells), None)], {key: len(lists)}, len(lists))
    sink = Sink()
    longest = max(map(len, lists)) + work.new
    item, most = model.dtype.itemsize, DEFAULT_MEMORY[model.device.type]
    rows = rows_that_fit(model.hf.config, item, longest, most, MAX_DECODE_ROWS)  # as `kvcli sweep` does
    memory = rows * longest * Sizes.of(model.hf.config).kv_elements * item
    options = Options(rows, keep_maps=keep_maps, ignore_eos=True, memory=memory)
    outcome = Runner(model, plan, sets, sink, options).run()
    if outcome.errors:
        raise SystemExit(f"kvcli failed: {sink.records[0]['error']}")
    return sink, time.perf_counter() - started


class Peer:
    """The kvpress process."""

    def __init__(self, python: Path, threads: int) -> None:
        command = [str(python), str(HERE / "peer.py"), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the kvpress process ended; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=30)


def peer_environment(folder: Path) -> Path:
    """Python of an environment with kvpress and the transformers it pins; made when missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder} with {', '.join(PINS)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for pins in (PINS[:1], PINS):  # torch alone first, so that nothing newer is taken for it
            subprocess.run([str(python), "-m", "pip", "install", "-q", *pins], check=True, stdout=sys.stderr)
    return python


def agreement(sink: Sink, work: Workload, peer: Peer, first: int) -> dict[str, Any]:
    """How many of the 24 cells give the same kept sets and the same tokens on prompt 0."""
    ours = {(r["method"].rsplit(":", 1)[1], r["ratio"]): r for r in sink.records if r["sample_id"] == "0"}
    same = {"kept": 0, "tokens": 0, "both": 0}
    for method in METHODS:
        for ratio in KEPT:
            record = ours[method, float(ratio)]
            their = peer.ask(run=[first, method, 1 - float(ratio)], new=work.new, kept=True)
            own = [
                layer * 4 if len(layer) == 1 else layer for layer in sink.kept[record["cell_id"], "0"]
            ]  # heads alike
            kept = own == their["kept"]
            tokens = record["output_ids"] == their["tokens"]
            same["kept"] += kept
            same["tokens"] += tokens
            same["both"] += kept and tokens
            if not (kept and tokens):
                print(f"  differs: {method} at {ratio}: kept {kept}, tokens {tokens}", file=sys.stderr)
    return same


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from kvcli.models.wrapper import Model
    from kvcli.testbed.model import build_tokenizer

    torch.set_num_threads(args.threads)
    peer = Peer(peer_environment(args.venv), args.threads)
    hf = make_model()
    model = Model(hf, build_tokenizer(), name="bench")
    works = [w for w in make_workloads() if w.name in args.workloads]
    everything = [p for w in works if w.name != "c" for p in w.prompts] or works[0].prompts
    offsets = {"a": 0, "b": 1 if "a" in args.workloads else 0, "c": 1 if "a" in args.workloads else 0}
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save({"config": SHAPE, "weights": hf.state_dict(), "prompts": everything}, file.name)
        peer.ask(prompts=file.name)
    peer.ask(run=[0, "Snap", 0.5], new=2, kept=False)  # warm-up
    kvcli_sweep(model, Workload("warm", [works[0].prompts[0][:900]], 2, 800), 0)
    checks = {}
    for work in works:
        sink, _ = kvcli_sweep(model, work, keep_maps=1)
        checks[work.name] = agreement(sink, work, peer, offsets[work.name])
        print(f"({work.name}) equal to kvpress: {checks[work.name]} of 24", file=sys.stderr)
        if checks[work.name]["both"] < EQUAL:
            raise SystemExit(f"only {checks[work.name]['both']} of 24 cells of ({work.name}) agree with kvpress")
    for repeat in range(args.repeats):
        for work in works:
            work.ours.append(kvcli_sweep(model, work, 0)[1])
            if work.name != "c":
                work.theirs.append(peer_times(peer, work, offsets[work.name], repeat, args.full))
            print(f"repeat {repeat + 1} ({work.name}) kvcli {work.ours[-1]:.2f} s", file=sys.stderr)
    peer.close()
    return summary(works, checks, args)


def peer_times(peer: Peer, work: Workload, offset: int, repeat: int, full: bool) -> list[list[float]]:
    """Seconds after each new token, for each run: every method x ratio once, on other questions in each repeat."""
    times, turn = [], repeat * 7
    for method in METHODS:
        for ratio in KEPT:
            picks = range(len(work.prompts)) if full else [turn % len(work.prompts)]
            for pick in picks:
                times.append(peer.ask(run=[offset + pick, method, 1 - float(ratio)], new=work.new, kept=False)["after"])
            turn += 1
    return times


def summary(works: list[Workload], checks: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    by_name = {w.name: w for w in works}
    for work in works:
        source = by_name.get("b", work) if work.name == "c" else work  # (c) is the beginning of (b)'s runs
        total = len(work.prompts) * 24
        theirs = [sum(run[work.new - 1] for run in repeat) * total / len(repeat) for repeat in source.theirs]
        ratio = [t / o for t, o in zip(theirs, work.ours, strict=False)]
        rows.append({
            "workload": work.name, "speedup": round(median(ratio), 2) if ratio else None, "bar": BARS[work.name],
            "kvcli_seconds": [round(x, 3) for x in work.ours], "kvpress_seconds": [round(x, 2) for x in theirs],
            "cells": 24, "prompts": len(work.prompts), "new_tokens": work.new,
            "sampled": len(source.theirs[0]) if source.theirs else 0, "of": total, "equal": checks[work.name],
            "kvpress_raw": [[round(run[work.new - 1], 4) for run in repeat] for repeat in source.theirs],
        })  # fmt: skip
    return {"workloads": rows, "threads": args.threads, "repeats": args.repeats, "pins": PINS, "machine": machine()}


def machine() -> dict[str, Any]:
    from kvcli.results.provenance import hardware, versions

    return {**hardware(), "versions": versions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="time all 480 kvpress runs instead of 24 per repeat")
    parser.add_argument("--workloads", default="abc")
    parser.add_argument("--venv", type=Path, default=Path.home() / ".cache" / "kvcli" / "kvpress-0.5.5")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    result = measure(args)
    print("| workload | kvcli s | kvpress s (24 runs scaled) | speed-up | bar |\n| --- | ---: | ---: | ---: | ---: |")
    for row in result["workloads"]:
        ours, theirs = median(row["kvcli_seconds"]), median(row["kvpress_seconds"] or [0])
        print(f"| {row['workload']} | {ours:.1f} | {theirs:.0f} | {row['speedup']} x | {row['bar']:.0f} x |")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
