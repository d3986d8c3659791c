"""Switches a model to kvcli's attention function for the length of a `with` block.

The name is registered with transformers' AttentionInterface and not with its mask interface, so the model passes
`attention_mask=None` and the state in force owns all masking.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn

NAME = "kvcli"


class AttentionState(Protocol):
    """What the model's attention does while it is in force."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [B, H, Q, D], key and value [B, H_kv, S, D] -> output [B, H, Q, D]."""


_STATE: ContextVar[AttentionState | None] = ContextVar("kvcli_attention", default=None)

UNSUPPORTED = {
    "sliding_window": "sliding-window attention",
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks in the softmax",
}


class UnsupportedAttention(Exception):
    """The model asks for something the patch does not compute; the message names it."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    state = _STATE.get()
    if state is None:
        raise RuntimeError("kvcli's attention was called outside `with patched(...)`")
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(meaning)
    if getattr(module, "is_causal", True) is False:
        raise UnsupportedAttention("attention that looks ahead")
    if attention_mask is not None:
        raise UnsupportedAttention("a mask of its own")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = state.attend(module.layer_idx, query, key, value, scale)  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def patched(model: Any, state: AttentionState) -> Iterator[None]:
    """Runs the block with `state` behind every attention call of `model`; undone also after an error."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    before = model.config._attn_implementation
    if before != NAME:  # inside another such block there is nothing to switch
        model.set_attn_implementation(NAME)
    token = _STATE.set(state)
    try:
        yield
    finally:
        _STATE.reset(token)
        if before != NAME:
            model.set_attn_implementation(before)


class Idle:
    """Holds the switch over many passes, each of which brings a state of its own: switching visits every module."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        raise RuntimeError("kvcli's attention was called between two passes")
