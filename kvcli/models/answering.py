"""The extra pass behind `oracle`: what the prompt's keys receive while the model gives its own answer.

The answer is the full cache's, found by greedy decoding before this pass. Here its tokens are read once more, all
together, behind the prompt's keys: the same queries as in decoding, in one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcli.attention import backends
from kvcli.attention.capture import Dense
from kvcli.attention.patch import patched
from kvcli.attention.received import summed_received

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model

LONGEST = 256
"""Tokens of the answer that are looked at."""


@dataclass(frozen=True)
class Answered:
    """sums: per layer [H, n] float32 at least: attention each prompt key received, summed over the queries that chose
    the answer's tokens: the last prompt token and every answer token but the last. tokens: how many were chosen."""

    sums: list[Tensor]
    tokens: int


@torch.inference_mode()
def answered(model: Model, dense: Dense, last: int, answer: Sequence[int]) -> Answered:
    """Runs the pass over one prefilled prompt whose last token is `last`; `dense` is read only."""
    ids = [last, *answer[:-1]]
    state = _Answering(dense, model.attn)
    positions = torch.arange(dense.n - 1, dense.n - 1 + len(ids), device=model.device)[None]
    with patched(model.hf, state):
        model.hf(torch.tensor([ids], device=model.device), position_ids=positions, use_cache=False, logits_to_keep=1)
    return Answered(state.sums, len(answer))


class _Answering:
    """Attention state of the pass: the last prompt token and the answer behind the other prompt keys."""

    def __init__(self, dense: Dense, backend: str) -> None:
        self.dense, self.backend = dense, backend
        self.sums: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        n = self.dense.n
        keys, values = self.dense.keys[layer][:, : n - 1], self.dense.values[layer][:, : n - 1]
        counts = torch.ones(query.shape[2])
        self.sums.append(summed_received(query[0], torch.cat([keys, key[0]], 1), counts, scaling)[:, :n])
        out, _ = backends.prefill(query, key, value, scaling, {}, self.backend, (keys, values) if n > 1 else None)
        return out
