"""The compressed cache: what is stored, in which form, and how many bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcli.cache.budget import Budget, share_out
from kvcli.cache.kv_cache import CompressedCache, Kept, Row, kept_counts, payload_bytes


def dense(
    layers: int = 2, kv_heads: int = 2, n: int = 12, dim: int = 4
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (layers, kv_heads, n, dim)
    return [list(torch.randn(shape, generator=generator)) for _ in range(2)]  # type: ignore[return-value]


FORMS: list[Kept] = [
    [torch.tensor([0, 3, 11])] * 2,
    [torch.tensor([[0, 3, 11], [1, 2, 11]]), torch.tensor([[5, 11], [6, 11]])],
    [[torch.tensor([11]), torch.tensor([0, 1, 2, 11])], torch.arange(12)],
]


@pytest.mark.parametrize("kept", FORMS)
def test_rows_hold_exactly_the_kept_pairs_right_aligned(kept: Kept) -> None:
    keys, values = dense()
    longest = [torch.arange(12)] * 2
    cache = CompressedCache([Row(keys, values, kept), Row(keys, values, longest)], room=3)
    for number, layer in enumerate(cache.layers):
        stored, valid = layer._keys, cache.valid(number)
        for head in range(2):
            form = kept[number]
            positions = form[head] if isinstance(form, list) or form.dim() == 2 else form
            mask = torch.ones(12, dtype=torch.bool) if valid is None else valid[0, head % valid.shape[1]]
            assert torch.equal(stored[0, head, :12][mask], keys[number][head, positions])
            assert torch.equal(layer._values[0, head, :12][mask], values[number][head, positions])
            assert int(mask.sum()) == len(positions)


@pytest.mark.parametrize("kept", FORMS)
def test_payload_bytes_are_those_of_the_stored_tensors(kept: Kept) -> None:
    """16-bit bytes counted one by one from the tensors that a row alone really holds."""
    keys, values = dense()
    half = [[k.half() for k in keys], [v.half() for v in values]]
    cache = CompressedCache([Row(*half, kept)], room=0)
    real = 0
    for number, layer in enumerate(cache.layers):
        valid = cache.valid(number)
        share = torch.ones(1, 1, layer._keys.shape[2], dtype=torch.bool) if valid is None else valid
        mask = share.expand(1, 2, -1)
        real += layer._keys[mask].nbytes + layer._values[mask].nbytes
    assert payload_bytes(kept, [(2, 8), (2, 8)]) == real
    assert sum(map(sum, kept_counts(kept, 2))) * 8 * 2 == real


def test_room_is_preallocated_and_ends_with_an_error() -> None:
    keys, values = dense()
    cache = CompressedCache([Row(keys, values, FORMS[0])], room=2)
    before = cache.layers[0]._keys.data_ptr()
    new = torch.ones(1, 2, 1, 4)
    cache.layers[0].update(new, new)
    out, _ = cache.layers[0].update(new * 2, new)
    assert out.data_ptr() == before
    assert out[0, 0, -2:].tolist() == [[1.0] * 4, [2.0] * 4]
    assert cache.layers[0].get_seq_length() == 5
    with pytest.raises(RuntimeError, match="no room"):
        cache.layers[0].update(new, new)


def test_rows_leave_a_batch() -> None:
    keys, values = dense()
    cache = CompressedCache([Row(keys, values, kept) for kept in FORMS], room=1)
    used = cache.layers[0].used
    third = cache.layers[0]._keys[2, :, :used].clone()
    valid = cache.valid(0)
    cache.select_rows([2])
    assert torch.equal(cache.layers[0]._keys[0, :, :used], third)
    assert valid is not None
    assert torch.equal(cache.valid(0), valid[2:3])  # type: ignore[arg-type]


def test_a_row_is_a_fork_and_leaves_the_dense_cache_alone() -> None:
    keys, values = dense()
    before = [k.clone() for k in keys]
    cache = CompressedCache([Row(keys, values, [torch.arange(12)] * 2)], room=1)
    cache.layers[0].update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    cache.layers[0]._keys.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, keys, strict=True))


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 60)), min_size=1, max_size=12), st.integers(0, 400))
def test_shares_add_up_exactly_and_respect_limits(items: list[tuple[float, int]], total: int) -> None:
    weights, limits = [w for w, _ in items], [limit for _, limit in items]
    parts = share_out(weights, total, limits)
    assert sum(parts) == min(total, sum(limits))
    assert all(0 <= p <= limit for p, limit in zip(parts, limits, strict=True))


@given(st.integers(1, 5000), st.integers(1, 100), st.integers(1, 64), st.integers(0, 8))
def test_protected_tokens_take_at_most_half(n: int, percent: int, window: int, sinks: int) -> None:
    from decimal import Decimal

    budget = Budget.of_ratio(Decimal(percent) / 100, n, 2, 2)
    w, s, flags = budget.protect(window, sinks)
    assert 1 <= budget.per_head <= n
    if not budget.everything:
        assert w + s <= max(1, budget.per_head // 2)
        assert (w < min(window, n) or s < min(sinks, n - min(window, n))) == ("fallback" in flags)


def test_budgets_round_half_up_on_exact_decimals() -> None:
    from decimal import Decimal

    assert Budget.of_ratio(Decimal("0.1"), 1000, 1, 1).per_head == 100
    assert Budget.of_ratio(Decimal("0.5"), 5, 1, 1).per_head == 3
    assert Budget.of_ratio(Decimal("0.7"), 10, 1, 1).per_head == 7
    assert Budget.of_ratio(Decimal("0.001"), 10, 1, 1).per_head == 1
