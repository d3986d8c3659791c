"""KIVI (arXiv:2402.02750, algorithm 1; jy-yuan/KIVI, models/llama_kivi.py).

Of T tokens of one head, keys: the first floor(T / residual) * residual are quantised, each channel in groups of `group`
tokens. Values: all but the newest `residual`, each token in groups of `group` channels. A group of B-bit codes stores
its smallest element and a step, (largest - smallest) / (2^B - 1).
"""

from __future__ import annotations

import math

import numpy as np

from tests.oracles.prompts import Array


def group_read(x: list[float], bits: int) -> list[float]:
    """What a group of numbers is after quantisation."""
    low, high = min(x), max(x)
    step = (high - low) / (2**bits - 1)
    out = []
    for number in x:
        code = 0 if step == 0 else round((number - low) / step)
        out.append(low + step * min(max(code, 0), 2**bits - 1))
    return out


def group_bytes(count: int, bits: int) -> float:
    """Codes, and 16 bit each for the smallest element and the step."""
    return count * bits / 8 + 4


def keys_read(keys: Array, bits: int, group: int, residual: int) -> tuple[Array, float]:
    """([T, D], bytes) of one head."""
    out, size = keys.copy(), 0.0
    tokens, width = keys.shape
    ready = tokens // residual * residual
    for channel in range(width):
        for start in range(0, ready, group):
            out[start : start + group, channel] = group_read(list(keys[start : start + group, channel]), bits)
            size += group_bytes(group, bits)
    return out, size + (tokens - ready) * width * 2


def values_read(values: Array, bits: int, group: int, residual: int) -> tuple[Array, float]:
    out, size = values.copy(), 0.0
    tokens, width = values.shape
    left = max(0, tokens - residual)
    for token in range(left):
        for start in range(0, width, group):
            part = list(values[token, start : start + group])
            out[token, start : start + group] = group_read(part, bits)
            size += 4
        size += math.ceil(width * bits / 8)
    return out, size + (tokens - left) * width * 2


def kivi(
    keys: Array, values: Array, *, bits: int = 2, group: int = 32, residual: int = 32
) -> tuple[Array, Array, float]:
    """(keys, values, bytes) of one head's T tokens."""
    k, size_k = keys_read(np.asarray(keys), bits, group, residual)
    v, size_v = values_read(np.asarray(values), bits, group, residual)
    return k, v, size_k + size_v
