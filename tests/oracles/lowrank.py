"""Low rank: keys before rotation of all KV heads side by side, and values of `group` KV heads side by side, projected
on the directions of their largest singular values (here: the leading eigenvectors of X^T X)."""

from __future__ import annotations

import cmath

import numpy as np

from tests.oracles.prompts import Array


def rotated(keys: Array, positions: list[int], frequencies: list[float]) -> Array:
    """keys [K, D]: dimensions j and j + D/2 are one complex number, turned by position * frequency."""
    out = keys.copy()
    half = len(frequencies)
    for row, position in enumerate(positions):
        for j, frequency in enumerate(frequencies):
            turned = complex(keys[row, j], keys[row, j + half]) * cmath.exp(1j * position * frequency)
            out[row, j], out[row, j + half] = turned.real, turned.imag
    return out


def best_of_rank(x: Array, rank: int) -> Array:
    _, vectors = np.linalg.eigh(x.T @ x)
    leading = vectors[:, x.shape[1] - rank :]
    return x @ leading @ leading.T


def on_leading(x: Array, rows: Array, rank: int, offset: Array | None = None) -> Array:
    """x [K, W] projected on the leading right singular vectors of other rows [T, W]; `offset` is off the while."""
    away = 0.0 if offset is None else offset
    directions = np.linalg.svd(rows)[2][:rank]
    projected: Array = (x - away) @ directions.T @ directions + away
    return projected


def truncated(weight: Array, rank: int) -> Array:
    """The best matrix of a rank, by its singular value decomposition."""
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    best: Array = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return best


def side_by_side(heads: list[Array], rank: int) -> list[Array]:
    """[K, D] per head of one group, approximated together."""
    width = heads[0].shape[1]
    whole = best_of_rank(np.concatenate(heads, axis=1), rank)
    return [whole[:, h * width : (h + 1) * width] for h in range(len(heads))]
