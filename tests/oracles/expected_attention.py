"""Expected attention (arXiv:2510.00636, section 3; NVIDIA/kvpress ExpectedAttentionPress).

Queries before RoPE, without the first `sinks`, have a mean and a covariance (divided by their number). Both are turned
by the mean rotation matrix of positions n .. n + future - 1, which turns dimensions j and j + D/2 by position times
frequency j. A key's logit is s mean.k + s^2/2 k.cov.k; the softmax runs over the keys behind the protected sinks; the
query heads of a group are averaged; epsilon is added and the norm of the value multiplies. The newest token and the
sinks stay, at most half of the budget (METHODS.md, One rule for protected tokens).
"""

from __future__ import annotations

import math

import numpy as np

from tests.oracles.picks import Answer, Top
from tests.oracles.prompts import Array, Prompt


def moments(queries: Array, first: int) -> tuple[Array, Array]:
    """(mean [D], covariance [D, D]) of one head's queries [n, D] from position `first` on; zero for none."""
    dim = queries.shape[1]
    mean, cov = np.zeros(dim), np.zeros((dim, dim))
    some = [queries[i] for i in range(first, len(queries))]
    for q in some:
        mean = mean + q / len(some)
    for q in some:
        for a in range(dim):
            for b in range(dim):
                cov[a, b] += (q[a] - mean[a]) * (q[b] - mean[b]) / len(some)
    return mean, cov


def mean_rotation(frequencies: list[float], dim: int, n: int, future: int) -> Array:
    """[D, D]: matrix @ q turns q by the mean rotation of the next `future` positions; other dimensions stay."""
    out = np.eye(dim)
    half = len(frequencies)
    for j, frequency in enumerate(frequencies):
        cos = sum(math.cos((n + p) * frequency) for p in range(future)) / future
        sin = sum(math.sin((n + p) * frequency) for p in range(future)) / future
        out[j, j] = out[half + j, half + j] = cos
        out[j, half + j], out[half + j, j] = -sin, sin
    return out


def expected_attention(
    prompt: Prompt, size: int, frequencies: list[float], *, future: int = 512, sinks: int = 4, covariance: str = "true",
    vnorm: str = "true", epsilon: float = 0.0, strict: bool = False,
) -> Answer:  # fmt: skip
    """prompt.queries: before RoPE; prompt.keys: after it."""
    n, group, s = prompt.n, prompt.group, prompt.scaling
    first, flags = min(sinks, n - 1), set()
    if size < n and strict and 1 + first > size:
        flags = {"over_budget"}
    elif size < n and not strict:
        few = min(first, max(0, max(1, size // 2) - 1))
        flags, first = ({"fallback"} if few < first else set()), few
    rotation = mean_rotation(frequencies, prompt.keys[0].shape[2], n, future)
    picks: list[list[Top]] = []
    for layer in range(prompt.layers):
        heads = []
        for g in range(prompt.kv_heads):
            scores = dict.fromkeys(range(first, n), 0.0)
            for h in range(g * group, (g + 1) * group):
                mean, cov = moments(prompt.queries[layer][h], sinks)
                mean, cov = rotation @ mean, rotation @ cov @ rotation.T
                logits = {}
                for p in scores:
                    k = prompt.keys[layer][g, p]
                    spread = s * s / 2 * float(k @ cov @ k) if covariance == "true" else 0.0
                    logits[p] = s * float(mean @ k) + spread
                top = max(logits.values())
                total = sum(math.exp(x - top) for x in logits.values())
                for p, x in logits.items():
                    scores[p] += math.exp(x - top) / total / group
            if vnorm == "true":
                for p in scores:
                    norm = math.sqrt(sum(float(v) ** 2 for v in prompt.values[layer][g, p]))
                    scores[p] = (scores[p] + epsilon) * norm
            forced = {*range(first), n - 1}
            contest = {p: score for p, score in scores.items() if p not in forced}
            heads.append(Top(forced, contest, max(0, size - len(forced))))
        picks.append(heads)
    return Answer(list(map(list, picks)), flags)
