"""kvpress, one run per cell, in its own environment. Talks JSON lines on stdin and stdout.

{"prompts": FILE} loads; {"run": [prompt, method, removed], "new": N, "kept": bool} answers
{"tokens": [...], "after": [seconds after token 1, 2, ...], "kept": [[[positions] per head] per layer]}.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from kvpress import (
    ChunkKVPress,
    KnormPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
)  # fmt: skip
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

PRESSES = {
    "Snap": SnapKVPress, "Observed": ObservedAttentionPress, "Streaming": StreamingLLMPress, "Knorm": KnormPress,
    "Pyramid": PyramidKVPress, "Chunk": lambda removed: ChunkKVPress(SnapKVPress(removed)),
}  # fmt: skip


def load(path: str) -> tuple[LlamaForCausalLM, list[torch.Tensor]]:
    saved = torch.load(path)
    model = LlamaForCausalLM(LlamaConfig(**saved["config"]))
    model.load_state_dict(saved["weights"])
    return model.eval(), saved["prompts"]


@torch.no_grad()
def run(model: LlamaForCausalLM, ids: torch.Tensor, method: str, removed: float, new: int, want_kept: bool) -> dict:
    n = ids.shape[1]
    model.set_attn_implementation("eager" if method == "Observed" else "sdpa")
    cache, after = DynamicCache(), []
    started = time.perf_counter()
    with PRESSES[method](removed)(model):
        hidden = model.model(ids, past_key_values=cache, cache_position=torch.arange(n)).last_hidden_state
    tokens = [int(model.lm_head(hidden[:, -1]).argmax())]
    after.append(time.perf_counter() - started)
    model.set_attn_implementation("sdpa")  # its faster kernel, also after an eager prefill
    for position in range(n, n + new - 1):
        at = torch.tensor([position])
        logits = model(
            torch.tensor([[tokens[-1]]]), past_key_values=cache, position_ids=at[None], cache_position=at
        ).logits
        tokens.append(int(logits[0, -1].argmax()))
        after.append(time.perf_counter() - started)
    kept = kept_positions(model, ids, cache, new - 1) if want_kept else None
    return {"tokens": tokens, "after": after, "kept": kept}


def kept_positions(model: LlamaForCausalLM, ids: torch.Tensor, cache: DynamicCache, generated: int) -> list:
    """Positions whose keys are in the cache, found by comparing with a dense cache."""
    model.set_attn_implementation("sdpa")
    full = DynamicCache()
    model.model(ids, past_key_values=full, cache_position=torch.arange(ids.shape[1]))
    out = []
    for dense, pruned in zip(full.layers, cache.layers, strict=True):
        keys = pruned.keys[0][:, : pruned.keys.shape[2] - generated]
        nearest = [
            torch.cdist(k, d).argmin(-1).sort().values.tolist() for k, d in zip(keys, dense.keys[0], strict=True)
        ]
        out.append(nearest)
    return out


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    model, prompts = None, []
    for line in sys.stdin:
        job = json.loads(line)
        if "prompts" in job:
            model, prompts = load(job["prompts"])
            answer: dict = {"loaded": len(prompts)}
        else:
            prompt, method, removed = job["run"]
            answer = run(model, prompts[prompt][None], method, removed, job["new"], job["kept"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
