"""Sampled answers whose random numbers depend on nothing but (seed, sample, draw, step)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """Chooses tokens at a temperature out of the top-p set, by the Gumbel-max trick.

    The noise of a step comes from a counter-based generator (Philox) with key (seed, sample, draw) and counter `step`:
    neither batching, nor order, nor a resume changes it. All methods use the same noise, so outputs part only where
    probabilities do: the coupling under which two distributions agree as often as any that needs no common memory.
    """

    temperature: float
    top_p: float
    seed: int
    sample: str
    draw: int

    def __call__(self, logits: Tensor, step: int) -> int:
        """logits [V] of step number `step` -> token id."""
        scores = logits.double() / self.temperature
        if self.top_p < 1:
            scores = scores.masked_fill(~top_set(scores.softmax(-1), self.top_p), float("-inf"))
        noise = torch.from_numpy(_noise(self.seed, self.sample, self.draw, step, len(scores))).to(scores.device)
        return int((scores + noise).argmax())


@lru_cache(maxsize=64)  # rows of other methods ask for the same at about the same time
def _noise(seed: int, sample: str, draw: int, step: int, size: int) -> np.ndarray:
    """[size] standard Gumbel numbers."""
    text = "\0".join((str(seed), sample, str(draw)))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key, counter=step << 64)).gumbel(size=size)


def top_set(probabilities: Tensor, top_p: float) -> Tensor:
    """bool [V]: the fewest most likely tokens whose probabilities reach top_p; of equal ones the first."""
    ordered, order = torch.sort(probabilities, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, before < top_p)
