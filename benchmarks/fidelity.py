"""kvcli's methods against kvpress's presses on the same random Llama and prompts: do they keep the same pairs?

    python benchmarks/fidelity.py [--json FILE] [--markdown FILE] [--venv FOLDER]

Both sides load the same float64 weights (GQA: 8 query heads, 4 KV heads) and read the same token ids; kvcli gets
kvpress's counts and settings. Each line says how many KV heads keep the very same set, how many of the kept positions
are shared, and why some are not. Exits with 1 when a method agrees less than its known difference explains. kvpress
gets an environment of its own, made when FOLDER has none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENT = Path.home() / ".cache" / "kvcli" / "kvpress-0.5.5"  # as in sweep_vs_kvpress.py
SHAPE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096,
         "initializer_range": 0.08, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}  # fmt: skip
LENGTHS = (320, 704, 1280)
REMOVED = (0.5, 0.75)
WINDOW = 64
SNAP = f"window={WINDOW},kernel=5,pool=avg"
NEWEST = "the newest token always stays here"
BASE = "base=snapkv," + ",".join(f"base.{pair}" for pair in SNAP.split(","))


@dataclass(frozen=True)
class Case:
    """A press (its name in `press_of`), kvcli's method with the same settings, the least share of positions that must
    be shared, and what is known to differ. newest: only the newest token, which always stays in kvcli, may differ.
    """

    press: str
    ours: str
    least: float
    reason: str = ""
    newest: bool = False

    def text(self, size: int) -> str:
        """kvcli's method for a budget of so many pairs per head; FIRST is half of them less the window's."""
        first = max(0, size // 2 - WINDOW) / max(1, size - WINDOW)
        return self.ours.replace("FIRST", f"{first + 1e-9:.9f}")


CASES = (
    Case("SnapKV", f"snapkv:{SNAP}", 0.9999),
    Case("StreamingLLM", "streaming_llm", 1.0),
    Case("TOVA", "tova", 0.9999),
    Case("Knorm", "knorm:skip_layers=none", 0.99, NEWEST, newest=True),
    Case("KeyDiff", "keydiff", 0.99, NEWEST, newest=True),
    Case("KeyDiff, blocks of 16", "keydiff:block=16", 0.99, NEWEST, newest=True),
    Case(
        "KeyDiff, blocks of 100", "keydiff:block=100", 0.6,
        "blocks begin at the first token here, at the first one over budget there; alike for budgets of whole blocks",
    ),
    Case(
        "LagKV", "lagkv", 0.99,
        "where the budget does not divide, the first partitions keep one more here, any there; below the floor (cells "
        "not compared) the method says unreachable here, and part of what must stay is cut there",
    ),
    Case("ExpectedAttention", "expected_attention", 0.99, NEWEST, newest=True),
    Case(
        "AdaKV", f"adakv:{BASE},rule=safeguard", 0.9,
        "a head's safe fifth lies outside the window here, the window counts in it there: seen where a head has little",
    ),
    Case(
        "CriticalKV", f"criticalkv:{BASE}", 0.9,
        "the window counts in the half that attention decides there, so attention decides less there",
    ),
    Case("CriticalKV, halves as there", f"criticalkv:{BASE},first=FIRST", 0.9999),
    Case("CriticalAdaKV", f"criticalkv:{BASE},heads=adaptive", 0.9, "as AdaKV and CriticalKV"),
    Case(
        "PyramidKV", f"pyramidkv:{SNAP}", 0.6,
        "layer budgets there do not add up to the total, and are SnapKV's where the last layer's is below the window",
    ),
    Case("ObservedAttention", "h2o", 0.3, "another definition there: column means, no recent half"),
    Case("ThinK", "think:prune=0.5", 0.8, "the window's keys stay whole here and do not score"),
)  # fmt: skip


def press_of(name: str, removed: float) -> Any:
    """A press with kvpress's defaults, but for LagKV's sinks, which are kvcli's."""
    import kvpress as k

    snap = k.SnapKVPress(removed)
    presses = {
        "SnapKV": lambda: snap, "StreamingLLM": lambda: k.StreamingLLMPress(removed),
        "TOVA": lambda: k.TOVAPress(removed), "Knorm": lambda: k.KnormPress(removed),
        "KeyDiff": lambda: k.KeyDiffPress(removed),
        "KeyDiff, blocks of 16": lambda: k.BlockPress(k.KeyDiffPress(removed), block_size=16),
        "KeyDiff, blocks of 100": lambda: k.BlockPress(k.KeyDiffPress(removed), block_size=100),
        "LagKV": lambda: k.LagKVPress(removed, n_sink=16), "AdaKV": lambda: k.AdaKVPress(snap),
        "ExpectedAttention": lambda: k.ExpectedAttentionPress(removed),
        "CriticalKV": lambda: k.CriticalKVPress(snap),
        "CriticalKV, halves as there": lambda: k.CriticalKVPress(snap),
        "CriticalAdaKV": lambda: k.CriticalAdaKVPress(snap),
        "PyramidKV": lambda: k.PyramidKVPress(removed),
        "ObservedAttention": lambda: k.ObservedAttentionPress(removed), "ThinK": lambda: k.ThinKPress(0.5),
    }  # fmt: skip
    return presses[name]()


def peer(job: str, answer: str) -> None:
    """kvpress's side, in its own environment: for each job kept[layer][KV head], positions (channels for ThinK)."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    saved = torch.load(job)
    model = LlamaForCausalLM(LlamaConfig(**saved["config"])).double().eval()
    model.load_state_dict(saved["weights"])

    def read(ids: torch.Tensor, press: Any = None) -> list[Any]:
        cache = DynamicCache()
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
        if press is None:
            model.model(ids, past_key_values=cache, cache_position=torch.arange(ids.shape[1]))
        else:
            with press(model):
                model.model(ids, past_key_values=cache, cache_position=torch.arange(ids.shape[1]))
        return [layer.keys[0] for layer in cache.layers]

    answers = []
    with torch.no_grad():
        dense_of: dict[Any, list[torch.Tensor]] = {}
        for name, at, removed in saved["jobs"]:
            ids = saved["prompts"][at][None]
            kernel = "eager" if name == "ObservedAttention" else "sdpa"
            model.set_attn_implementation(kernel)
            if (kernel, at) not in dense_of:
                dense_of[kernel, at] = read(ids)
            dense, pruned = dense_of[kernel, at], read(ids, press_of(name, removed))
            kept = []
            for number, (whole, left) in enumerate(zip(dense, pruned, strict=True)):
                masked = model.model.layers[number].self_attn.masked_key_indices
                if name == "ThinK":
                    stays = (left != 0).any(1)
                elif masked is not None:
                    stays = torch.ones(whole.shape[:2], dtype=torch.bool)
                    stays[masked[1], masked[2]] = False
                else:  # a kept key is the dense one, bit for bit: its first channel tells which
                    heads = range(len(whole))
                    stays = torch.stack([torch.isin(whole[h, :, 0], left[h, :, 0]) for h in heads])
                    assert int(stays.sum()) == left.shape[0] * left.shape[1]
                kept.append([row.nonzero().flatten().tolist() for row in stays])
            answers.append(kept)
    Path(answer).write_text(json.dumps(answers))


@dataclass
class Line:
    case: Case
    heads: int = 0
    same: int = 0
    but_newest: int = 0
    positions: int = 0
    shared: int = 0
    left_out: int = 0
    cells: list[dict[str, Any]] = field(default_factory=list)

    def add(self, n: int, removed: float, ours: list[list[list[int]]], theirs: list[list[list[int]]]) -> None:
        pairs = [(set(a), set(b)) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
        positions = sum(max(len(a), len(b)) for a, b in pairs)
        shared, same = sum(len(a & b) for a, b in pairs), sum(a == b for a, b in pairs)
        self.but_newest += sum(a - b <= {n - 1} and len(b - a) == len(a - b) for a, b in pairs)
        self.heads, self.same = self.heads + len(pairs), self.same + same
        self.positions, self.shared = self.positions + positions, self.shared + shared
        cell = {"n": n, "removed": removed, "heads": len(pairs), "same": same, "agreement": shared / positions}
        cell["counts"] = [[len(head) for head in layer] for layer in theirs]
        self.cells.append(cell)

    @property
    def explained(self) -> bool:
        """Whether nothing differs beyond what is known to."""
        return self.agreement >= self.case.least and (not self.case.newest or self.but_newest == self.heads)

    @property
    def agreement(self) -> float:
        return self.shared / max(1, self.positions)

    def record(self) -> dict[str, Any]:
        return {
            "press": self.case.press, "method": self.case.ours, "heads": self.heads, "same": self.same,
            "same_but_newest": self.but_newest, "agreement": self.agreement, "least": self.case.least,
            "not_compared": self.left_out,
            "reason": self.case.reason, "cells": self.cells,
        }  # fmt: skip


def context_of(model: Any, ids: list[int]) -> Any:
    """One prefill with everything that the methods read."""
    from kvcli.attention.capture import Needs
    from kvcli.methods.catalog import build
    from kvcli.methods.context import Context
    from kvcli.spans import Region

    n = len(ids)
    needs: frozenset[str] = frozenset().union(*(build(case.text(0)).needs() for case in CASES)) - {"o_proj"}
    done = model.prefill([ids], Needs.of(sorted(needs)), [n - 1])
    dense, shapes = done.dense(0), model.shapes
    return Context(
        n=n, heads=shapes.heads, kv_heads=shapes.kv_heads[0], token_ids=ids, keys=dense.keys, values=dense.values,
        regions=[Region("context", 0, n - 1), Region("question", n - 1, n)], column_sums=dense.column_sums,
        window_queries=dense.window_queries, scaling=done.capture.scaling, sample_id="0", seed=0, rope=model.rope,
        o_proj=model.o_proj, moments=dense.moments,
    )  # fmt: skip


def ours(ctx: Any, case: Case, theirs: list[list[list[int]]]) -> list[list[list[int]]] | None:
    """kvcli's choice with kvpress's counts; None where the method says that it cannot reach them."""
    import torch

    from kvcli.cache.budget import Budget
    from kvcli.cache.rows import head_positions
    from kvcli.methods.base import Block, Transform
    from kvcli.methods.catalog import build

    size = sum(len(head) for layer in theirs for head in layer) // (ctx.layers * ctx.kv_heads)
    method = build(case.text(size))
    if isinstance(method, Transform):
        every, heads = torch.arange(ctx.n).expand(ctx.kv_heads, -1), slice(0, ctx.kv_heads)
        layers = [[Block(i, heads, ctx.keys[i], ctx.values[i], every)] for i in range(ctx.layers)]
        old = [blocks[0].dense()[0][:, : ctx.n // 2] for blocks in method.store(ctx, layers)]
        return [[row.nonzero().flatten().tolist() for row in (keys != 0).any(1)] for keys in old]
    budget = Budget.of_size(size, ctx.n, ctx.layers, ctx.kv_heads, strict_window=True)
    selection = method.select(ctx, budget)
    if "unreachable" in selection.flags:
        return None
    return [[p.tolist() for p in head_positions(layer, ctx.kv_heads)] for layer in selection.kept]


def table(lines: list[Line]) -> str:
    """Markdown."""
    rows = [
        "| kvpress | kvcli | heads with the same set | positions shared | known difference |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        head = f"{line.same} of {line.heads}"
        if line.case.newest:
            head += f"; {line.but_newest} but for the newest token"
        rows.append(
            f"| {line.case.press} | `{line.case.ours}` | {head} | {100 * line.agreement:.2f} % | {line.case.reason} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write all cells here")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.add_argument("--venv", type=Path, default=ENVIRONMENT, help="kvpress's environment")
    parser.add_argument("--peer", nargs=2, metavar=("JOB", "ANSWER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer(*args.peer)
        return 0
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import torch
    from sweep_vs_kvpress import peer_environment
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvcli.models.wrapper import Model
    from kvcli.testbed.model import build_tokenizer

    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(**SHAPE)).double().eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, SHAPE["vocab_size"], (n,), generator=generator) for n in LENGTHS]
    jobs = [(case.press, at, r) for case in CASES for at in range(len(LENGTHS)) for r in REMOVED]
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job.pt", Path(folder) / "answer.json"
        torch.save({"config": SHAPE, "weights": hf.state_dict(), "prompts": prompts, "jobs": jobs}, job)
        python = peer_environment(args.venv)
        subprocess.run([str(python), str(Path(__file__).resolve()), "--peer", str(job), str(answer)], check=True)
        theirs = json.loads(answer.read_text())
    model = Model(hf, build_tokenizer(), name="random")
    lines = {case.press: Line(case) for case in CASES}
    contexts = [context_of(model, prompt.tolist()) for prompt in prompts]
    for (press, at, removed), kept in zip(jobs, theirs, strict=True):
        line = lines[press]
        mine = ours(contexts[at], line.case, kept)
        if mine is None:
            line.left_out += 1
        else:
            line.add(LENGTHS[at], removed, mine, kept)
    text = table(list(lines.values()))
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.json:
        args.json.write_text(json.dumps([line.record() for line in lines.values()], indent=1) + "\n")
    below = [line.case.press for line in lines.values() if not line.explained]
    if below:
        print(f"agree less than their known difference explains: {', '.join(below)}", file=sys.stderr)
    return int(bool(below))


if __name__ == "__main__":
    sys.exit(main())
