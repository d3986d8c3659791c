"""What capturing statistics costs a prefill: time and peak memory with and without, per length.

    python benchmarks/capture.py [--device cpu|cuda] [--lengths 1024,2048,...] [--repeats 3] [--json FILE]

`plain` is kvcli's wrapper with nothing captured; `window` keeps the last 64 queries, `sums` the column sums; `stock` is
transformers' own model with SDPA. Variants take turns, in another order at each repeat; ratios are medians over repeats
of the ratio to the same repeat's `plain`. On a CPU (8 layers, d = 512, float32, as in sweep_vs_kvpress.py) bars are for
processor time, which other programs on the machine do not add to, and a second process looks at memory. On a GPU (the
shape of Llama 3 8B, random weights, bfloat16) they are for the time by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

LLAMA_3_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072 + 1024,
              "eos_token_id": None, "bos_token_id": None,
              "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}  # fmt: skip
VARIANTS = ("plain", "window", "sums", "stock")
LENGTHS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (4096, 8192, 32768, 131072)}
BARS = {"cpu": {"window": 1.05, "sums": 1.6}, "cuda": {"window": 1.05, 32768: 1.3, 131072: 1.5}}
WINDOW = 64
STOCK_LIMIT = 4096
"""On a CPU, transformers' own model is timed once per length from here on; it is in no bar."""
GROWTH = 1.6
"""A prefill's time as a power of its length, to tell whether the next length fits: layers are linear, attention not."""
LINEAR = 1.15
"""Memory may grow by so much more than the length does before it is called worse than linear."""

EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Makes glibc give freed tensors back at once, so that a process holds no more than it uses; slower, so not timed."""

Measured = tuple[float, float, int]
"""Seconds by the clock, seconds that count, and peak bytes above what the model alone holds."""


def make_model(shape: dict[str, Any], device: str, seed: int = 0) -> Any:
    """A kvcli Model with random weights: float32 on a CPU, bfloat16 on a GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvcli.models.wrapper import Model
    from kvcli.testbed.model import build_tokenizer

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            hf = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(before)
    return Model(hf, build_tokenizer(), name="bench")


def prefill(model: Any, variant: str, n: int) -> Callable[[], Any]:
    """One prefill of n random tokens, to be called."""
    import torch

    from kvcli.attention.capture import Needs

    ids = torch.randint(3, model.hf.config.vocab_size, (1, n), generator=torch.Generator().manual_seed(n))
    if variant == "stock":
        ids = ids.to(model.device)

        def stock() -> Any:
            model.hf.set_attn_implementation("sdpa")
            with torch.inference_mode():
                return model.hf(ids, use_cache=True, logits_to_keep=1)

        return stock
    needs = Needs(frozenset({"all"} if variant == "sums" else ()), WINDOW if variant == "window" else 0)
    prompts = ids.tolist()
    return lambda: model.prefill(prompts, needs, [n - 32])


def measure(model: Any, variant: str, n: int, idle: int) -> Measured:
    """Seconds of one prefill and its peak memory above `idle` bytes."""
    import torch

    run, cuda = prefill(model, variant, n), model.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        forget_peak()
    started, processor = time.perf_counter(), time.process_time()
    kept = run()
    if cuda:
        torch.cuda.synchronize()
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    peak = torch.cuda.max_memory_allocated() if cuda else memory("VmHWM")
    del kept
    return seconds, seconds if cuda else processor, max(0, peak - idle)


def idle_bytes(model: Any) -> int:
    """What the process holds before any prefill that counts."""
    import torch

    prefill(model, "sums", 64)()
    gc.collect()
    if model.device.type == "cuda":
        return int(torch.cuda.memory_allocated())
    forget_peak()
    return memory("VmRSS")


def forget_peak() -> None:
    """Starts the peak of this process anew (Linux)."""
    with contextlib.suppress(OSError):  # without it the peak is that of the longest prompt so far, and they get longer
        Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; outside Linux its peak so far."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def start_memory_process(lengths: Sequence[int], threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__)), "--memory", "--lengths", ",".join(map(str, sorted(lengths)))]
    env = {**os.environ, **EXACT_MALLOC, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([*command, "--threads", str(threads)], stdout=subprocess.PIPE, text=True, env=env)


def look_at_memory(lengths: Sequence[int], threads: int) -> None:
    """The second process on a CPU: prints the peak bytes per length of `plain` and `sums`, one run each."""
    model = cpu_model(lengths, threads)
    idle = idle_bytes(model)
    peaks = {n: {v: measure(model, v, n, idle)[2] for v in ("plain", "sums")} for n in lengths}
    print(json.dumps(peaks))


def cpu_model(lengths: Sequence[int], threads: int) -> Any:
    import torch
    from sweep_vs_kvpress import SHAPE

    torch.set_num_threads(threads)
    return make_model({**SHAPE, "max_position_embeddings": max(lengths)}, "cpu")


def compare(
    model: Any, lengths: Sequence[int], repeats: int, *, stock_limit: int | None = None,
    seconds: float = float("inf"), say: Callable[[dict[str, Any]], None] = lambda row: None, warm_up_to: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per length: seconds of each repeat, median ratio to `plain`, and the first repeat's peak bytes.

    Lengths up to `warm_up_to` are run once before they count: kernels are compiled and plans made then. Stops before a
    repeat or a length that would end later than `seconds` from now.
    """
    end, rows = time.perf_counter() + seconds, []
    idle = idle_bytes(model)
    for n in lengths:
        clock: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        peaks: dict[str, int] = {}
        if n <= warm_up_to:
            for variant in VARIANTS:
                measure(model, variant, n, idle)
        for repeat in range(repeats):
            started = time.perf_counter()
            turn = repeat % len(VARIANTS)
            for variant in VARIANTS[turn:] + VARIANTS[:turn]:
                if variant == "stock" and repeat and stock_limit and n >= stock_limit:
                    continue
                wall, took, peak = measure(model, variant, n, idle)
                clock[variant].append(wall)
                times[variant].append(took)
                peaks.setdefault(variant, peak)
            took_all = time.perf_counter() - started
            if time.perf_counter() + took_all > end:
                break
        rows.append({
            "n": n, "wall": rounded(clock), "seconds": rounded(times), "peak_bytes": peaks,
            "ratio": ratios(times), "wall_ratio": ratios(clock),
        })  # fmt: skip
        say(rows[-1])
        longer = (lengths[len(rows)] / n) ** GROWTH if len(rows) < len(lengths) else 0
        if time.perf_counter() + longer * took_all > end:
            break
    return rows


def rounded(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {variant: [round(t, 4) for t in ts] for variant, ts in times.items()}


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Median over repeats of each variant's time over `plain`'s in the same repeat."""
    return {
        variant: round(median(a / b for a, b in zip(ts, times["plain"], strict=False)), 4)
        for variant, ts in times.items() if variant != "plain"
    }  # fmt: skip


def verdicts(rows: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """Each bar with what was measured; memory per token of the longest prompt over that of the one before."""
    bars, found = BARS[device], {}
    for row in rows:
        sums = bars.get("sums") or bars.get(row["n"])  # type: ignore[call-overload]
        for variant, bar in (("window", bars["window"]), ("sums", sums)):
            if bar is not None:
                ratio = row["ratio"][variant]
                found[f"{variant} at {row['n']}"] = {"ratio": ratio, "bar": bar, "met": ratio <= bar}
    if len(rows) > 1:
        for variant in ("plain", "sums"):
            (a, low), (b, high) = ((r["n"], r["peak_bytes"][variant]) for r in rows[-2:])
            growth = (high / b) / (low / a) if low else float("nan")
            found[f"{variant} memory per token, {b} over {a}"] = {
                "ratio": round(growth, 3), "bar": LINEAR, "met": growth <= LINEAR,
            }  # fmt: skip
    return found


HEADER = (
    "| tokens | plain s | window | sums | stock | plain MiB | sums MiB |\n"
    "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def line(row: dict[str, Any]) -> str:
    ratio = [f"{row['ratio'][v]:.3f}x" for v in ("window", "sums", "stock")]
    peaks = [f"{row['peak_bytes'][v] / 2**20:.0f}" for v in ("plain", "sums")]
    cells = [str(row["n"]), f"{median(row['seconds']['plain']):.3f}", *ratio, *peaks]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    lengths = args.lengths or LENGTHS[args.device]
    if args.memory:
        look_at_memory(lengths, args.threads)
        return
    from sweep_vs_kvpress import machine

    cpu = args.device == "cpu"
    other = start_memory_process(lengths, args.threads) if cpu else None
    model = cpu_model(lengths, args.threads) if cpu else make_model(LLAMA_3_8B, args.device)
    rows = compare(
        model, lengths, args.repeats, stock_limit=STOCK_LIMIT if cpu else None,
        warm_up_to=min(lengths) if cpu else max(lengths),
        say=lambda row: print(f"{row['n']}: {row['ratio']}", file=sys.stderr, flush=True),
    )  # fmt: skip
    if other is not None:
        peaks = json.loads(other.communicate()[0])
        for row in rows:
            row["peak_bytes"] = peaks[str(row["n"])]
    print("\n".join([HEADER, *map(line, rows)]))
    found = verdicts(rows, args.device)
    for name, verdict in found.items():
        print(f"{name}: {verdict['ratio']:.3f}, bar {verdict['bar']}: {'met' if verdict['met'] else 'NOT met'}")
    if args.json:
        result = {"rows": rows, "verdicts": found, "device": args.device, "threads": args.threads,
                  "repeats": args.repeats, "machine": machine()}  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
