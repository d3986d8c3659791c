"""Builds result folders with known contents: records as a sweep writes them, without a model.

Regenerate the golden files after a change that is meant:  python -m tests.analysis.synthetic
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcli.config import stable_hash
from kvcli.results.schema import FIELDS, SCHEMA, check_record

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class FakeTask:
    """fall: how much of full's score a method of harm 1 loses at ratio 0."""

    name: str
    full: float
    fall: float
    chance: float | None = 0.0
    shots: int = 8
    graded: bool = False
    cluster_size: int = 0
    no_answer: float = 0.02
    ability: str = "recall"


@dataclass(frozen=True)
class FakeMethod:
    """harm: share of a task's fall it suffers; floor: it cannot keep less than this (flag over_budget)."""

    name: str
    harm: float
    floor: float = 0.0
    seeds: tuple[int | None, ...] = (None,)
    ratios: tuple[str, ...] | None = None
    """Its own ratios; (None,) for a method without a ratio is written as ('own',)."""
    extra: float = 0.0
    """Bytes it stores on top, as a share."""


TASKS = (
    FakeTask("tb_knowledge", 1.0, 0.02, chance=0.25, ability="world knowledge"),
    FakeTask("tb_choice", 0.98, 0.7, chance=0.25, ability="commonsense"),
    FakeTask("tb_recall", 0.99, 1.0, ability="retrieval"),
    FakeTask("tb_arithmetic", 0.97, 0.6, ability="arithmetic", no_answer=0.0),
    FakeTask("tb_code", 0.96, 0.9, ability="code"),
    FakeTask("tb_safety", 1.0, 0.5, chance=0.5, ability="safety"),
    FakeTask("tb_needle", 1.0, 1.0, ability="needle"),
    FakeTask("tb_longgen", 0.97, 0.95, graded=True, cluster_size=10, ability="long generation"),
)
METHODS = (
    FakeMethod("random", 1.3, seeds=(0, 1, 2)),
    FakeMethod("streaming_llm", 1.1),
    FakeMethod("snapkv", 0.35),
    FakeMethod("h2o", 0.5),
    FakeMethod("pyramidkv", 0.4),
    FakeMethod("chunkkv", 0.45),
    FakeMethod("random_shot", 1.0, floor=0.18, seeds=(0, 1, 2)),
    FakeMethod("shotkv", 0.7, floor=0.18),
    FakeMethod("snapkv+kivi:bits=4", 0.42, extra=-0.6),
)
RATIOS = ("0.1", "0.2", "0.3", "0.5", "0.7", "0.9")


@dataclass
class Spec:
    """What to write. Defaults make a small run; see `small` and `large`."""

    tasks: Sequence[FakeTask] = TASKS[:3]
    methods: Sequence[FakeMethod] = METHODS[:3]
    ratios: Sequence[str] = ("0.1", "0.5")
    first_token: Sequence[str] = ("compressed",)
    n: int = 40
    full: bool = True
    failed: int = 0
    """Samples of every cell but full's that end as errors."""
    noop: int = 0
    """Samples too short to compress."""
    model: str = "testbed"
    meta: dict[str, Any] = field(default_factory=dict)


def build(folder: Path, spec: Spec | None = None, *, shards: int = 0, with_meta: bool = True) -> Path:
    """Writes run.json and samples.jsonl (or shards) and returns the folder."""
    spec = spec or Spec()
    folder.mkdir(parents=True, exist_ok=True)
    lines = list(records(spec))
    if with_meta:
        (folder / "run.json").write_text(json.dumps(meta(spec, lines), indent=2), encoding="utf-8")
    if shards:
        (folder / "shards").mkdir()
        for i in range(shards):
            write(folder / "shards" / f"{i:03d}.jsonl", lines[i::shards])
    else:
        write(folder / "samples.jsonl", lines)
    return folder


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


def meta(spec: Spec, lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    facts = ("task", "method", "ratio", "budget", "first_token", "query", "shots", "seed", "decode")
    return {
        "schema": SCHEMA,
        "status": "done",
        "argv": ["kvcli", "sweep", "--model", spec.model, "--method", ",".join(m.name for m in spec.methods),
                 "--ratio", ",".join(spec.ratios), "--limit", str(spec.n)],
        "config": {"model": spec.model, "methods": ["full", *(m.name for m in spec.methods)],
                   "ratios": list(spec.ratios), "tasks": [t.name for t in spec.tasks], "limit": spec.n},
        "identity": {"model": spec.model, "revision": "0123abc", "dtype": "float32", "template": "auto"},
        "model": {"layers": 4, "heads": 4, "kv_heads": [2, 2, 2, 2], "context": 1024, "parameters": 648_576},
        "provenance": {"versions": {"kvcli": "0.1.0", "torch": "2.13.0"}, "git": {"commit": "456def", "dirty": False}},
        "tasks": {t.name: {"ability": t.ability, "metric": "exact match", "chance": t.chance, "version": "1"}
                  for t in spec.tasks},
        "cells": {line["cell_id"]: {name: line[name] for name in facts} for line in lines},
        **spec.meta,
    }  # fmt: skip


def records(spec: Spec) -> Iterator[dict[str, Any]]:
    """All records of a grid, cell by cell."""
    everything = [FakeMethod("full", 0.0, ratios=("1",))] * spec.full + list(spec.methods)
    for task in spec.tasks:
        for mode in spec.first_token:
            for method in everything:
                for ratio in method.ratios or spec.ratios:
                    for seed in method.seeds:
                        yield from _cell(spec, task, mode, method, None if ratio == "own" else ratio, seed)


def _cell(
    spec: Spec, task: FakeTask, mode: str, method: FakeMethod, ratio: str | None, seed: int | None
) -> Iterator[dict[str, Any]]:
    cell_id = stable_hash([spec.model, task.name, mode, method.name, ratio, seed])
    asked = float(ratio) if ratio else 0.25
    kept = max(asked, method.floor)
    for i in range(spec.n):
        noop, failed = i < spec.noop and method.name != "full", method.name != "full" and i >= spec.n - spec.failed
        share = 1.0 if noop else kept
        flags = ["noop"] * noop + ["over_budget"] * (kept > asked and not noop)
        score = _score(task, mode, method, share, i, seed)
        answered = random.Random(f"answer {task.name} {i}").random() >= task.no_answer
        yield record(
            cell_id=cell_id, sample_id=f"{task.name}-{i}", task=task.name, ability=task.ability, method=method.name,
            ratio=ratio, measured_ratio=None if failed else share * (1 + method.extra) if not noop else 1.0,
            first_token=mode, shots=task.shots, seed=seed, metric="exact match",
            status="error" if failed else "ok", error="out of memory" if failed else None,
            score=None if failed else score, extracted="x" if answered and not failed else None,
            finish=None if failed else "length" if i % 17 == 5 else "stop",
            cluster=f"g{i // task.cluster_size}" if task.cluster_size else None, flags=flags, n_prompt=400 + i % 50,
        )  # fmt: skip


def _score(task: FakeTask, mode: str, method: FakeMethod, kept: float, i: int, seed: int | None) -> float:
    """A sample's own difficulty is the same for every method, so scores are paired as real ones are."""
    hidden = 0.1 if mode == "prefill" and task.name in ("tb_recall", "tb_choice") else 1.0
    lost = min(task.fall * method.harm * hidden * (1 - kept) ** 2, 1.0)
    expected = task.full * (1 - lost)
    own, drawn = random.Random(f"{task.name} {i}"), random.Random(f"{task.name} {i} {method.name} {kept} {seed}")
    level = own.random() if drawn.random() < 0.8 else drawn.random()
    if task.graded:
        return round(min(max(expected + 0.3 * (level - 0.5), 0.0), 1.0), 4)
    return float(level < expected)


def record(**values: Any) -> dict[str, Any]:
    """One record with every field of the schema; those not given are null."""
    line: dict[str, Any] = dict.fromkeys(FIELDS)
    line.update(schema=SCHEMA, query="aware", status="ok", flags=[], settings={}, output="", seconds={}, n_new=5)
    line.update(incoherent=None if values.get("status") == "error" else False)
    line.update(values)
    check_record(line)
    return line


def small(folder: Path) -> Path:
    """Three tasks, four methods, both first-token modes, failed and short samples: the golden report's run."""
    methods = (METHODS[0], METHODS[1], METHODS[2], METHODS[7])
    tasks = (TASKS[0], TASKS[2], TASKS[7])
    spec = Spec(tasks, methods, ("0.1", "0.3", "0.7"), ("compressed", "prefill"), n=60, failed=1, noop=2)
    return build(folder, spec)


def large(folder: Path, n: int = 200) -> Path:
    """Eight tasks, nine methods, six ratios: what plots must stay readable for."""
    return build(folder, Spec(TASKS, METHODS, RATIOS, n=n))


def regenerate() -> None:
    """Writes the golden files from `small`; tests/analysis/test_report.py and test_plots.py compare with them."""
    import tempfile

    from kvcli.analysis.figures import files as plots
    from kvcli.analysis.reading.load import load_run
    from kvcli.analysis.reports import latex, report
    from kvcli.analysis.reports.contents import contents
    from kvcli.analysis.tables import build as tables

    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        run = load_run(small(Path(temporary) / "golden"))
        summary = tables.summarise(run)
        (GOLDEN / "report.md").write_text(report.markdown(run, summary), encoding="utf-8")
        (GOLDEN / "report.tex").write_text(latex.latex(contents(run, summary)), encoding="utf-8")
        (GOLDEN / "terminal.txt").write_text(terminal(summary, 80), encoding="utf-8")
        for name, sheet in plots.sheets(run, summary):
            text = json.dumps(dataclasses.asdict(sheet), indent=1, ensure_ascii=False) + "\n"
            (GOLDEN / f"{name}.json").write_text(text, encoding="utf-8")


def terminal(summary: Sequence[Any], width: int) -> str:
    """The tables as a terminal without colours shows them; spaces at line ends dropped."""
    import io

    from rich.console import Console

    from kvcli.cli.tables import SummaryView

    file = io.StringIO()
    Console(file=file, width=width, highlight=False, markup=False, no_color=True).print(SummaryView(summary))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    regenerate()
