"""SparseGPT from the paper, slowly: float64, one inverse of the remaining Hessian per column, plain loops.

The optimal brain surgeon's step for weight q of a row, with the columns F that may still move and H_F their Hessian:
saliency w_q^2 / [H_F^-1]_qq, all weights of F move by -w_q / [H_F^-1]_qq [H_F^-1]_:q (section 3.1). F are the columns
from q on (section 3.2). Saliencies are compared in blocks of columns (section 3.3), or in groups for n:m (section 3.4).
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def pruned(
    weight: Matrix, hessian: Matrix, share: Fraction, pattern: tuple[int, int] | None, block: int, damp: float
) -> Matrix:
    w, h = weight.copy(), hessian.copy()
    rows, columns = w.shape
    for c in range(columns):
        if h[c, c] == 0:
            h[c, c], w[:, c] = 1.0, 0.0
    h = h + np.eye(columns) * damp * float(np.mean(np.diag(h)))
    inverses = [np.linalg.inv(h[c:, c:]) for c in range(columns)]
    before = 0
    for start in range(0, columns, block):
        end = min(start + block, columns)
        gone = np.zeros((rows, columns), dtype=bool)
        if pattern is None:
            count = int(share * rows * end + Fraction(1, 2)) - before
            before += count
            places = [(r, c) for r in range(rows) for c in range(start, end)]
            for r, c in _lowest(places, w, inverses, count):
                gone[r, c] = True
        for c in range(start, end):
            if pattern is not None and (c - start) % pattern[1] == 0:
                for r in range(rows):
                    group = [(r, k) for k in range(c, c + pattern[1])]
                    for _, k in _lowest(group, w, inverses, pattern[0]):
                        gone[r, k] = True
            for r in range(rows):
                if gone[r, c]:
                    step = inverses[c][:, 0] * (w[r, c] / inverses[c][0, 0])
                    w[r, c:] -= step
                    w[r, c] = 0.0
    return w


def _lowest(places: list[tuple[int, int]], w: Matrix, inverses: list[Matrix], count: int) -> list[tuple[int, int]]:
    """Of equal saliencies the last in the order of rows and columns go first."""
    order = sorted(range(len(places)), key=lambda i: (w[places[i]] ** 2 / inverses[places[i][1]][0, 0], -i))
    return [places[i] for i in order[:count]]
