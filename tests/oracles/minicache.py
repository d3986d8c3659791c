"""MiniCache (arXiv:2405.14366, sections 4.1 to 4.3): two layers' vectors of one token share a direction on the arc
between theirs (SLERP), each keeps its length; tokens whose angle is among the largest stay as they are."""

from __future__ import annotations

import math

import numpy as np

from tests.oracles.prompts import Array


def angle(a: Array, b: Array) -> float:
    cosine = float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))
    return math.acos(min(1.0, max(-1.0, cosine)))


def minicache(first: Array, second: Array, *, t: float = 0.6, gamma: float = 0.05) -> tuple[Array, Array, set[int]]:
    """first, second [P, D] of one head: what is read of each, and which tokens stay unmerged."""
    angles = [angle(a, b) for a, b in zip(first, second, strict=True)]
    limit = max(angles) - gamma * (max(angles) - min(angles))
    apart = {i for i, a in enumerate(angles) if a > limit}
    read = [first.copy(), second.copy()]
    for i, omega in enumerate(angles):
        if i in apart:
            continue
        one, two = first[i] / np.linalg.norm(first[i]), second[i] / np.linalg.norm(second[i])
        way = (math.sin((1 - t) * omega) * one + math.sin(t * omega) * two) / math.sin(omega)
        read[0][i], read[1][i] = way * np.linalg.norm(first[i]), way * np.linalg.norm(second[i])
    return read[0], read[1], apart
