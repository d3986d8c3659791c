"""What `kvcli attn-map` computes of one prompt's attention and of what a method keeps: tensors in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcli.cache.rows import Kept, head_positions
from kvcli.methods.context import Context
from kvcli.spans import question_start

SETS = ("all", "question")
"""Whose attention: that of all queries, or of those from the question on (the last token's where there is none)."""


def unknown_tokens(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Positions of tokens in whose place the model sees its token for unknown words."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return []
    return [i for i, token in enumerate(ids) if token == unknown]


def received_by_layer(ctx: Context) -> list[Tensor]:
    """Per layer [sets, H, n] float32: the mean attention that each key receives from the queries of a set."""
    counts = (ctx.n, ctx.n - question_start(ctx.regions))
    return [
        torch.stack([ctx.column_sum(layer, name) / count for name, count in zip(SETS, counts, strict=True)])
        for layer in range(ctx.layers)
    ]


def kept_pairs(kept: Kept, kv_heads: int, n: int) -> list[Tensor]:
    """Per layer bool [H_kv, n], [1, n] where its heads are all alike: which pairs stay."""
    found = []
    for form in kept:
        alike = not isinstance(form, list) and form.dim() == 1
        held = torch.zeros(1 if alike else kv_heads, n, dtype=torch.bool)
        for row, positions in zip(held, head_positions(form, len(held)), strict=True):
            row[positions.cpu()] = True
        found.append(held)
    return found


def thrown_away(received: Tensor, held: Tensor) -> Tensor:
    """[sets, H]: attention that goes to pairs which are not held; received [sets, H, n], held [H_kv or 1, n]."""
    group = received.shape[1] // held.shape[0]
    gone = ~held.repeat_interleave(group, 0).to(received.device)
    return (received.double() * gone).sum(-1).cpu()


def in_units(received: Tensor, unit: int) -> Tensor:
    """Sums over units of so many tokens: [..., n] -> [..., ceil(n / unit)]."""
    padded = torch.nn.functional.pad(received, (0, -received.shape[-1] % unit))
    return padded.unflatten(-1, (-1, unit)).sum(-1)


def of_spans(received: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    return torch.stack([received[..., start:end].sum(-1) for start, end in spans]).sum(0)
