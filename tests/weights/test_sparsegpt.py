"""Pruning of one matrix: the paper's steps, exact sparsity, less error than by magnitude."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcli.weights.sparsegpt import Hessian, prune
from tests.oracles import sparsegpt as oracle


def inputs(tokens: int, columns: int, seed: int) -> Tensor:
    """Correlated columns of unequal size, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.double)
    scale = torch.logspace(-0.5, 0.5, columns, dtype=torch.double)[torch.randperm(columns, generator=generator)]
    return torch.randn(tokens, columns, generator=generator, dtype=torch.double) @ mix * scale


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def hessian_of(x: Tensor) -> Tensor:
    hessian = Hessian(x.shape[1], x)
    for part in x.split(7):
        hessian.add(part)
    return hessian.value


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "share, pattern, block",
    [("0.5", None, 8), ("0.5", None, 128), ("0.3", None, 5), ("0.9", None, 7), ("0.5", (2, 4), 8), ("0.25", (1, 4), 4),
     ("0.75", (6, 8), 8)],
)  # fmt: skip
def test_a_pruned_matrix_is_the_papers(share: str, pattern: tuple[int, int] | None, block: int, seed: int) -> None:
    x, w = inputs(60, 24, seed), matrix(9, 24, seed + 10)
    found = prune(w, hessian_of(x), Decimal(share), pattern, block, 0.01)
    plain = (x.T @ x / len(x)).numpy()
    wanted = oracle.pruned(w.numpy(), plain, Fraction(share), pattern, block, 0.01)
    assert ((found.weight == 0).numpy() == (wanted == 0)).all()
    np.testing.assert_allclose(found.weight.numpy(), wanted, rtol=1e-8, atol=1e-10)
    assert found.dead == 0


def test_ties_and_columns_without_inputs_are_the_papers() -> None:
    x = inputs(60, 16, 1)
    x[:, 5] = 0
    w = matrix(6, 16, 2)
    w[1] = w[0]  # equal rows have equal scores all along
    w[3] = w[0]
    found = prune(w, hessian_of(x), Decimal("0.4"), None, 8, 0.05)
    wanted = oracle.pruned(w.numpy(), (x.T @ x / 60).numpy(), Fraction("0.4"), None, 8, 0.05)
    assert ((found.weight == 0).numpy() == (wanted == 0)).all()
    assert found.dead == 1 and bool((found.weight[:, 5] == 0).all())


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 99), st.integers(1, 40), st.integers(0, 99))
def test_exactly_the_asked_share_is_zero(rows: int, columns: int, percent: int, block: int, seed: int) -> None:
    share = Decimal(percent) / 100
    w = prune(matrix(rows, columns, seed), hessian_of(inputs(50, columns, seed)), share, None, block, 0.01).weight
    assert int((w == 0).sum()) == int(share * rows * columns + Decimal("0.5"))


@pytest.mark.parametrize("n, m", [(2, 4), (1, 2), (4, 8), (1, 4)])
def test_every_group_of_a_pattern_has_exactly_n_zeros(n: int, m: int) -> None:
    w = prune(matrix(10, 32, 0), hessian_of(inputs(99, 32, 0)), Decimal(n) / m, (n, m), 16, 0.01).weight
    assert bool(((w == 0).view(10, 32 // m, m).sum(-1) == n).all())


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_outputs_change_less_than_with_the_smallest_weights_gone(pattern: tuple[int, int] | None) -> None:
    for seed in range(5):
        x, w = inputs(200, 32, seed), matrix(20, 32, seed)
        mine = prune(w, hessian_of(x), Decimal("0.5"), pattern, 16, 0.01).weight
        size = w.abs().view(20, 8, 4) if pattern else w.abs().view(1, 1, -1)
        least = size.argsort(-1)[..., : size.shape[-1] // 2]
        other = w.clone().view(size.shape).scatter(-1, least, 0.0).view_as(w)
        assert int((mine == 0).sum()) == int((other == 0).sum())
        assert (x @ (mine - w).T).square().sum() < 0.7 * (x @ (other - w).T).square().sum()


def test_half_precision_weights_keep_their_dtype_and_the_first_matrix_is_left_alone() -> None:
    w = matrix(8, 16, 0).to(torch.bfloat16)
    before = w.clone()
    hessian = Hessian(16, w)
    hessian.add(inputs(50, 16, 0).to(torch.bfloat16))
    assert hessian.value.dtype == torch.float32
    done = prune(w, hessian.value, Decimal("0.5"), None, 128, 0.01).weight
    assert done.dtype == torch.bfloat16 and int((done == 0).sum()) == 64 and bool((w == before).all())


def test_what_cannot_be_pruned_is_said() -> None:
    with pytest.raises(ValueError, match="no whole groups"):
        prune(matrix(2, 6, 0), hessian_of(inputs(9, 6, 0)), Decimal("0.5"), (2, 4), 128, 0.01)
    with pytest.raises(ValueError, match="not finite"):
        prune(matrix(2, 4, 0), torch.full((4, 4), float("nan")), Decimal("0.5"), None, 128, 0.01)
