"""The extra pass behind KVzip: the model repeats the context it has read, and what the context's keys receive is kept.

Source: KVzip, arXiv:2505.23416, section 3, and the authors' code (github.com/snu-mllab/KVzip: `self_task`, `scoring`,
`_get_score`). The context, between template and system text in front and the question behind, is repeated in chunks:
behind the cache of front and context the model reads a request, what the template puts behind a message, and the
chunk itself. A key's score is the largest attention that any of these tokens, in any query head of its group, gives
it; there the softmax runs over the front, the chunk's keys and the tokens just read, while the model's own attention
sees everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcli.attention import backends
from kvcli.attention.capture import Dense
from kvcli.attention.patch import patched
from kvcli.attention.received import most_received
from kvcli.errors import KvcliError
from kvcli.spans import Region, Span

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model

WHOLE = "\n\nRepeat the previous context exactly."
PART = "\n\nRepeat the part of the previous context exactly, starting with "
CHUNK = 2000
"""Tokens repeated at a time, as the authors' code has it."""
CUE = 8
"""Tokens before a chunk that are quoted in its request."""
SINKS = 4
"""First tokens in a later chunk's softmax where the front is shorter: without any, its scores would be inflated."""
LEAST = 16
"""Fewer tokens at a time are not worth the pass."""


@dataclass(frozen=True)
class Reconstruction:
    """What the keys of an n-token prompt received while tokens [start, end) of it were repeated.

    scores: per layer [H_kv, n] float32 at least, 0..1. Keys before `start` have the most that any chunk gave them; keys
    from `end` on, the question's, have 0: they are not there while the context is repeated. worded: whether the
    request's words were used, or a plain separator because the tokenizer does not know them.
    """

    scores: list[Tensor]
    start: int
    end: int
    chunks: int
    worded: bool


@torch.inference_mode()
def reconstruction(
    model: Model,
    dense: Dense,
    token_ids: Sequence[int],
    regions: Sequence[Region],
    behind: Sequence[int] | None = None,
    *,
    chunk: int = CHUNK,
) -> Reconstruction:
    """Runs the pass over one prefilled prompt; `dense` is read only. behind: what the template puts behind a message,
    where the prompt does not show it (None: what it ends with).

    A chunk is shorter than asked for where the model's context would not hold prompt, request and chunk together.
    Raises KvcliError where it leaves room for hardly anything.
    """
    start, end = repeated_span(regions)
    template = max(end, len(token_ids) - trailing(regions, ("special",)))
    requests = _Requests.of(model.tokenizer, token_ids[template:] if behind is None else behind)
    size = min(chunk, _room(model, end, end - start, requests.longest))
    state = _Repeating(dense, start, end, model.attn)
    edges = range(start, end, size)
    for first in edges:
        last = min(first + size, end)
        ids = [*requests.before(token_ids[start:first]), *token_ids[first:last]]
        state.begin(first, last)
        positions = torch.arange(end, end + len(ids), device=model.device)[None]
        with patched(model.hf, state):
            model.hf(
                torch.tensor([ids], device=model.device), position_ids=positions, use_cache=False, logits_to_keep=1
            )
    return Reconstruction(state.scores, start, end, len(edges), requests.worded)


def repeated_span(regions: Sequence[Region]) -> Span:
    """The context of a prompt: what stands between template and system text in front and the question behind.

    A prompt that is nothing but a question is repeated itself.
    """
    n = regions[-1].end
    start = sum(len(r) for r in takewhile(lambda r: r.kind in ("special", "system"), regions))
    for behind in (("special", "question"), ("special",)):
        end = n - trailing(regions, behind)
        if start < end:
            return start, end
    return 0, n


def trailing(regions: Sequence[Region], kinds: Sequence[str]) -> int:
    """Tokens at the end of the prompt that lie in regions of these kinds."""
    return sum(len(r) for r in takewhile(lambda r: r.kind in kinds, reversed(regions)))


def _room(model: Model, before: int, wanted: int, request: int) -> int:
    """Tokens of a chunk that fit into the model's context behind `before` prompt tokens and a request."""
    context = model.shapes.context
    if context is None:
        return wanted
    room = context - before - request
    if room < min(LEAST, wanted):
        what = f"a prompt of {before} tokens leaves no room to repeat it: the model's context is {context}"
        fix = "fewer --shots, or a model with a longer context"
        raise KvcliError(what, given="an extra pass that repeats the prompt", fix=fix)
    return room


@dataclass(frozen=True)
class _Requests:
    """Token ids that ask for the whole prompt or a part of it; suffix: what the template puts behind a message."""

    whole: list[int]
    part: list[int]
    suffix: list[int]
    worded: bool

    @classmethod
    def of(cls, tokenizer: Any, suffix: Sequence[int]) -> _Requests:
        """The words' ids; the end token alone, as a separator, for a tokenizer that does not know every word."""
        whole, part = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (WHOLE, PART))
        unknown = tokenizer.unk_token_id
        worded = bool(whole and part) and unknown not in whole and unknown not in part
        if not worded:
            end = tokenizer.eos_token_id
            whole = part = [] if end is None else [end]
        return cls(list(whole), list(part), list(suffix), worded)

    @property
    def longest(self) -> int:
        return max(len(self.whole), len(self.part) + CUE) + len(self.suffix)

    def before(self, repeated: Sequence[int]) -> list[int]:
        """What stands before a chunk when these tokens were repeated already."""
        if not repeated:
            return [*self.whole, *self.suffix]
        return [*self.part, *repeated[-CUE:], *self.suffix]


class _Repeating:
    """Attention state of the pass: new tokens behind the prompt's keys, and what these receive."""

    def __init__(self, dense: Dense, start: int, end: int, backend: str) -> None:
        self.dense, self.start, self.end, self.backend = dense, start, end, backend
        self.first = self.last = self.sinks = 0
        self.scores = [k.new_zeros(k.shape[:2], dtype=torch.promote_types(k.dtype, torch.float32)) for k in dense.keys]

    def begin(self, first: int, last: int) -> None:
        """From now on tokens [first, last) are repeated."""
        self.first, self.last = first, last
        self.sinks = max(self.start, min(SINKS, first))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.dense.keys[layer][:, : self.end], self.dense.values[layer][:, : self.end]
        contest = torch.cat([keys[:, : self.sinks], keys[:, self.first : self.last], key[0]], 1)
        most = most_received(query[0], contest, scaling)
        scores, front = self.scores[layer], self.start
        scores[:, :front] = torch.maximum(scores[:, :front], most[:, :front])
        scores[:, self.first : self.last] = most[:, self.sinks :]
        out, _ = backends.prefill(query, key, value, scaling, {}, self.backend, (keys, values))
        return out
