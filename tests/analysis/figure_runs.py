"""Result folders for the figures that `synthetic` has no data for, and their golden data.

Regenerate after a change that is meant:  python -m tests.analysis.figure_runs
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvcli.config import stable_hash
from tests.analysis import synthetic

GOLDEN = synthetic.GOLDEN / "figures"
FULL_BYTES = 400 * 1024


def cell(
    task: str, method: str, ratio: str | None = None, *, n: int = 20, harm: float = 0.5, **facts: Any
) -> Iterator[dict[str, Any]]:
    """Records of one cell. facts: fields of the record; `kept`, `bits` and `needles` say what is measured."""
    kept = facts.pop("kept", None) or (1.0 if method == "full" else float(ratio or 0.25))
    bits, needles, ids = facts.pop("bits", 16), facts.pop("needles", False), facts.pop("ids", "")
    named = {name: facts.get(name) for name in ("budget", "match", "decode", "shots", "query", "weights", "shot_seed",
                                                "shot_order", "first_token", "seed")}  # fmt: skip
    cell_id = stable_hash([task, method, ratio, named])
    share = kept * bits / 16
    read = int(FULL_BYTES * 0.2) if method == "quest" else None
    for i in range(n):
        rng = random.Random(f"{task} {i}")
        lost = harm * (1 - kept) ** 2 if method != "full" else 0.0
        score = float(rng.random() < facts.get("level", 0.95) - lost)
        extra = {"depth": (i % 5) / 4, "length": float(facts["length"])} if needles else {}
        values = {
            "cell_id": cell_id, "sample_id": f"{task}-{ids}{i}", "task": task, "ability": "recall", "method": method,
            "ratio": ratio, "measured_ratio": share, "first_token": "compressed", "shots": 8, "metric": "exact match",
            "score": score, "extracted": "x", "finish": "stop", "n_prompt": 400, "extra": extra,
            "kv_bytes": {"full": FULL_BYTES, "prefill": int(FULL_BYTES * share), "read": read, "match": None,
                         "end": int(FULL_BYTES * share) + 2048},
            "fidelity": {"kl": 0.0 if method == "full" else round(2 * lost * rng.random(), 6), "tokens": 5.0,
                         "top1": 1 - lost * rng.random(), "nll": 0.0, "first_divergence": None, "identical": True},
        }  # fmt: skip
        values.update({name: value for name, value in facts.items() if name not in ("length", "level")})
        yield synthetic.record(**values)


def folder(path: Path, cells: Sequence[Iterator[dict[str, Any]]]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    lines = [line for one in cells for line in one]
    tasks, methods = dict.fromkeys(line["task"] for line in lines), dict.fromkeys(line["method"] for line in lines)
    meta = {
        "schema": 1, "status": "done", "config": {"model": "testbed", "methods": list(methods), "tasks": list(tasks)},
        "tasks": {name: {"ability": "recall", "chance": 0.0} for name in tasks},
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(meta), encoding="utf-8")
    synthetic.write(path / "samples.jsonl", lines)
    return path


def plain(path: Path) -> Path:
    """Two tasks, four methods, three ratios, one method of its own size; all flags."""
    cells = []
    for task, level in (("gsm8k", 0.9), ("mmlu", 0.7)):
        cells.append(cell(task, "full", level=level))
        for ratio in ("0.1", "0.3", "0.6"):
            cells += [cell(task, m, ratio, harm=h, level=level) for m, h in (("snapkv", 0.3), ("h2o", 0.6))]
            cells.append(cell(task, "shotkv", ratio, harm=0.4, kept=max(0.2, float(ratio)), level=level,
                              flags=["over_budget"] if ratio == "0.1" else ["fallback"]))  # fmt: skip
        cells.append(cell(task, "quest", None, harm=0.1, kept=1.0, flags=["simulated"], level=level))
        cells.append(cell(task, "kivi:bits=4", None, harm=0.1, kept=0.9, bits=5, level=level))
    return folder(path, cells)


def shots(path: Path) -> Path:
    """Three tasks with 0, 2 and 8 shots, which give less or more; shotkv is over budget with few."""
    cells = []
    for task, gain in (("gsm8k", 0.6), ("mmlu", 0.1), ("humaneval", 0.3)):
        for count in (0, 2, 8):
            level = 0.95 - gain * (8 - count) / 8
            cells.append(cell(task, "full", shots=count, level=level))
            for ratio in ("0.1", "0.4"):
                flags = ["over_budget"] if count < 8 and ratio == "0.1" else []
                cells += [cell(task, m, ratio, shots=count, level=level, harm=gain + h / 10,
                               flags=flags if m == "shotkv" else [])
                          for h, m in enumerate(("snapkv", "h2o", "shotkv"))]  # fmt: skip
    return folder(path, cells)


def needles(path: Path) -> Path:
    """niah at three lengths, five depths each."""
    cells = []
    for length in (1024, 4096, 16384):
        task = f"niah:length={length}"
        more: dict[str, Any] = {"needles": True, "length": length, "shots": 0}
        cells.append(cell(task, "full", **more))
        cells += [cell(task, m, ratio, harm=length / 16384, **more)
                  for m in ("snapkv", "streaming_llm") for ratio in ("0.1", "0.4")]  # fmt: skip
    return folder(path, cells)


def bench(path: Path, commands: int = 1) -> Path:
    """What `kvcli bench` writes: full, two methods at two ratios, two batch sizes; each command is slower."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(commands):
        asked: list[tuple[str, float]] = [("full", 1.0)]
        asked += [(m, r) for m in ("snapkv", "h2o") for r in (0.2, 0.5)]
        lines += [_measurement(m, r, b, 1.0 + number) for m, r in asked for b in (1, 4)]
    synthetic.write(path / "bench.jsonl", lines)
    return path


def _measurement(method: str, ratio: float, batch: int, slower: float) -> dict[str, Any]:
    def times(value: float) -> dict[str, Any]:
        found = [round(value * slower * f, 6) for f in (0.95, 1.0, 1.1)]
        return {"median": found[1], "all": found}

    seconds = {"prefill": 0.2 + 0.1 * (method == "h2o"), "select": 0.01, "build": 0.01,
               "compress": 0.001 if method == "full" else 0.02, "first_token": 0.25, "per_token": 0.002 + 0.01 * ratio,
               "decode": 0.3, "total": 0.5}  # fmt: skip
    return {
        "schema": 1, "kind": "bench", "status": "ok", "model": "testbed", "revision": None, "method": method,
        "ratio": ratio, "flags": [], "round": 0, "batch_asked": batch, "batch": batch, "prompt_tokens": 512,
        "new_tokens": 32, "repeats": 3, "dtype": "float32", "device": "cpu", "device_name": "CPU", "threads": 1,
        "attn": "auto", "cpu_share": 0.99, "error": None,
        "seconds": {name: times(value) for name, value in seconds.items()},
        "tokens_per_second": {"median": batch / 0.01, "all": [v * batch for v in (90.0, 100.0, 105.0)]},
        "kv_bytes": {"full": FULL_BYTES, "kept": int(FULL_BYTES * ratio)}, "alloc_bytes": int(FULL_BYTES * ratio),
        "memory": {"idle": None, "prefill": None, "compress": None, "decode": None},
    }  # fmt: skip


def data(root: Path) -> dict[str, str]:
    """Golden name -> the data of the figure as plots writes them."""
    from kvcli.analysis.figures import bars
    from kvcli.analysis.figures import files as plots
    from kvcli.analysis.figures.kinds import KINDS, chosen
    from kvcli.analysis.reading.load import load_run

    found = {}
    for name, make, kinds in (
        ("plain", plain, "relative,kl,top1,heatmap,pareto"), ("shots", shots, "shots,gain"),
        ("needle", needles, "needle"),
    ):  # fmt: skip
        for figure, sheet in plots.sheets(load_run(make(root / name)), None, chosen([kinds])):
            found[f"{name}-{figure}"] = plots.data_text(sheet)
    for one in bars.load(bench(root / "bench")):
        for kind in ("latency", "throughput"):
            (sheet,) = KINDS[kind].build(one)
            found[f"bench-{kind}-{one.suffix[0]}"] = plots.data_text(sheet)
    return found


def regenerate() -> None:
    import tempfile

    GOLDEN.mkdir(parents=True, exist_ok=True)
    for old in GOLDEN.glob("*.json"):
        old.unlink()
    with tempfile.TemporaryDirectory() as temporary:
        for name, text in data(Path(temporary)).items():
            (GOLDEN / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    regenerate()
