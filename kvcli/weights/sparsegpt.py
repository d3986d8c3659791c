"""SparseGPT: weights of one matrix removed in one shot, the others moved so that its outputs change least.

For a matrix W and inputs X with Hessian H = mean of x x' (damped), columns are settled from left to right. Where the
weight w of a column goes, the row's later weights move by -w U_jk / U_jj, U the upper Cholesky factor of H^-1: what
the optimal brain surgeon's step is once the columns before are fixed. Which weights go is decided per block of columns,
by the smallest w^2 / U_jj^2 over all rows, or per row within each group of a pattern n:m.

Source: arXiv:2301.00774, algorithm 1; github.com/IST-DASLab/sparsegpt, sparsegpt.py.
Differs: exactly the asked number of weights goes, of equal scores the first stays (the code removes one more per block,
and all that tie with it); the Cholesky factors are made in float64, because float32 fails on ill-conditioned inputs;
the Hessian is a mean over tokens, not twice the sum over texts, which changes neither scores nor steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor

from kvcli.grammar import round_half_up


class Hessian:
    """Mean of x x' over the inputs of one matrix: [C, C], float32 at least."""

    def __init__(self, columns: int, like: Tensor) -> None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.value = torch.zeros(columns, columns, dtype=dtype, device=like.device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs [..., C]: one row per token."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.value.dtype)
        total = self.tokens + len(rows)
        if total:
            self.value.mul_(self.tokens / total).addmm_(rows.T, rows, alpha=1 / total)
        self.tokens = total


@dataclass(frozen=True)
class Pruned:
    """weight [R, C]; dead: columns whose inputs were always zero, which go whole."""

    weight: Tensor
    dead: int


def prune(
    weight: Tensor, hessian: Tensor, share: Decimal, pattern: tuple[int, int] | None, block: int, damp: float
) -> Pruned:
    """A copy of weight [R, C] with round(share R C) zeros, or with n zeros in each group of m columns of every row.

    hessian [C, C]; damp: share of its mean diagonal that is added to the diagonal.
    Raises ValueError for columns that are no whole groups, and for inputs that no step can be made from.
    """
    work = weight.detach().to(hessian.dtype).clone()
    rows, columns = work.shape
    if pattern and columns % pattern[1]:
        raise ValueError(f"{columns} columns are no whole groups of {pattern[1]}")
    factor, dead = _inverse_factor(hessian, damp)
    work[:, dead] = 0
    done = 0
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part, own = work[:, start:end], factor[start:end, start:end]
        gone = None
        if pattern is None:
            wanted = round_half_up(share * rows * end) - done
            gone = _lowest(part.square() / own.diagonal().square(), wanted)
            done += wanted
        errors = _settle(part, own, gone, pattern)
        work[:, end:] -= errors @ factor[start:end, end:]
    return Pruned(work.to(weight.dtype), int(dead.sum()))


def _inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the damped Hessian's inverse, and which columns were never used."""
    full = hessian.double()
    if not bool(full.isfinite().all()):
        raise ValueError("its inputs are not finite")
    full = full.clone()
    diagonal = full.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damp * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(full)
    if int(failed):
        raise ValueError("its damped Hessian is not positive definite")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).to(hessian.dtype), dead


def _lowest(scores: Tensor, count: int) -> Tensor:
    """bool like scores: the `count` lowest; of equal ones those that come last."""
    order = scores.flatten().sort(descending=True, stable=True).indices
    gone = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    gone[order[len(order) - count :]] = True
    return gone.view_as(scores)


def _settle(part: Tensor, factor: Tensor, gone: Tensor | None, pattern: tuple[int, int] | None) -> Tensor:
    """Settles the columns of one block [R, b] in place; returns what later blocks make up for [R, b]."""
    errors = torch.zeros_like(part)
    gone = torch.zeros_like(part, dtype=torch.bool) if gone is None else gone
    for j in range(part.shape[1]):
        if pattern is not None and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            scores = part[:, group].square() / factor.diagonal()[group].square()
            order = scores.sort(dim=1, descending=True, stable=True).indices
            gone[:, group].scatter_(1, order[:, pattern[1] - pattern[0] :], True)
        errors[:, j] = torch.where(gone[:, j], part[:, j], 0) / factor[j, j]
        part[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
        part[:, j] = torch.where(gone[:, j], 0, part[:, j])
    return errors
