"""Quantised caches: groups of a token's channels in 8 or 4 bits (smallest element and step, as in KIVI's values without
a residual), and numbers of 8 bits (e4m3: sign, 4 bits of exponent with bias 7, 3 bits of mantissa, largest 448)."""

from __future__ import annotations

import math

import numpy as np

from tests.oracles.kivi import values_read
from tests.oracles.prompts import Array


def e4m3(x: float) -> float:
    """The nearest e4m3 number, of two equally near ones the one with an even mantissa."""
    size = abs(x)
    if size == 0:
        return 0.0
    exponent = max(math.floor(math.log2(size)), -6)
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(round(size / step) * step, 448.0), x)


def quant(keys: Array, values: Array, *, dtype: str = "int8", group: int = 64) -> tuple[Array, Array, float]:
    """(keys, values, bytes) of one head's T tokens."""
    size, out = 0.0, []
    for x in (np.asarray(keys), np.asarray(values)):
        if dtype != "fp8":
            read, taken = values_read(x, 8 if dtype == "int8" else 4, group, 0)
        else:
            read, taken = x.copy(), 0.0
            for token in range(len(x)):
                scale = max(abs(number) for number in x[token]) / 448
                read[token] = [e4m3(number / scale) * scale if scale else 0.0 for number in x[token]]
                taken += len(x[token]) + 2
        out.append(read)
        size += taken
    return out[0], out[1], size
