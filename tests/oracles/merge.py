"""Merging of dropped pairs, written out pair by pair.

D2O (arXiv:2406.13035, section 3.3; AIoT-MLSys-Lab/D2O): each dropped key's nearest kept key by cosine; the threshold of
the first eviction is the mean of these cosines over the layer; those at or above it are folded in. The default weights
are e for the kept pair and exp(cosine) for the others, divided by their sum; the authors' code multiplies each dropped
pair by its cosine and takes the plain mean. CaM (openreview LCTmppB165; zyxxmu/cam): a dropped value, divided by the
number of receivers, is added to each of them with the probability attention / mean attention of the receivers.
The last kept pair takes nothing.
"""

from __future__ import annotations

import math

import numpy as np

from tests.oracles.prompts import Array, Prompt

Heads = list[tuple[Array, Array]]


def cosine(a: Array, b: Array) -> float:
    return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


def d2o(prompt: Prompt, layer: int, kept: list[list[int]], weights: str = "exp") -> Heads:
    links: list[dict[int, tuple[int, float]]] = []
    for head, stays in enumerate(kept):
        keys, found = prompt.keys[layer][head], {}
        for i in range(prompt.n):
            if i not in stays and len(stays) > 1:
                best = max(stays[:-1], key=lambda j: (cosine(keys[i], keys[j]), -j))
                found[i] = (best, cosine(keys[i], keys[best]))
        links.append(found)
    every = [c for found in links for _, c in found.values()]
    threshold = sum(every) / len(every) if every else 0.0
    out = []
    for head, stays in enumerate(kept):
        pair = []
        for x in (prompt.keys[layer][head], prompt.values[layer][head]):
            rows = []
            for j in stays:
                came = [(c, x[i]) for i, (to, c) in links[head].items() if to == j and c >= threshold]
                if not came:
                    rows.append(x[j])
                elif weights == "exp":
                    total = math.e + sum(math.exp(c) for c, _ in came)
                    rows.append((math.e * x[j] + sum(math.exp(c) * y for c, y in came)) / total)
                else:
                    rows.append((x[j] + sum(c * y for c, y in came)) / (1 + len(came)))
            pair.append(np.array(rows))
        out.append((pair[0], pair[1]))
    return out


def cam(prompt: Prompt, layer: int, kept: list[list[int]], draws: Array, window: int = 32) -> Heads:
    """draws [H_kv, n]: uniform numbers; a pair is merged where its draw lies below its probability."""
    out = []
    for head, stays in enumerate(kept):
        group = range(head * prompt.group, (head + 1) * prompt.group)
        attention = sum(prompt.attention[layer][h, -1] for h in group) / prompt.group
        receivers = [j for j in stays[:-1] if j >= prompt.n - window]
        values = prompt.values[layer][head].copy()
        for i in range(prompt.n):
            if i in stays or not receivers:
                continue
            mean = sum(attention[j] for j in receivers) / len(receivers)
            if draws[head, i] < min(1.0, attention[i] / mean):
                for j in receivers:
                    values[j] += prompt.values[layer][head][i] / len(receivers)
        out.append((prompt.keys[layer][head][stays], values[stays]))
    return out
