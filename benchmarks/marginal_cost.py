"""What one more cell costs a sweep: 1, 6, 24 and 96 cells on workload (c) of sweep_vs_kvpress.py.

    python benchmarks/marginal_cost.py [--json FILE] [--repeats 3] [--threads 1]

20 questions behind a shared 1,200-token block, 2 new tokens, 8 layers, d = 512, float32. The bar is for the slope from
24 to 96 cells as a share of a stand-alone run (one cell): one more ratio <= 5 %. With one thread the figures are
processor time, which other programs on the machine do not add to. Grids take turns; medians over repeats.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from sweep_vs_kvpress import METHODS, Workload, kvcli_sweep, machine, make_model, make_workloads

GRIDS = {1: (1, 1), 6: (6, 1), 24: (6, 4), 96: (6, 16)}
"""Cells -> methods, ratios."""
BAR = 0.05


def ratios(count: int) -> list[str]:
    """Evenly over 0.05 .. 0.8; one alone is 0.5."""
    return ["0.5"] if count == 1 else [f"{0.05 + 0.75 * i / (count - 1):.2f}" for i in range(count)]


def measure(repeats: int, threads: int) -> dict[int, list[float]]:
    """Seconds per grid and repeat."""
    import torch

    from kvcli.models.wrapper import Model
    from kvcli.testbed.model import build_tokenizer

    torch.set_num_threads(threads)
    model = Model(make_model(), build_tokenizer(), name="bench")
    work = next(w for w in make_workloads() if w.name == "c")
    kvcli_sweep(model, Workload("warm", [work.prompts[0][:900]], 2, 800), 0)
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[int, list[float]] = {cells: [] for cells in GRIDS}
    for repeat in range(repeats):
        for cells in sorted(GRIDS, reverse=bool(repeat % 2)):
            methods, count = GRIDS[cells]
            started = clock()
            sink, _ = kvcli_sweep(model, work, 0, METHODS[:methods], ratios(count))
            seconds[cells].append(clock() - started)
            assert len(sink.records) == cells * len(work.prompts)
    return seconds


def summary(seconds: dict[int, list[float]], threads: int) -> dict[str, Any]:
    middle = {cells: median(times) for cells, times in seconds.items()}
    slope = (middle[96] - middle[24]) / 72
    return {
        "cells": {str(cells): {"median": round(middle[cells], 3), "seconds": [round(t, 3) for t in times]}
                  for cells, times in seconds.items()},
        "one_more_ratio": round(slope / middle[1], 4), "bar": BAR, "holds": slope / middle[1] <= BAR,
        "one_more_method": round((middle[6] - middle[1]) / 5 / middle[1], 4), "threads": threads,
        "clock": "processor time" if threads == 1 else "wall time", "machine": machine(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    found = summary(measure(args.repeats, args.threads), args.threads)
    alone = found["cells"]["1"]["median"]
    print(f"| cells | {found['clock']} s | runs of one cell alone |\n| ---: | ---: | ---: |")
    for cells, row in found["cells"].items():
        print(f"| {cells} | {row['median']:.2f} | {row['median'] / alone:.2f} |")
    print(f"\none more ratio: {found['one_more_ratio']:.1%} of a run of one cell (bar {BAR:.0%})")
    print(f"one more method: {found['one_more_method']:.1%}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
