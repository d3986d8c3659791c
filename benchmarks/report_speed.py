"""Seconds and peak memory of `kvcli report` over a million synthetic records, in a process of its own.

    python benchmarks/report_speed.py [--records 1000000] [--folder DIR] [--repeats 3] [--json FILE] [-- REPORT OPTIONS]

Seven tasks, 25 methods, nine ratios and `full`; lines of about 1.9 kB with every field a sweep writes, 1.9 GB in
all. No model is needed. `load` is `kvcli.load_run` alone, `report` the whole command, without figures unless other
options are given. A folder made once with --folder is used again. Bars: report in 20 s and 2 GB (10^9 bytes).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

TASKS = ("mmlu", "commonsense_qa", "gsm8k", "humaneval", "jailbreakv", "niah", "lg_gsm8k")
GRADED = {"niah"}
CLUSTERED = {"lg_gsm8k": 30}
METHODS = tuple(f"method_{i:02d}" for i in range(25))
RATIOS = tuple(f"0.{i}" for i in range(1, 10))
SHOTS = 8
CELLS = len(TASKS) * (len(METHODS) * len(RATIOS) + 1)
BAR_SECONDS, BAR_BYTES = 20.0, 2e9
WORDS = 'so the total is then we add each part of what was left and take this away from it \\ " \n é'.split(" ")


def make(folder: Path, records: int, seed: int = 0) -> Path:
    """Writes run.json and samples.jsonl; about `records` lines, sample by sample as a sweep writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    per_cell = max(1, round(records / CELLS))
    cells = {task: list(_cells(task)) for task in TASKS}
    (folder / "run.json").write_text(json.dumps(_meta(folder, cells, per_cell), indent=1), encoding="utf-8")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for task in TASKS:
            for i in range(per_cell):
                file.writelines(_sample_lines(task, i, cells[task], random.Random(f"{seed} {task} {i}")))
    return folder


def _cells(task: str) -> Iterator[dict[str, Any]]:
    for method in ("full", *METHODS):
        for ratio in ("1",) if method == "full" else RATIOS:
            yield {"task": task, "method": method, "ratio": ratio, "budget": None, "match": None,
                   "first_token": "compressed", "query": "aware", "decode": None, "weights": "dense", "shots": SHOTS,
                   "shot_seed": 0, "shot_order": 0, "seed": None, "draw": 0}  # fmt: skip


def _meta(folder: Path, cells: dict[str, list[dict[str, Any]]], per_cell: int) -> dict[str, Any]:
    chance = {"mmlu": 0.25, "commonsense_qa": 0.2}
    return {
        "schema": 1, "status": "done", "argv": ["kvcli", "sweep", "--model", "synthetic", "--out", str(folder)],
        "config": {"model": "synthetic", "tasks": list(TASKS), "methods": ["full", *METHODS], "ratios": list(RATIOS),
                   "limit": per_cell},
        "identity": {"model": "synthetic", "dtype": "float32"},
        "tasks": {task: {"ability": task, "metric": "accuracy", "chance": chance.get(task, 0.0), "version": 1,
                         "harmful": task == "jailbreakv"} for task in TASKS},
        "cells": {_cell_id(cell): cell for of_task in cells.values() for cell in of_task},
    }  # fmt: skip


def _cell_id(cell: dict[str, Any]) -> str:
    from kvcli.config import stable_hash

    return stable_hash([cell["task"], cell["method"], cell["ratio"]])


def _sample_lines(task: str, i: int, cells: Sequence[dict[str, Any]], own: random.Random) -> Iterator[str]:
    """One line per cell. A sample's difficulty is the same for all, so that scores are paired as real ones are."""
    from kvcli.results.schema import FIELDS, SCHEMA, check_record

    level, n_prompt, n_new = own.random(), own.randint(400, 1600), own.randint(40, 110)
    text = " ".join(own.choices(WORDS, k=n_new))
    ids = [own.randrange(128_000) for _ in range(n_new)]
    for number, cell in enumerate(cells):
        kept = float(cell["ratio"])
        harm = 0.0 if cell["method"] == "full" else 0.1 + int(cell["method"][-2:]) / 30
        expected = 0.8 * (1 - harm * (1 - kept) ** 2)
        drawn = level if own.random() < 0.8 else own.random()
        score = (
            round(min(1.0, max(0.0, expected + 0.4 * (drawn - 0.5))), 6) if task in GRADED else float(drawn < expected)
        )
        cut = own.randrange(len(text) // 2, len(text))
        record: dict[str, Any] = dict.fromkeys(FIELDS)
        record.update(
            cell, ratio=kept, schema=SCHEMA, cell_id=_cell_id_of(cell), sample_id=f"{i}", ability=task,
            settings={"window": 32, "kernel": 7, "pooling": "avg"}, measured_ratio=round(kept + own.random() / 500, 6),
            kept=round(kept * n_prompt, 3), status="ok", score=score, metric="accuracy",
            extra={"prompt_level": score} if task in CLUSTERED else {}, output=text[:cut], output_ids=ids,
            extracted=None if own.random() < 0.02 else str(own.randrange(100)), target="42",
            cluster=f"g{i // CLUSTERED[task]}" if task in CLUSTERED else None,
            finish="length" if own.random() < 0.05 else "stop", n_prompt=n_prompt, truncated=0, n_new=n_new, notes={},
            flags=["fallback"] if number % 40 == 7 else [], alloc_bytes=884_736 + number,
            kv_bytes={"full": n_prompt * 131072, "prefill": int(kept * n_prompt) * 131072,
                      "end": int(kept * n_prompt + n_new) * 131072, "read": None, "match": None},
            kept_by_region={"special": 1.0, "system": 0.8214, **{f"shot {s}": 0.1875 for s in range(SHOTS)},
                            "question": 0.9286},
            repetition=0.013514,
            fidelity={"kl": 0.18204713, "top1": 0.91304348, "nll": 0.43112754, "tokens": n_new,
                      "first_divergence": 12, "identical": False},
            seconds={"prefill": 0.038622, "select": 0.00059, "decode": 0.001356, "shared": True},
            prompt_sha="d72ca63d9c2d98a9", batch_id=f"g0-{task}-s8-p{i:05d}-d{number // 16:03d}",
        )  # fmt: skip
        if i == 0:
            check_record(record)
        yield json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


def _cell_id_of(cell: dict[str, Any], known: dict[tuple[str, str, str], str] = {}) -> str:  # noqa: B006
    key = (cell["task"], cell["method"], cell["ratio"])
    if key not in known:
        known[key] = _cell_id(cell)
    return known[key]


def measure(code: str, *args: str) -> tuple[float, float, int]:
    """(wall seconds, processor seconds, peak bytes) of a Python process, its start included."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", code, *args], env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"the measured process ended with code {child.returncode}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


LOAD = "import sys, pathlib, kvcli; kvcli.load_run(pathlib.Path(sys.argv[1]))"
REPORT = "import sys; from kvcli.cli.app import main; sys.exit(main(['report', *sys.argv[1:]]))"


def run(folder: Path, repeats: int, options: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, code, args in (("load", LOAD, ()), ("report", REPORT, (*options,))):
        out = ("--out", str(folder / "report-speed.md")) if name == "report" and "--out" not in args else ()
        measured = [measure(code, str(folder), *out, *args) for _ in range(repeats)]
        walls, cpus, peaks = zip(*measured, strict=True)
        found[name] = {"seconds": [round(s, 2) for s in walls], "median": round(median(walls), 2),
                       "processor": round(median(cpus), 2), "peak_bytes": max(peaks)}  # fmt: skip
    report = found["report"]
    found["holds"] = report["median"] < BAR_SECONDS and report["peak_bytes"] < BAR_BYTES
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the records are, or are made; without it a temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", default=["--no-figures"], help="options of kvcli report")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / "million"
        if not (folder / "samples.jsonl").is_file():
            make(folder, given.records)
        load = os.getloadavg()[0]
        found = run(folder, given.repeats, given.options)
        size = (folder / "samples.jsonl").stat().st_size
    found |= {"file_bytes": size, "cores": os.cpu_count(), "load_before": round(load, 2)}
    for name in ("load", "report"):
        row = found[name]
        print(
            f"{name:8} {row['median']:7.2f} s  (processor {row['processor']:.2f} s)  {row['peak_bytes'] / 1e6:7.0f} MB"
        )
    print(f"file {size / 1e9:.2f} GB, {found['cores']} cores, load before {found['load_before']}; "
          f"bars {BAR_SECONDS:.0f} s, {BAR_BYTES / 1e9:.0f} GB: {'hold' if found['holds'] else 'MISSED'}")  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
