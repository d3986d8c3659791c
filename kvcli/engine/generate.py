"""Greedy decoding of many compressed rows together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kvcli.cache.kv_cache import CompressedCache

if TYPE_CHECKING:
    from kvcli.models.wrapper import Model

_TAIL = 24
"""Tokens decoded to look for a stop string that ends with the newest token."""


@dataclass(frozen=True)
class StopRules:
    """When a row ends: an end token, a stop string in its text, or its length."""

    max_new_tokens: int
    end_tokens: frozenset[int] = frozenset()
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """How a row begins: `token` is fed at `position`; `given` is a first answer token taken from the prefill."""

    token: int
    position: int
    given: int | None = None


@dataclass
class Generated:
    """ids: all generated tokens, an end token included. text: decoded, cut before a stop string."""

    ids: list[int] = field(default_factory=list)
    finish: str = ""
    text: str = ""


def end_tokens(model: Model) -> frozenset[int]:
    """End-of-text ids of the tokenizer and of the model's generation config."""
    found: set[int] = set()
    for value in (model.tokenizer.eos_token_id, getattr(model.hf.generation_config, "eos_token_id", None)):
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
    return frozenset(found)


def generate(
    model: Model, cache: CompressedCache, starts: Sequence[Start], rules: Sequence[StopRules]
) -> list[Generated]:
    """Decodes every row of the cache to its end. Rows that ended leave the batch once half of it has ended."""
    outputs = [Generated() for _ in starts]
    for start, rule, out in zip(starts, rules, outputs, strict=True):
        if start.given is not None:
            _accept(model.tokenizer, out, start.given, rule)
    batch = list(range(len(starts)))
    tokens = torch.tensor([s.token if s.given is None else s.given for s in starts])
    positions = torch.tensor([s.position for s in starts])
    while True:
        live = [r for r, row in enumerate(batch) if not outputs[row].finish]
        if not live:
            break
        if len(live) <= len(batch) // 2:
            cache.select_rows(live)
            batch = [batch[r] for r in live]
            tokens, positions = tokens[live], positions[live]
        logits = model.step(tokens[:, None], positions[:, None], cache)[:, -1]
        tokens, positions = logits.argmax(-1).cpu(), positions + 1
        for row, token in zip(batch, tokens.tolist(), strict=True):
            if not outputs[row].finish:
                _accept(model.tokenizer, outputs[row], token, rules[row])
    for out, rule in zip(outputs, rules, strict=True):
        out.text = _text(model.tokenizer, out.ids, rule)
    return outputs


def _accept(tokenizer: Any, out: Generated, token: int, rule: StopRules) -> None:
    out.ids.append(token)
    if token in rule.end_tokens:
        out.finish = "eos"
    elif rule.until and any(stop in tokenizer.decode(out.ids[-_TAIL:]) for stop in rule.until):
        out.finish = "stop"
    elif len(out.ids) >= rule.max_new_tokens:
        out.finish = "length"


def _text(tokenizer: Any, ids: list[int], rule: StopRules) -> str:
    """Text before the first stop string, then without special tokens."""
    if rule.until:
        text = tokenizer.decode(ids)
        cut = min((text.find(stop) for stop in rule.until if stop in text), default=None)
        if cut is not None:
            return _without_special(tokenizer, text[:cut])
    return tokenizer.decode(ids, skip_special_tokens=True)


def _without_special(tokenizer: Any, text: str) -> str:
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text
