"""A prefill in which some KV heads read the prompt through a window: its first tokens and the newest ones.

A query of such a head sees the first `sinks` keys and the newest `recent` ones, its own among these; all other heads
are causal. Windows are computed a block of queries at a time, so that what they cost grows with the prompt and not with
its square. Every pair is returned; which of them stay is the method's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from kvcli.attention import backends
from kvcli.attention.patch import patched

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model

BLOCK = 256
"""Queries at a time, at least."""


@dataclass
class Read:
    """A prompt after such a prefill: keys, values per layer [H_kv, n, D]; logits [V] float32 behind the last token."""

    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor


@torch.inference_mode()
def streaming_prefill(model: Model, ids: Sequence[int], streams: Sequence[Tensor], sinks: int, recent: int) -> Read:
    """streams: per layer bool [H_kv], which KV heads read through the window."""
    state, cache = Streaming(streams, sinks, recent, model.attn), DynamicCache()
    text = torch.tensor([list(ids)], device=model.device)
    positions, last = torch.arange(len(ids), device=model.device)[None], torch.tensor([len(ids) - 1])
    with patched(model.hf, state):
        out = model.hf(
            text, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=last.to(model.device)
        )
    return Read([x.keys[0] for x in cache.layers], [x.values[0] for x in cache.layers], out.logits[0, 0].float())


class Streaming:
    """Attention state of one whole prompt."""

    def __init__(self, streams: Sequence[Tensor], sinks: int, recent: int, backend: str) -> None:
        self.streams, self.sinks, self.recent, self.backend = streams, sinks, recent, backend

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        slides = self.streams[layer].to(query.device)
        group, n = query.shape[1] // key.shape[1], query.shape[2]
        if n <= self.recent or not bool(slides.any()):
            return backends.prefill(query, key, value, scaling, {}, self.backend)[0]
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for kv_heads, through in ((slides, True), (~slides, False)):
            heads = kv_heads.repeat_interleave(group)
            given = query[:, heads], key[:, kv_heads], value[:, kv_heads]
            if through:
                out[:, heads] = windowed(*given, scaling, self.sinks, self.recent)
            elif bool(kv_heads.any()):
                out[:, heads] = backends.prefill(*given, scaling, {}, self.backend)[0]
        return out


def windowed(query: Tensor, key: Tensor, value: Tensor, scaling: float, sinks: int, recent: int) -> Tensor:
    """[B, H, n, D] through the window. query [B, H, n, D]; key, value [B, H_kv, n, D]."""
    n, group, parts = query.shape[2], query.shape[1] // key.shape[1], []
    size = max(BLOCK, recent)
    for start in range(0, n, size):
        end = min(n, start + size)
        near = max(0, start - recent + 1)
        seen = torch.cat([torch.arange(min(sinks, near)), torch.arange(near, end)])
        behind = torch.arange(start, end)[:, None] - seen
        visible = (behind >= 0) & ((seen < sinks) | (behind < recent))
        seen, visible = seen.to(key.device), visible.to(key.device)
        keys, values = (x[:, :, seen].repeat_interleave(group, 1) for x in (key, value))
        mine = query[:, :, start:end]
        parts.append(scaled_dot_product_attention(mine, keys, values, attn_mask=visible, scale=scaling))
    return torch.cat(parts, 2)
