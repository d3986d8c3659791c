"""What only a GPU can show, in one command of less than eight minutes.

    python3 benchmarks/gpu.py [--small] [--sections correctness,kernel,...] [--json FILE]

Runs from a checkout that is not installed, without network or data sets; needs PyTorch and transformers. The model has
the shape of Llama 3 8B, random weights and bfloat16 (`--small`: 4 layers, for a small GPU). Each section is a process
of its own with a time limit: one that fails or takes too long is reported as such, what it had measured stays, and the
rest goes on.

correctness   every backend and the Triton kernel against the reference, in several dtypes and head widths
kernel        TFLOP/s of the fused attention and of the column sums, and of other block sizes
capture       prefill time and peak memory with and without capture (bars: 1.3x at 32k, 1.5x at 128k, linear memory)
sweep         20 questions behind a shared block, 6 methods x 4 ratios, against one cell at a time (and kvpress)
decode        tokens per second at batch 1, 16 and 64 against reading weights and cache at copy speed

Writes docs/benchmarks/gpu-NAME.json. Where there is no GPU it says so and writes nothing; `--cpu-check` runs every
section at tiny sizes on the CPU instead, to test this script, and writes only with --json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

STARTED = time.monotonic()
LIMITS = {"correctness": 80, "kernel": 60, "capture": 170, "sweep": 80, "decode": 60}
"""Seconds per section; 450 in all."""
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2}  # fmt: skip
SMALL = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 2}  # fmt: skip
BARS = {"prefill_32768": 1.3, "prefill_131072": 1.5, "memory_per_token": 1.15, "decode_share_of_bound": 0.5}
CAPTURE_REPEATS, WARM_UP_TO = 3, 32768
KEPT_TOKENS, STEPS = 2048, 20


class Section:
    """Where a section prints and stores what it measured, and when it has to end."""

    def __init__(self, name: str, out: Path, size: str, end: float) -> None:
        self.name, self.out, self.size, self.end = name, out, size, end
        self.device = "cpu" if size == "tiny" else "cuda"

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, text: str, **row: Any) -> None:
        print(f"  {text}", flush=True)
        self._write({"section": self.name, "row": row})

    def skip(self, text: str) -> None:
        self.add(f"not measured: {text}", skipped=text)

    def end_with(self, **facts: Any) -> None:
        self._write({"section": self.name, **facts})

    def _write(self, entry: dict[str, Any]) -> None:
        with self.out.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def shape(section: Section) -> dict[str, Any]:
    from capture import LLAMA_3_8B

    small = {"tiny": {**TINY, "vocab_size": 8192}, "small": SMALL}.get(section.size, {})
    return {**LLAMA_3_8B, **small}


def model_of(section: Section) -> Any:
    from capture import make_model

    started = time.monotonic()
    model = make_model(shape(section), section.device)
    size = model.shapes.parameters / 1e9
    print(f"  model of {size:.2f} B parameters made in {time.monotonic() - started:.0f} s", flush=True)
    return model


def synchronize(section: Section) -> None:
    import torch

    if section.device == "cuda":
        torch.cuda.synchronize()


def seconds_of(section: Section, run: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a call, the device's work included, after one call that does not count."""
    run()
    times = []
    for _ in range(repeats):
        synchronize(section)
        started = time.perf_counter()
        run()
        synchronize(section)
        times.append(time.perf_counter() - started)
    return median(times)


def correctness(section: Section) -> None:
    """Largest errors of output and column sums against the reference in float64 on the same inputs."""
    import torch

    kinds = [(torch.bfloat16, dim) for dim in (64, 96, 128, 256)]
    kinds += [(torch.float16, 128), (torch.float32, 64), (torch.float32, 128)]
    backends = ["sdpa", "blockwise"]
    if section.tiny:
        kinds = [(torch.float32, 64), (torch.bfloat16, 64)]
    elif find_spec("flash_attn"):
        backends.insert(1, "flash")
    else:
        section.skip("flash-attn, which is not installed")
    failed = 0
    for dtype, dim in kinds:
        for prefix in (0, 30 if section.tiny else 300):
            for backend in backends:
                if backend == "flash" and dtype == torch.float32:
                    continue
                case = {"backend": backend, "dtype": str(dtype).removeprefix("torch."), "dim": dim, "prefix": prefix}
                try:
                    row = one_case(section, backend, dtype, dim, prefix)
                except Exception as error:  # the other cases still say something
                    traceback.print_exc()
                    row = {"ok": False, "error": f"{type(error).__name__}: {error}"}
                failed += not row["ok"]
                words = " ".join(map(str, case.values()))
                section.add(f"{'ok    ' if row['ok'] else 'FAILED'} {words} {row}", **case, **row)
    section.end_with(failed=failed)
    if failed:
        raise SystemExit(f"{failed} cases do not agree with the reference")


TOLERANCE = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-4}
"""Of an output near 1. A sum may be off by 1e-3 of itself plus 1e-4 in every dtype: scores are float32."""


def one_case(section: Section, backend: str, dtype: Any, dim: int, prefix: int) -> dict[str, Any]:
    import torch

    from kvcli.attention import backends, reference, sums

    generator = torch.Generator().manual_seed(dim + prefix)
    batch, heads, kv_heads, size = 2, 8, 2, 40 if section.tiny else 333

    def normal(*wanted: int) -> Any:
        return torch.randn(*wanted, generator=generator).to(section.device, dtype)

    query = normal(batch, size, heads, dim).transpose(1, 2)
    key, value = normal(batch, kv_heads, size, dim), normal(batch, kv_heads, size, dim)
    before = (normal(kv_heads, prefix, dim), normal(kv_heads, prefix, dim)) if prefix else None
    weights = {
        "all": torch.ones(batch, size, device=section.device),
        "some": (torch.rand(batch, size, generator=generator) > 0.5).float().to(section.device),
    }
    scaling = dim**-0.5
    out, got = backends.prefill(query, key, value, scaling, weights, backend, before)
    joined = [x.double() for x in backends._joined(key, value, before)]
    truth, expected = reference.prefill(query.double(), *joined, scaling, weights)
    row: dict[str, Any] = {"out": error_of(out, truth), "sums": max(relative(got[n], expected[n]) for n in weights)}
    ok = row["out"] <= TOLERANCE[str(dtype).removeprefix("torch.")] and row["sums"] <= 1
    if backend == "sdpa":
        row["kernel"] = kernel_name(query, key, value)
        found = backends._fused(query, key, value, scaling, "sdpa", before, exact=True)
        if found is None:
            return {**row, "ok": False, "error": "no fused kernel"}
        keys = None if before is None else before[0]
        stacked = torch.stack(list(weights.values()))
        tiles = sums.tiled(query, key, found[1], scaling, stacked, keys)
        row["tiles"] = max(relative(tiles[i], expected[n]) for i, n in enumerate(weights))
        ok = ok and row["tiles"] <= 1
        if triton_here(section) and (dtype != torch.bfloat16 or section.device == "cuda"):
            from kvcli.attention.triton_sums import column_sums

            runs = [column_sums(query, key, found[1], scaling, stacked, keys) for _ in range(2)]
            row["triton"] = max(relative(runs[0][i], expected[n]) for i, n in enumerate(weights))
            row["same_twice"] = torch.equal(*runs)
            ok = ok and row["triton"] <= 1 and row["same_twice"]
    return {**row, "ok": bool(ok)}


def kernel_name(query: Any, key: Any, value: Any) -> str:
    """Which of PyTorch's kernels fused.attention takes for causal attention."""
    from torch.nn.attention import SDPBackend

    from kvcli.attention import fused

    q, k, v = (fused._aligned(x) for x in (query, key, value))
    found, repeated = fused._choice(q, k, v, 1.0, True), ""
    if found == SDPBackend.MATH and q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        found, repeated = fused._choice(q, k, v, 1.0, True), " repeated"
    return str(found).removeprefix("SDPBackend.") + repeated


def triton_here(section: Section) -> bool:
    """On a GPU whether kvcli uses it; on a CPU whether it can be interpreted."""
    from kvcli.attention.sums import triton_runs

    return triton_runs() if section.device == "cuda" else find_spec("triton") is not None


def error_of(got: Any, truth: Any) -> float:
    return float((got.double() - truth).abs().max())


def relative(got: Any, truth: Any) -> float:
    """Largest error in units of what a sum may be off."""
    return round(float(((got.double() - truth).abs() / (1e-4 + 1e-3 * truth.abs())).max()), 5)


def kernel(section: Section) -> None:
    """Speed of attention with logsumexp and of the column sums, in the sizes of one layer."""
    import torch

    from kvcli.attention import fused, sums

    heads, kv_heads, dim = (4, 2, 64) if section.tiny else (32, 8, 128)
    dtype = torch.float32 if section.tiny else torch.bfloat16
    for n in (40, 60) if section.tiny else (8192, 32768, 131072):
        if section.left() < 15:
            section.skip(f"{n} tokens, for lack of time")
            continue
        query = torch.randn(1, heads, n, dim, device=section.device, dtype=dtype)
        key, value = (torch.randn(1, kv_heads, n, dim, device=section.device, dtype=dtype) for _ in range(2))
        weights = torch.ones(2, 1, n, device=section.device)
        arguments = (query, key, value, dim**-0.5)
        done = fused.attention(*arguments, causal=True, package=False, exact=True)
        if done is None:
            raise SystemExit("no fused kernel for these inputs")
        lse, work = done[1], n * n * heads * dim
        row: dict[str, Any] = {"n": n, "kernel": kernel_name(query, key, value)}
        repeats = 2 if section.tiny else 5
        took = seconds_of(
            section, lambda a=arguments: fused.attention(*a, causal=True, package=False, exact=True), repeats
        )
        row["attention_ms"], row["attention_tflops"] = round(took * 1e3, 3), round(2 * work / took / 1e12, 1)
        if triton_here(section):
            from kvcli.attention.triton_sums import column_sums

            for count in (1, 2):
                took = seconds_of(
                    section,
                    lambda q=query, k=key, s=lse, w=weights[:count]: column_sums(q, k, s, dim**-0.5, w),
                    repeats,
                )
                row[f"sums_{count}_ms"] = round(took * 1e3, 3)
                row[f"sums_{count}_tflops"] = round(work / took / 1e12, 1)
        if n <= 8192:
            took = seconds_of(
                section, lambda q=query, k=key, s=lse, w=weights[:1]: sums.tiled(q, k, s, dim**-0.5, w), 2
            )
            row["tiles_ms"] = round(took * 1e3, 3)
        section.add(" ".join(f"{k}={v}" for k, v in row.items()), **row)
    if triton_here(section) and section.device == "cuda":
        other_blocks(section)


OTHER_BLOCKS = ((64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2))
"""Keys, queries, warps, stages for heads of 128."""


def other_blocks(section: Section) -> None:
    """Whether other block sizes than those of triton_sums.blocks would be faster here."""
    import torch

    from kvcli.attention.triton_sums import Blocks, column_sums

    n, heads, kv_heads, dim = 16384, 32, 8, 128
    query = torch.randn(1, heads, n, dim, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, kv_heads, n, dim, device="cuda", dtype=torch.bfloat16)
    lse, weights = torch.full((1, heads, n), 20.0, device="cuda"), torch.ones(1, 1, n, device="cuda")
    for sizes in OTHER_BLOCKS:
        if section.left() < 8:
            return
        try:
            took = seconds_of(
                section, lambda b=Blocks(*sizes): column_sums(query, key, lse, dim**-0.5, weights, sizes=b)
            )
        except Exception as error:  # more shared memory than this GPU has, most likely
            section.add(f"blocks {sizes}: {type(error).__name__}", blocks=sizes, error=str(error)[:200])
            continue
        speed = round(n * n * heads * dim / took / 1e12, 1)
        section.add(f"blocks {sizes}: {took * 1e3:.2f} ms, {speed} TFLOP/s", blocks=sizes, ms=took * 1e3, tflops=speed)


def floor(config: dict[str, Any], n: int) -> float:
    """Operations of a prefill with column sums over those without: what no implementation gets below."""
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    kv = config["num_key_value_heads"] / heads
    linear = 2 * n * layers * (2 * hidden**2 * (1 + kv) + 3 * hidden * config["intermediate_size"])
    attention = 2 * n**2 * hidden * layers
    return (linear + 1.5 * attention) / (linear + attention)


def capture(section: Section) -> None:
    from capture import HEADER, compare, line

    lengths = (64, 128) if section.tiny else (8192, 32768, 131072)
    model = model_of(section)
    print(HEADER, flush=True)

    def say(row: dict[str, Any]) -> None:
        bar, least = BARS.get(f"prefill_{row['n']}"), floor(shape(section), row["n"])
        ratio = row["ratio"]["sums"]
        judged = "" if bar is None else f", bar {bar}: {'met' if ratio <= bar else 'NOT met'}"
        section.add(f"{line(row)}\n  sums {ratio:.3f}x (floor {least:.3f}x{judged})", **row, floor=least, bar=bar)

    rows = compare(model, lengths, CAPTURE_REPEATS, seconds=section.left(), say=say, warm_up_to=WARM_UP_TO)
    for n in lengths[len(rows) :]:
        section.skip(f"{n} tokens, for lack of time")
    if len(rows) > 1:
        per_token = [row["peak_bytes"]["sums"] / row["n"] for row in rows]
        growth = per_token[-1] / per_token[-2] if per_token[-2] else float("nan")
        met = growth <= BARS["memory_per_token"]
        word = "met" if met else "NOT met"
        text = f"memory per token at {rows[-1]['n']} over {rows[-2]['n']}: {growth:.3f}, bar 1.15: {word}"
        section.add(text, memory_per_token=growth, met=met)


def sweep(section: Section) -> None:
    """Workload (c): the whole grid at once, then each cell as a run of its own on one question, scaled to all."""
    import sweep_vs_kvpress as peer

    model = model_of(section)
    work = next(w for w in peer.make_workloads() if w.name == "c")
    methods, kept = peer.METHODS, peer.KEPT
    if section.tiny:
        work = peer.Workload("c", [p[peer.BLOCK - 150 :] for p in work.prompts[:2]], 2, 150)
        methods, kept = ("Snap", "Streaming"), ("0.5",)
    cells, prompts = len(methods) * len(kept), len(work.prompts)
    peer.kvcli_sweep(model, peer.Workload("warm", work.prompts[:2], 2, work.question), 0, methods, kept)
    together = []
    for _ in range(2):
        synchronize(section)
        sink, seconds = peer.kvcli_sweep(model, work, 0, methods, kept)
        assert len(sink.records) == cells * prompts
        together.append(seconds)
        section.add(f"all {cells} cells of {prompts} prompts: {together[-1]:.2f} s", together=together[-1])
    alone = []
    for i, (method, ratio) in enumerate((m, r) for m in methods for r in kept):
        if section.left() < 5:
            break
        one = peer.Workload("one", [work.prompts[i % prompts]], work.new, work.question)
        sink, seconds = peer.kvcli_sweep(model, one, 0, [method], [ratio])
        assert len(sink.records) == 1
        alone.append(seconds)
    if not alone:
        section.skip("single cells, for lack of time")
        return
    apart = sum(alone) / len(alone) * cells * prompts
    gain = apart / median(together)
    text = f"one cell at a time: {apart:.0f} s ({len(alone)} runs of {cells * prompts} measured): {gain:.1f} x"
    section.add(text, one_at_a_time=apart, measured=len(alone), speedup=gain)
    if find_spec("kvpress") is None:
        section.skip("kvpress, which is not installed")
        return
    times = []
    for i, (method, ratio) in enumerate((m, r) for m in methods for r in kept):
        if section.left() < 5:
            break
        times.append(kvpress_seconds(section, model.hf, work.prompts[i % prompts], method, 1 - float(ratio), work.new))
    theirs = sum(times) / len(times) * cells * prompts
    gain = theirs / median(together)
    section.add(f"kvpress: {theirs:.0f} s ({len(times)} runs measured): {gain:.1f} x", kvpress=theirs, speedup=gain)


def kvpress_seconds(section: Section, hf: Any, prompt: Any, method: str, removed: float, new: int) -> float:
    """One kvpress run as its pipeline does it: prefill inside the press, then greedy decoding."""
    import torch
    from peer import PRESSES
    from transformers import DynamicCache

    ids, cache = prompt[None].to(hf.device), DynamicCache()
    hf.set_attn_implementation("eager" if method == "Observed" else "sdpa")
    synchronize(section)
    started = time.perf_counter()
    with torch.inference_mode():
        with PRESSES[method](removed)(hf):
            where = torch.arange(ids.shape[1], device=hf.device)
            hidden = hf.model(ids, past_key_values=cache, cache_position=where).last_hidden_state
        token = hf.lm_head(hidden[:, -1:]).argmax(-1)
        hf.set_attn_implementation("sdpa")
        for position in range(ids.shape[1], ids.shape[1] + new - 1):
            at = torch.tensor([position], device=hf.device)
            out = hf(token, past_key_values=cache, position_ids=at[None], cache_position=at)
            token = out.logits[:, -1:].argmax(-1)
    int(token)
    return time.perf_counter() - started


def decode(section: Section) -> None:
    """Steps of one new token per row over `KEPT_TOKENS` kept pairs, eager, against the time to read what it must."""
    import torch

    model = model_of(section)
    kept = 40 if section.tiny else KEPT_TOKENS
    bandwidth = copy_bandwidth(section)
    section.add(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s", bandwidth=bandwidth)
    embedding = model.hf.get_input_embeddings().weight
    tied = embedding is model.hf.get_output_embeddings().weight
    weights = sum(p.nbytes for p in model.hf.parameters()) - (0 if tied else embedding.nbytes)
    dense = [
        torch.randn(heads, kept, width // 2, device=section.device, dtype=model.dtype)
        for heads, width in model.shapes.dims
    ]
    pair = sum(heads * width for heads, width in model.shapes.dims) * dense[0].itemsize
    for batch in (1, 4) if section.tiny else (1, 16, 64):
        if section.left() < 8:
            section.skip(f"batch {batch}, for lack of time")
            continue
        steps, took, device = decode_steps(section, model, dense, batch)
        bound, bar = (weights + batch * (kept + steps / 2) * pair) / bandwidth, BARS["decode_share_of_bound"]
        row = {
            "batch": batch, "kept": kept, "ms_per_step": took * 1e3, "tokens_per_s": batch / took,
            "bound_ms": bound * 1e3, "share_of_bound": bound / took, "device_ms": device,
        }  # fmt: skip
        judged = "" if batch < 16 else f", bar {bar}: {'met' if bound / took >= bar else 'NOT met'}"
        busy = "" if device is None else f", the device is busy for {device:.2f} ms"
        text = f"batch {batch}: {batch / took:.0f} tokens/s, {took * 1e3:.2f} ms a step, bound {bound * 1e3:.2f} ms"
        section.add(f"{text} ({bound / took:.0%}{judged}){busy}", **row)


def decode_steps(section: Section, model: Any, dense: list[Any], batch: int) -> tuple[int, float, float | None]:
    """(steps, seconds of each, milliseconds of kernels in one) for a batch of rows that keep all of `dense`."""
    import torch

    from kvcli.cache.kv_cache import CompressedCache
    from kvcli.cache.rows import Row

    kept, warm, steps = dense[0].shape[1], 3, 3 if section.tiny else STEPS
    rows = [Row(dense, dense, [torch.arange(kept)] * len(dense)) for _ in range(batch)]
    cache = CompressedCache(rows, warm + steps + 1)
    tokens = torch.full((batch, 1), 7, device=section.device)
    places = [torch.full((batch, 1), kept + i, device=section.device) for i in range(warm + steps + 1)]
    for place in places[:warm]:
        model.step(tokens, place, cache)
    synchronize(section)
    started = time.perf_counter()
    for place in places[warm:-1]:
        model.step(tokens, place, cache)
    synchronize(section)
    took = (time.perf_counter() - started) / steps
    return steps, took, device_ms(section, lambda: model.step(tokens, places[-1], cache))


def copy_bandwidth(section: Section) -> float:
    """Bytes per second, read and written, of copying a large tensor."""
    import torch

    size = 1 << 20 if section.tiny else 1 << 30
    source = torch.empty(size, dtype=torch.uint8, device=section.device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(section, lambda: target.copy_(source), 10)


def device_ms(section: Section, step: Callable[[], Any]) -> float | None:
    """Milliseconds of kernels in one step: what remains when the host's part of a step is taken away."""
    if section.device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        synchronize(section)
    total = sum(getattr(event, "self_device_time_total", 0.0) for event in seen.key_averages())
    return total / 1e3 or None


RUN: dict[str, Callable[[Section], None]] = {
    "correctness": correctness, "kernel": kernel, "capture": capture, "sweep": sweep, "decode": decode,
}  # fmt: skip


def child(names: Sequence[str], out: Path, size: str) -> int:
    """Runs sections in this process; an error ends one of them and is written down."""
    import torch

    if size == "tiny":
        torch.set_num_threads(1)
    failures, end = 0, STARTED
    for name in names:
        end += LIMITS[name]
        section = Section(name, out, size, end - 5)
        if section.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            capability = ".".join(map(str, torch.cuda.get_device_capability()))
            section.end_with(device=torch.cuda.get_device_name(), capability=capability, memory=total, free=free)
        started = time.monotonic()
        try:
            RUN[name](section)
            section.end_with(status="done", seconds=time.monotonic() - started)
        except (Exception, SystemExit) as error:
            failures += 1
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            text = f"{type(error).__name__}: {error}"[:500]
            section.end_with(status="failed", error=text, seconds=time.monotonic() - started)
    return min(1, failures)


def start(names: Sequence[str], size: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Runs sections in one process and collects what they wrote, however that process ended."""
    out = folder / f"{'-'.join(names)}.jsonl"
    out.touch()
    command = [sys.executable, str(Path(__file__).resolve()), "--child", ",".join(names), "--out", str(out)]
    env = dict(os.environ)
    if size == "tiny":
        env["TRITON_INTERPRET"] = "1"
    limit = sum(LIMITS[name] for name in names)
    try:
        code: int | None = subprocess.run([*command, "--size", size], env=env, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        code = None
    found: dict[str, dict[str, Any]] = {name: {"rows": []} for name in names}
    for text in out.read_text().splitlines():
        entry = json.loads(text)
        section = found[entry.pop("section")]
        if "row" in entry:
            section["rows"].append(entry["row"])
        else:
            section.update(entry)
    ended = f"not ended after {limit} s" if code is None else f"its process ended with code {code}"
    for section in found.values():
        section.setdefault("status", "failed")
        if section["status"] == "failed":
            section.setdefault("error", ended)
    return found


def summary(sections: dict[str, dict[str, Any]]) -> str:
    lines = ["| section | | seconds | rows |", "| --- | --- | ---: | ---: |"]
    for name, found in sections.items():
        word = found["status"] if found["status"] == "done" else f"FAILED: {found['error']}"
        seconds = f"{found['seconds']:.0f}" if "seconds" in found else ""
        lines.append(f"| {name} | {word} | {seconds} | {len(found['rows'])} |")
    return "\n".join(lines)


def facts(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from sweep_vs_kvpress import machine

    device = {key: next((s[key] for s in sections.values() if key in s), None)
              for key in ("device", "capability", "memory")}  # fmt: skip
    return {**device, **machine()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(RUN))
    parser.add_argument("--json", type=Path, help="instead of docs/benchmarks/gpu-NAME.json")
    parser.add_argument("--small", dest="size", action="store_const", const="small", default="8b")
    parser.add_argument("--cpu-check", dest="size", action="store_const", const="tiny")
    parser.add_argument("--size", choices=("8b", "small", "tiny"), help=argparse.SUPPRESS)
    parser.add_argument("--child", type=lambda text: text.split(","), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.out, args.size)
    unknown = set(args.sections) - set(RUN)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(RUN)}")
    import torch

    if args.size != "tiny" and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured")
        return 0
    sections: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for names in [args.sections] if args.size == "tiny" else [[name] for name in args.sections]:
            print(f"{', '.join(names)}: at most {sum(LIMITS[n] for n in names)} s", flush=True)
            sections |= start(names, args.size, Path(folder))
    print(summary(sections))
    result = {"size": args.size, "sections": sections, **facts(sections)}
    name = re.sub(r"[^a-z0-9]+", "-", str(result["device"] or "unknown").lower()).strip("-")
    path = args.json or (None if args.size == "tiny" else ROOT / "docs" / "benchmarks" / f"gpu-{name}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")
    return int(any(found["status"] != "done" for found in sections.values()))


if __name__ == "__main__":
    raise SystemExit(main())
